# SPDX-License-Identifier: Apache-2.0
"""Attention by "splash" (sparse flash attention), the fused kernel for TPUs in jax itself.

Equal to `nn.attention.attend`. It keeps no scores, whose array for 32 heads over a row of
32,768 tokens has 64 GiB in bfloat16, and skips what causal attention or a window hides.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as library
from jax.sharding import PartitionSpec

from flaxlm.nn.masks import Band, Pattern, Scoring, Sight
from flaxlm.sharding import axis_sizes_in_use, on_members, partition_spec

# Tokens in a block of queries or of keys, in the forward kernel and in both of the backward
# pass: the first that divides a length. 512 is MaxText's default (configs/base.yml,
# sa_block_*). As there, the backward kernels are not fused: fused, they keep an array of
# q's size for every block of keys.
BLOCKS = (512, 256, 128)

# The logical names of the arrays that a device has a part of.
NAMES = {
  "q": ("batch", "act_heads", "length", "head_dim"),
  "k": ("batch", "act_kv_heads", "key_length", "head_dim"),
  "v": ("batch", "act_kv_heads", "key_length", "head_dim"),
  "query_segments": ("batch", "length"),
  "key_segments": ("batch", "key_length"),
  "mask": ("batch", "length", "key_length"),
  "sinks": ("act_heads",),
}


def attend_splash(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  sight: Sight,
  scoring: Scoring,
  sinks_N: jax.Array | None = None,
  interpreted: bool = False,
) -> jax.Array:
  """The values of `attend`. Lengths are multiples of 128.

  The kernel computes the mask of `sight.pattern` by itself. If there is none, as over a
  cache, it reads the mask, and has no gradients.

  On a mesh every device has its rows and heads. With `context` it has a share of the
  queries, and all keys; those of causal attention are dealt out (`deal`), so that all
  devices have the same work although later queries see more keys.
  """
  B, T, S = *q_BTNH.shape[:2], k_BSKH.shape[1]
  sizes, pattern = axis_sizes_in_use(), sight.pattern
  parts = sizes.get("context", 1)
  options = dict(attn_logits_soft_cap=scoring.softcap, interpret=interpreted)
  arrays = {
    "q": (q_BTNH * scoring.scale).swapaxes(1, 2),
    "k": k_BSKH.swapaxes(1, 2),
    "v": v_BSKH.swapaxes(1, 2),
  }
  if sinks_N is not None:
    arrays["sinks"] = sinks_N
  kernel, is_dealt = None, False
  if pattern is None:
    mask_BTS = jnp.ones((1, 1, 1), bool) if sight.mask_BTS is None else sight.mask_BTS
    arrays["mask"] = jnp.broadcast_to(mask_BTS, (B, T, S))
  else:
    is_dealt = parts > 1 and pattern.causal
    kernel = band_kernel(pattern, T, S, parts, **options)
    if pattern.segments is not None:
      arrays["query_segments"], arrays["key_segments"] = pattern.segments

  def attend_part(kernel: Any, arrays: dict[str, jax.Array]) -> jax.Array:
    if kernel is None:
      return attend_masked(arrays, **options)
    return attend_band(kernel, arrays, parts if is_dealt else 1)

  if math.prod(sizes.values()) == 1:
    return attend_part(kernel, arrays).swapaxes(1, 2)
  specs = {name: partition_spec(NAMES[name], x.shape, sizes) for name, x in arrays.items()}
  # Each member of `context` has the tables of its own queries, if these differ.
  differ = parts > 1 and pattern is not None and not Band.of(pattern).is_all
  table_spec = lambda table: PartitionSpec(*[None] * (table.ndim > 1), "context")
  table_specs = jax.tree.map(table_spec, kernel) if differ else PartitionSpec()
  # The library's kernels say nothing of what varies (`check_vma`).
  mapped = on_members(attend_part, (table_specs, specs), specs["q"], check_vma=False)
  return mapped(kernel, arrays).swapaxes(1, 2)


def attend_band(kernel: Any, arrays: dict[str, jax.Array], parts: int) -> jax.Array:
  """The output (B, N, T, H) of a kernel of `band_kernel` for one device's arrays; their
  queries are dealt out over the `parts` members of `context`."""
  q_BNTH, queries_BT = arrays["q"], arrays.get("query_segments")
  if parts > 1:
    q_BNTH = deal(q_BNTH, parts, 2)
    queries_BT = None if queries_BT is None else deal(queries_BT, parts, 1)
  segments = None
  if queries_BT is not None:
    segments = library.SegmentIds(queries_BT, arrays["key_segments"])
  by_row = jax.vmap(kernel, (0, 0, 0, 0 if segments else None, None))
  out_BNTH = by_row(q_BNTH, arrays["k"], arrays["v"], segments, arrays.get("sinks"))
  return deal(out_BNTH, parts, 2, back=True) if parts > 1 else out_BNTH


def attend_masked(arrays: dict[str, jax.Array], **options: Any) -> jax.Array:
  """The output (B, N, T, H) under a mask that is read from memory, row by row."""
  T, S = arrays["mask"].shape[1:]
  blocks = library.BlockSizes(block_q=block(T), block_kv=block(S))

  def attend_row(row: tuple) -> jax.Array:
    *qkv, mask_TS = row
    kernel = library.make_splash_mha(
      mask_TS[None], block_sizes=blocks, head_shards=1, q_seq_shards=1, **options
    )
    # Its tables come from a jitted function, which makes an array of what jax 0.11 asks.
    kernel.fwd_mask_info = kernel.fwd_mask_info._replace(is_dynamic_mask=True)
    out_NTH = kernel(*qkv, None, arrays.get("sinks"))
    # Of queries that see nothing the kernel makes 0 / 0.
    return jnp.where(mask_TS.any(-1)[:, None], out_NTH, 0)

  return jax.lax.map(attend_row, (arrays["q"], arrays["k"], arrays["v"], arrays["mask"]))


# -- Masks that the kernel computes ------------------------------------------------------


class BandMask(library.Mask):
  """A band for queries at these places of the row, as the library reads masks.

  The library asks for every block whether a part of it, or all of it, is visible. The
  answer is two numbers, not the block: a row of 32,768 has a thousand million places.
  """

  def __init__(self, band: Band, places_T: np.ndarray, num_keys: int):
    self.mask_function = band
    self.q_sequence = places_T
    self.num_keys = num_keys

  @property
  def shape(self) -> tuple[int, int]:
    return len(self.q_sequence), self.num_keys

  def __getitem__(self, block: tuple[slice, slice]) -> np.ndarray:
    """For one block: [[whether any is visible, whether all are]]."""
    band, (queries, keys) = self.mask_function, block
    first, last = self.q_sequence[queries][[0, -1]]
    assert last - first == queries.stop - queries.start - 1, "a block is of one piece"
    nearest, farthest = first - (keys.stop - 1), last - keys.start
    least = -np.inf if band.least is None else band.least
    most = np.inf if band.most is None else band.most
    is_any = nearest <= most and farthest >= least
    return np.array([[is_any, nearest >= least and farthest <= most]])

  def _key(self) -> tuple:
    return self.mask_function, self.num_keys, self.q_sequence.tobytes()

  def __eq__(self, other: object) -> bool:
    return isinstance(other, BandMask) and self._key() == other._key()

  def __hash__(self) -> int:
    return hash(self._key())


def band_kernel(
  pattern: Pattern, num_queries: int, num_keys: int, parts: int, **options: Any
) -> Any:
  """The library's kernel with its tables of blocks, for `parts` members of `context`."""
  band, share = Band.of(pattern), num_queries // parts
  if band.is_all:  # the same for every member
    mask: Any = library.FullMask((share, num_keys))
    shards, q = 1, block(share)
  else:
    is_dealt = parts > 1 and pattern.causal
    places_T = dealt_places(num_queries, parts) if is_dealt else np.arange(num_queries)
    mask = BandMask(band, places_T.astype(np.int32), num_keys)
    shards, q = parts, block(share // 2 if is_dealt else share)
  kv = block(num_keys)
  blocks = library.BlockSizes(
    block_q=q,
    block_kv=kv,
    block_q_dkv=q,
    block_kv_dkv=kv,
    block_q_dq=q,
    block_kv_dq=kv,
  )
  return library.make_splash_mha(  # one mask for all heads
    library.MultiHeadMask([mask]),
    block_sizes=blocks,
    head_shards=1,
    q_seq_shards=shards,
    **options,
  )


def block(length: int) -> int:
  """The size of the blocks of so many tokens."""
  fitting = [size for size in BLOCKS if length % size == 0]
  assert fitting, f"splash is not for {length} tokens: see nn.kernels.paths"
  return fitting[0]


# -- Queries dealt out over context ------------------------------------------------------


def owner(piece: int, parts: int) -> int:
  """The member that gets a piece of the row: 0 1 2 3 3 2 1 0 for 4 members.

  Each so has an early piece and a late one, and together the same number of keys.
  """
  return min(piece, 2 * parts - 1 - piece)


def deal(x: jax.Array, parts: int, dim: int, back: bool = False) -> jax.Array:
  """Members' consecutive shares of rows along `dim` as the pieces that each owns, the even
  piece first; `back`: the other way round.

  Each share is an even and an odd piece, and so is what each owns: two permutations.
  """
  halves = []
  for odd, half in enumerate(jnp.split(x, 2, dim)):
    moves = [(n, owner(2 * n + odd, parts)) for n in range(parts)]
    moves = [(to, start) for start, to in moves] if back else moves
    halves.append(jax.lax.ppermute(half, "context", moves))
  return jnp.concatenate(halves, dim)


def dealt_places(num_tokens: int, parts: int) -> np.ndarray:
  """The places in the row of each member's queries, one member after the other."""
  pieces = np.arange(num_tokens).reshape(2 * parts, -1)
  owned = sorted(range(2 * parts), key=lambda n: (owner(n, parts), n % 2))
  return pieces[owned].reshape(-1)
