# SPDX-License-Identifier: Apache-2.0
"""Packed documents in cuDNN's kernel, from Hopper on: by where they begin, without a mask.

Equal to `nn.attention.attend` in 16 bits. A mask would be a bias of (T, S) scores that the
kernel reads, and it would not skip what the mask hides: 30 to 42 % of the time on an H100.
This form was compiled for a Hopper GPU, and has not been measured on any.

No public function of jax takes offsets (jax#29731), so this one uses a private module.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as library

from flaxlm.nn.kernels.cudnn import attend_cudnn
from flaxlm.nn.masks import Pattern, Placement, Reach, Scoring, Sight, visible
from flaxlm.sharding import axis_sizes_in_use, on_members, partition_spec

MOST_DOCUMENTS = 32  # of a row: the kernel keeps a sum for each query, head and document
GROUPED_SINCE = (0, 11, 2)  # before, jax took keys' offsets for queries' (jax#39521)


KEYS = ("batch", "key_length", "act_kv_heads", "head_dim")
NAMES = (("batch", "length", "act_heads", "head_dim"), KEYS, KEYS, ("batch", "length"))


class Documents(NamedTuple):
  """Where the documents of rows are, as the library wants it: -1 if there is none."""

  lengths_BM: jax.Array
  offsets_BE: jax.Array  # E = M + 1, of which the last is not used
  fit: jax.Array  # no row has more than M


class Form(NamedTuple):
  """What the kernel is compiled for."""

  causal: bool
  scale: float
  window: int | None = None
  most: int = MOST_DOCUMENTS


def documents_of(segments_BT: jax.Array, most: int) -> Documents:
  """The first `most` documents of each row, runs of one number. Padding is one of them, so
  that there is no output, and no gradient, that the kernel does not write."""
  begins_BT = jnp.diff(segments_BT, axis=1, prepend=-1) != 0  # segments count from 0
  number_BT = jnp.cumsum(begins_BT, 1, dtype=jnp.int32)
  count_B1, numbers_E = number_BT[:, -1:], jnp.arange(most + 1)
  edges_BE = (number_BT[:, None] <= numbers_E[:, None]).sum(-1, dtype=jnp.int32)
  exists_BE = numbers_E < count_B1
  return Documents(
    jnp.where(exists_BE[:, :-1], jnp.diff(edges_BE, axis=1), -1),
    jnp.where(exists_BE, edges_BE, -1),
    (count_B1 <= most).all(),
  )


def packed_segments(pattern: Pattern | None) -> jax.Array | None:
  """The segments (B, T) of self-attention over packed rows, which this form can compute;
  None: it is something else, or has a window, of which nobody has seen whether it can."""
  if pattern is None or pattern.segments is None or pattern.window is not None:
    return None
  queries_BT, keys_BS = pattern.segments
  return queries_BT if queries_BT is keys_BS else None


def attend_packed(
  q_BTNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKH: jax.Array,
  segments_BT: jax.Array,
  form: Form,
) -> jax.Array:
  """The values of `attend` (B, T, N, H), where each query sees its own document.

  If any row that a device has holds more than `form.most` documents, it uses a mask.
  """
  arrays = (q_BTNH, k_BTKH, v_BTKH, segments_BT)
  sizes = axis_sizes_in_use()
  if math.prod(sizes.values()) == 1:
    return mix(form, *arrays)
  specs = tuple(
    partition_spec(*x, sizes) for x in zip(NAMES, map(jnp.shape, arrays), strict=True)
  )
  part = lambda *arrays: mix(form, *arrays)
  # By hand, because a partitioner does not know that offsets belong to a device's rows.
  return on_members(part, specs, specs[0], check_vma=False)(*arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def mix(form: Form, *arrays: jax.Array) -> jax.Array:
  """The output of `mix_forward`. Its backward pass chooses as the forward pass did, so that
  nothing is kept for a choice that was not made."""
  return mix_forward(form, *arrays)[0]


def mix_forward(
  form: Form, q: jax.Array, k: jax.Array, v: jax.Array, segments_BT: jax.Array
) -> tuple[jax.Array, tuple]:
  documents = documents_of(segments_BT, form.most)
  kept = (q, k, v, segments_BT, documents)

  def by_offsets() -> tuple[jax.Array, jax.Array]:
    return library.dot_product_attention(
      q,
      *in_groups(q, k, v),
      q_seqlen=documents.lengths_BM,
      kv_seqlen=documents.lengths_BM,
      q_offsets=documents.offsets_BE,
      kv_offsets=documents.offsets_BE,
      scale=form.scale,
      mask_type=mask_type(form),
      sliding_window_length=form.window,
      return_residual=True,
    )

  def by_mask() -> tuple[jax.Array, jax.Array]:
    B, T, N, _ = q.shape
    return masked(form, segments_BT, q, k, v), jnp.zeros((B * form.most, N, T), jnp.float32)

  out, sums = jax.lax.cond(documents.fit, by_offsets, by_mask)
  return out, (*kept, out, sums)


def mix_backward(form: Form, kept: tuple, grad: jax.Array) -> tuple:
  q, k, v, segments_BT, documents, out, sums = kept

  def by_offsets() -> tuple[jax.Array, ...]:
    none = jnp.zeros(0, q.dtype)
    places = 2 * (documents.lengths_BM,) + 2 * (documents.offsets_BE,)
    arrays = (q, *in_groups(q, k, v), none, *places, none, none, sums, out)
    grad_q, *grads_kv = library._dot_product_attention_bwd_rule(
      form.scale,
      42,  # the seed of a dropout that there is not
      0.0,
      (False, False),
      mask_type(form),
      library.AttentionLayout.BTNH.value,
      form.window,
      None,
      False,
      arrays,
      grad,
    )[:3]
    of_groups = lambda x, g: g.reshape(*x.shape[:3], -1, x.shape[3]).sum(3)
    return grad_q, *(of_groups(x, g) for x, g in zip((k, v), grads_kv, strict=True))

  def by_mask() -> tuple[jax.Array, ...]:
    pull = jax.vjp(functools.partial(masked, form, segments_BT), q, k, v)[1]
    return pull(grad)

  return *jax.lax.cond(documents.fit, by_offsets, by_mask), None


mix.defvjp(mix_forward, mix_backward)


def in_groups(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Keys and values with as many heads as the library can address."""
  if jax.__version_info__ >= GROUPED_SINCE:
    return k, v
  times = q.shape[2] // k.shape[2]
  return jnp.repeat(k, times, 2), jnp.repeat(v, times, 2)


def mask_type(form: Form) -> Any:
  kinds = library.MaskType
  return kinds.PADDING_CAUSAL if form.causal else kinds.PADDING


def masked(
  form: Form, segments_BT: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array
) -> jax.Array:
  """The same by a mask, for rows of more documents."""
  slots_BT = jnp.broadcast_to(jnp.arange(q.shape[1]), segments_BT.shape)
  where = Placement(slots_BT, segments_BT, segments_BT)
  mask_BTS = visible(where, k.shape[1], form.causal, form.window)
  reach = Reach(form.window) if form.causal else None
  return attend_cudnn(q, k, v, Sight(mask_BTS, reach=reach), Scoring(form.scale))
