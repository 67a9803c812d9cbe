# SPDX-License-Identifier: Apache-2.0
"""Multi-head attention (Vaswani et al., 2017, section 3.2), multi-query and grouped
(Shazeer, 2019; Ainslie et al., 2023), and what each query sees.

`attend` says what attention is; over whole rows, in training, `attend_blocked` computes
the same, or `attend_cudnn` where `choose_path` finds that NVIDIA's kernel can; over a cache
`attend_cached`, or that kernel for prompts. Which query sees which key is decided in one
place, `visible`, from slots (where a token lies in its row), never from positions (which
restart with every packed document).
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxlm.config import ResolvedModel
from flaxlm.errors import ConfigError
from flaxlm.nn.base import Execution
from flaxlm.nn.cache import widened
from flaxlm.nn.layers import LOWEST, Einsum, residual_scale
from flaxlm.nn.positions import CosSin, rotate
from flaxlm.sharding import axis_sizes_in_use, constrain, is_cut

OUTLINE = "outline"  # a path for the planner alone
PROMPT = 32  # tokens at a time: the scores of fewer are not worth a kernel


class Placement(NamedTuple):
  """Where queries and keys stand, from which `visible` makes the mask.

  Segments are None when every row is one document; key positions when they are slots;
  key slots when key s stands in slot s.
  """

  query_slots_BT: jax.Array
  query_segments_BT: jax.Array | None = None
  key_segments_BS: jax.Array | None = None
  key_positions_BS: jax.Array | None = None
  key_slots_BS: jax.Array | None = None


class Sight(NamedTuple):
  """What the layers of one kind see: a mask, a bias of the scores, RoPE's (cos, sin)."""

  mask_BTS: jax.Array | None
  bias_XNTS: jax.Array | None = None  # X is 1 or B
  cos_sin: CosSin | None = None


def visible(
  where: Placement,
  num_keys: int,
  causal: bool = True,
  window: int | None = None,
  sink_tokens: int = 0,
) -> jax.Array | None:
  """mask_BTS: the key is of the same document, within the window, and, if `causal`, not
  later. The first `sink_tokens` of a document are within every window (Xiao et al., 2023).
  None: everything is visible."""
  masks = []
  query, key = where.query_slots_BT[:, :, None], jnp.arange(num_keys)[None, None, :]
  if where.key_slots_BS is not None:
    key = where.key_slots_BS[:, None]
  if window is not None:
    near = key > query - window
    if not causal:
      near &= key < query + window
    if sink_tokens:
      positions_BS = where.key_positions_BS
      near |= (key if positions_BS is None else positions_BS[:, None]) < sink_tokens
    masks.append(near)
  if causal:
    masks.append(key <= query)
  if where.query_segments_BT is not None:
    assert where.key_segments_BS is not None
    masks.append(where.query_segments_BT[:, :, None] == where.key_segments_BS[:, None])
  return functools.reduce(jnp.logical_and, masks) if masks else None


class Scoring(NamedTuple):
  """How scores are made of q . k, besides the mask: fixed numbers of the architecture."""

  scale: float
  softcap: float | None = None


def attend(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  sight: Sight,
  scoring: Scoring,
  sinks_N: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """softmax(scale q k^T + bias) v for each head, the softmax in float32: the reference.

  Returns the mixed values (B, T, N, H) and the weights (B, N, T, S); query head n reads
  kv head n // G. `sinks_N` are logits of one more key, without a value, so that weights
  may add up to less than 1 (gpt-oss).
  """
  B, T, N, H = q_BTNH.shape
  S, K = k_BSKH.shape[1:3]
  q_BTKGH = (q_BTNH * scoring.scale).reshape(B, T, K, N // K, H)
  scores = jnp.einsum(
    "BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32
  )
  if scoring.softcap is not None:
    scores = scoring.softcap * jnp.tanh(scores / scoring.softcap)
  if sight.bias_XNTS is not None:
    scores += sight.bias_XNTS.reshape(-1, K, N // K, T, S)
  if sight.mask_BTS is not None:
    scores = jnp.where(sight.mask_BTS[:, None, None], scores, LOWEST)
  if sinks_N is not None:
    sinks = jnp.broadcast_to(sinks_N.reshape(K, N // K, 1, 1), (B, K, N // K, T, 1))
    scores = jnp.concatenate([scores, sinks.astype(jnp.float32)], -1)
  weights_BKGTS = jax.nn.softmax(scores, -1)[..., :S]
  out = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS.astype(v_BSKH.dtype), v_BSKH)
  return out.reshape(B, T, N, H), weights_BKGTS.reshape(B, N, T, S)


def attend_blocked(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  sight: Sight,
  scoring: Scoring,
  sinks_N: jax.Array | None = None,
  reach: "Reach | None" = None,
) -> jax.Array:
  """The values of `attend` in blocks of queries, over whole rows.

  A block reads only the keys within `reach`: for causal attention that saves up to half
  of the work, for a window more. One array of the scores' size is kept for the backward
  pass instead of three. `reach` None: every query may see every key.

  On a mesh with `context` every device takes its share of each block, so that all have
  as much to do, although later queries see more.
  """
  B, T, N, H = q_BTNH.shape
  S, K = k_BSKH.shape[1:3]
  # One matrix per kv head, its G query heads one after the other in the rows.
  q_BKGTH = (q_BTNH * scoring.scale).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
  k_BKSH, v_BKSH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
  sinks_KG = None if sinks_N is None else sinks_N.reshape(K, N // K)
  blocks = []
  for start, end in query_blocks(T) if reach else [(0, T)]:
    first = 0 if reach is None or reach.window is None else max(0, start - reach.window + 1)
    last = end if reach else S
    part = lambda x, start=start, end=end, first=first, last=last: (
      None if x is None else x[..., start:end, first:last]
    )
    blocks.append(
      mix(
        scoring.softcap,
        share_out(q_BKGTH[:, :, :, start:end]),
        k_BKSH[:, :, first:last],
        v_BKSH[:, :, first:last],
        part(sight.mask_BTS),
        part(sight.bias_XNTS),
        sinks_KG,
      )
    )
  out_BKGTH = jnp.concatenate(blocks, 3)
  return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def share_out(q_BKGTH: jax.Array) -> jax.Array:
  """Cuts a block of queries over `context`; without that axis it stays as it is."""
  if not is_cut("length"):
    return q_BKGTH
  return constrain(q_BKGTH, "batch", "act_kv_heads", "head_dim", "length", "head_dim")


def attend_cached(
  q_BTNH: jax.Array,
  k_BKSH: jax.Array,
  v_BKSH: jax.Array,
  sight: Sight,
  scoring: Scoring,
  sinks_N: jax.Array | None = None,
) -> jax.Array:
  """The values of `attend` for keys and values that lie as a cache has them."""
  B, T, N, H = q_BTNH.shape
  K = k_BKSH.shape[1]
  q_BKGTH = (q_BTNH * scoring.scale).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
  sinks_KG = None if sinks_N is None else sinks_N.reshape(K, N // K)
  if B == 1 and T == 1:
    return mix_one(q_BKGTH, k_BKSH, v_BKSH, sight, scoring, sinks_KG)
  seen = (sight.mask_BTS, sight.bias_XNTS, sinks_KG)
  out_BKGTH, _ = mix_forward(scoring.softcap, q_BKGTH, k_BKSH, v_BKSH, *seen)
  return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def mix_one(
  q_BKGTH: jax.Array,
  k_BKSH: jax.Array,
  v_BKSH: jax.Array,
  sight: Sight,
  scoring: Scoring,
  sinks_KG: jax.Array | None,
) -> jax.Array:
  """`attend_cached` for one query of one row, as sums of products.

  XLA would fuse a matrix product of one row with the write to the cache before it, and so
  compute that write twice, which takes a copy of the whole cache at every token.
  """
  _, K, G, _, H = q_BKGTH.shape
  q_KG1H, k_K1SH, v_K1SH = q_BKGTH[0], k_BKSH[0][:, None], v_BKSH[0][:, None]
  scores_KGS = (q_KG1H * k_K1SH).astype(jnp.float32).sum(-1)
  if scoring.softcap is not None:
    scores_KGS = scoring.softcap * jnp.tanh(scores_KGS / scoring.softcap)
  if sight.bias_XNTS is not None:
    scores_KGS += sight.bias_XNTS.reshape(K, G, -1)
  if sight.mask_BTS is not None:
    scores_KGS = jnp.where(sight.mask_BTS[0], scores_KGS, LOWEST)
  most_KG1 = scores_KGS.max(-1, keepdims=True)
  if sinks_KG is not None:
    most_KG1 = jnp.maximum(most_KG1, sinks_KG[:, :, None])
  exp_KGS = jnp.exp(scores_KGS - most_KG1)
  sum_KG1 = exp_KGS.sum(-1, keepdims=True)
  if sinks_KG is not None:
    sum_KG1 += jnp.exp(sinks_KG[:, :, None] - most_KG1)
  out_KGH = (exp_KGS[..., None] * v_K1SH).sum(2) / sum_KG1
  return out_KGH.reshape(1, 1, K * G, H).astype(v_BKSH.dtype)


class Reach(NamedTuple):
  """Causal attention over whole rows; with a window, nothing before it is ever seen.

  `is_all`: the mask says nothing else, as where every row is one document.
  """

  window: int | None = None
  is_all: bool = False


def query_blocks(num_queries: int) -> list[tuple[int, int]]:
  """Up to four ranges of at least 64 queries: more save little and compile longer."""
  count = max(1, min(4, num_queries // 64))
  edges = [num_queries * i // count for i in range(count + 1)]
  return list(itertools.pairwise(edges))


# -- NVIDIA's kernel -----------------------------------------------------------------------


class Path(NamedTuple):
  """How whole rows attend, and what speaks against cuDNN's kernel, if anything does."""

  name: Any  # of config.AttentionPath, never auto
  why: str = ""


def choose_path(
  cfg: ResolvedModel,
  run: Execution,
  sizes: Mapping[str, int],
  lengths: Sequence[int] = (),
) -> Path:
  """The path over whole rows of such `lengths`, on a mesh of such `sizes`.

  `run.kernel_head_dim` says what the devices can do. Raises `ConfigError` where the config
  asks for cudnn and cuDNN cannot do what the model asks.
  """
  wanted, most_head_dim = run.attention, run.kernel_head_dim
  if wanted == "blocked":
    return Path("blocked", "as training.attention says")
  against = {
    "it runs on NVIDIA's GPUs from Ampere on": not most_head_dim,
    "it knows no float32": jnp.dtype(run.dtype).itemsize != 2,
    f"head_dim={cfg.head_dim} is above {most_head_dim}": cfg.head_dim > most_head_dim,
    f"head_dim={cfg.head_dim} is no multiple of 8": cfg.head_dim % 8 != 0,
    "it knows no attention_softcap": cfg.attention_softcap is not None,
    "it knows no learned_sinks": cfg.learned_sinks,
    f"it knows no positions={cfg.positions}": cfg.positions in {"alibi", "relative"},
    "rows of an odd length may not have a mask": any(n % 2 for n in lengths),
    "it is not cut over mesh axis context": sizes.get("context", 1) > 1,
    "it does not run in the stages of a pipeline": sizes.get("stage", 1) > 1,
  }
  found = [reason for reason, holds in against.items() if holds]
  if not found:
    return Path("cudnn")
  if wanted == "cudnn":
    cure = "training.attention=auto takes another path where it must"
    raise ConfigError(f"training.attention=cudnn cannot: {found[0]}", cure)
  return Path("blocked", f"cudnn cannot: {found[0]}")


def path_here(cfg: ResolvedModel, run: Execution, lengths: Sequence[int]) -> Path:
  """The path over whole rows of such `lengths`, on the mesh that is set."""
  return choose_path(cfg, run, axis_sizes_in_use(), lengths)


def training_path(
  cfg: ResolvedModel,
  run: Execution,
  sizes: Mapping[str, int],
  seq_len: int,
  source_len: int,
) -> Path | None:
  """The path of a training step; None for an RNN, which has no attention.

  `source_len` matters to an encoder-decoder only.
  """
  if cfg.family == "rnn":
    return None
  source_len = source_len if cfg.family == "encoder_decoder" else 0
  return choose_path(cfg, run, sizes, (seq_len, source_len))


def attend_cudnn(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  sight: Sight,
  scoring: Scoring,
  reach: Reach | None = None,
) -> jax.Array:
  """The values of `attend` by cuDNN's fused kernel (Dao, 2023), which keeps no scores.

  It knows causal attention and windows, and skips what they hide; a mask that says more
  goes in as a bias of the scores.
  """
  mask_BTS = None if reach is not None and reach.is_all else sight.mask_BTS
  window = None if reach is None else reach.window
  return jax.nn.dot_product_attention(
    q_BTNH,
    k_BSKH,
    v_BSKH,
    mask=None if mask_BTS is None else mask_BTS[:, None],
    scale=scoring.scale,
    is_causal=reach is not None,
    local_window_size=None if window is None else (window - 1, 0),
    implementation="cudnn",
  )


@jax.custom_vjp
def attend_outline(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array) -> jax.Array:
  """Has the shape of attention and keeps what a fused kernel keeps, for `planning`, which
  traces it where there is no such kernel: q, k, v, the output, a number per row of scores.
  """
  return q_BTNH


def _outline_forward(q_BTNH: jax.Array, *kv: jax.Array) -> tuple[jax.Array, tuple]:
  out_BTNH = jnp.exp(q_BTNH)
  return out_BTNH, (q_BTNH, *kv, out_BTNH, out_BTNH[..., 0].astype(jnp.float32))


attend_outline.defvjp(_outline_forward, lambda kept, _: kept[:3])


# -- XLA's operations, with a backward pass of their own -----------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def mix(
  softcap: float | None,
  q_BKGTH: jax.Array,
  k_BKSH: jax.Array,
  v_BKSH: jax.Array,
  mask_BTS: jax.Array | None,
  bias_XNTS: jax.Array | None,
  sinks_KG: jax.Array | None,
) -> jax.Array:
  """softmax(q k^T + bias) v where the mask allows, with a backward pass written by hand.

  The weights are left unnormalised, exp(score - max): their sum divides the output, which
  is S / H times smaller, and likewise its gradient (Dao et al., 2022, appendix B).
  """
  return mix_forward(softcap, q_BKGTH, k_BKSH, v_BKSH, mask_BTS, bias_XNTS, sinks_KG)[0]


def mix_forward(
  softcap: float | None,
  q_BKGTH: jax.Array,
  k_BKSH: jax.Array,
  v_BKSH: jax.Array,
  mask_BTS: jax.Array | None,
  bias_XNTS: jax.Array | None,
  sinks_KG: jax.Array | None,
) -> tuple[jax.Array, tuple]:
  B, K, G, T, H = q_BKGTH.shape
  S = k_BKSH.shape[2]
  # The G heads of a kv head are rows of one matrix. B and K stay two dims: merged, they
  # would lose the heads' cut over the mesh.
  q_BKRH = q_BKGTH.reshape(B, K, G * T, H)
  scores = jnp.einsum("BKRH,BKSH->BKRS", q_BKRH, k_BKSH, preferred_element_type=jnp.float32)
  tanh_BKRS = None
  if softcap is not None:
    tanh_BKRS = jnp.tanh(scores / softcap)
    scores = softcap * tanh_BKRS
  scores = scores.reshape(B, K, G, T, S)
  if bias_XNTS is not None:
    scores += bias_XNTS.reshape(-1, K, G, T, S)
  if mask_BTS is not None:
    scores = jnp.where(mask_BTS[:, None, None], scores, LOWEST)
  scores = scores.reshape(B, K, G * T, S)
  max_BKR1 = scores.max(-1, keepdims=True)
  sinks_BKR1 = None
  if sinks_KG is not None:
    sinks_BKGT = jnp.broadcast_to(sinks_KG[:, :, None], (B, K, G, T))
    sinks_BKR1 = sinks_BKGT.reshape(B, K, G * T, 1)
    max_BKR1 = jnp.maximum(max_BKR1, sinks_BKR1)
    sinks_BKR1 = jnp.exp(sinks_BKR1 - max_BKR1)
  exp_BKRS = jnp.exp(scores - max_BKR1)
  sum_BKR1 = exp_BKRS.sum(-1, keepdims=True)
  if sinks_BKR1 is not None:
    sum_BKR1 += sinks_BKR1
  exp_BKRS = exp_BKRS.astype(v_BKSH.dtype)
  out_BKRH = jnp.einsum("BKRS,BKSH->BKRH", exp_BKRS, v_BKSH) / sum_BKR1.astype(v_BKSH.dtype)
  bias_batch = None if bias_XNTS is None else bias_XNTS.shape[0]
  residuals = (q_BKRH, k_BKSH, v_BKSH, exp_BKRS, sum_BKR1, out_BKRH, tanh_BKRS, sinks_BKR1)
  return out_BKRH.reshape(q_BKGTH.shape), (*residuals, bias_batch)


def mix_backward(softcap: float | None, residuals: tuple, grad_BKGTH: jax.Array) -> tuple:
  q_BKRH, k_BKSH, v_BKSH, exp_BKRS, sum_BKR1, out_BKRH, tanh_BKRS, *rest = residuals
  sinks_BKR1, bias_batch = rest
  B, K, G, T, _ = grad_BKGTH.shape
  S, dtype = k_BKSH.shape[2], v_BKSH.dtype
  grad_BKRH = grad_BKGTH.reshape(out_BKRH.shape) / sum_BKR1.astype(dtype)
  grad_v_BKSH = jnp.einsum("BKRS,BKRH->BKSH", exp_BKRS, grad_BKRH)
  grad_exp_BKRS = jnp.einsum("BKRH,BKSH->BKRS", grad_BKRH, v_BKSH)
  along_BKR1 = (grad_BKRH * out_BKRH).sum(-1, keepdims=True)
  grad_scores_BKRS = exp_BKRS * (grad_exp_BKRS - along_BKR1)
  grad_bias = grad_sinks = None
  if bias_batch is not None:
    grad_bias = grad_scores_BKRS.astype(jnp.float32).reshape(B, K * G, T, S)
    if bias_batch == 1:
      grad_bias = grad_bias.sum(0, keepdims=True)
  if sinks_BKR1 is not None:  # as a key with a value of 0
    grad_sinks = -(sinks_BKR1 * along_BKR1).reshape(B, K, G, T).sum((0, 3))
  if softcap is not None:
    grad_scores_BKRS *= (1 - tanh_BKRS * tanh_BKRS).astype(dtype)
  grad_q_BKRH = jnp.einsum("BKRS,BKSH->BKRH", grad_scores_BKRS, k_BKSH)
  grad_k_BKSH = jnp.einsum("BKRS,BKRH->BKSH", grad_scores_BKRS, q_BKRH)
  grad_q_BKGTH = grad_q_BKRH.reshape(grad_BKGTH.shape)
  return grad_q_BKGTH, grad_k_BKSH, grad_v_BKSH, None, grad_bias, grad_sinks


mix.defvjp(mix_forward, mix_backward)


class Attention(nn.Module):
  """Attention with N query heads and K key/value heads, over its own input or another's."""

  cfg: ResolvedModel
  run: Execution

  def setup(self):
    cfg = self.cfg
    D, N, K, H = cfg.width, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    dtypes = self.run.dtypes
    heads, kv_heads = ("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim")
    biased = cfg.qkv_biased
    self.q = Einsum("BTD,DNH->BTNH", (D, N, H), heads, biased=biased, **dtypes)
    self.k = Einsum("BSD,DKH->BSKH", (D, K, H), kv_heads, biased=biased, **dtypes)
    self.v = Einsum("BSD,DKH->BSKH", (D, K, H), kv_heads, biased=biased, **dtypes)
    self.o = Einsum(
      "BTNH,NHD->BTD",
      (N, H, D),
      ("heads", "head_dim", "embed"),
      biased=cfg.o_biased,
      init_scale=residual_scale(cfg.depth),
      **dtypes,
    )
    if cfg.qk_norm != "none":
      whole = cfg.qk_norm == "width"
      self.q_norm = HeadNorm(cfg.norm_epsilon, (N, H), "heads", whole)
      self.k_norm = HeadNorm(cfg.norm_epsilon, (K, H), "kv_heads", whole)
    if cfg.learned_sinks:
      zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("heads",))
      self.sinks = self.param("sinks", zeros, (N,), jnp.float32)

  def keys_values(
    self, x_BSD: jax.Array, cos_sin: CosSin | None = None
  ) -> tuple[jax.Array, jax.Array]:
    """Keys and values (B, S, K, H) of what is attended to."""
    k_BSKH, v_BSKH = self.k(x_BSD), self.v(x_BSD)
    if self.cfg.qk_norm != "none":
      k_BSKH = self.k_norm(k_BSKH)
    if cos_sin is not None:
      k_BSKH = rotate(k_BSKH, cos_sin)
    names = ("batch", "key_length", "act_kv_heads", "head_dim")
    return constrain(k_BSKH, *names), constrain(v_BSKH, *names)

  def __call__(
    self,
    x_BTD: jax.Array,
    sight: Sight,
    keys_values: tuple[Any, Any],
    reach: Reach | None = None,
    cached: bool = False,
    capture: bool = False,
  ) -> tuple[jax.Array, jax.Array | None]:
    """Returns (B, T, D), and if `capture` the weights (B, N, T, S).

    Keys and values are (B, S, K, H), or as a cache has them, (B, K, S, H). Whole rows, as
    in training, and prompts take the path of `choose_path`; who wants to see the weights,
    `attend`.
    """
    q_BTNH = self.q(x_BTD)
    if self.cfg.qk_norm != "none":
      q_BTNH = self.q_norm(q_BTNH)
    if sight.cos_sin is not None:
      q_BTNH = rotate(q_BTNH, sight.cos_sin)
    q_BTNH = constrain(q_BTNH, "batch", "length", "act_heads", "head_dim")
    k, v = (widened(x, self.run.dtype) for x in keys_values)
    scoring = Scoring(self.cfg.attention_scale, self.cfg.attention_softcap)
    sinks_N = self.sinks if self.cfg.learned_sinks else None
    weights_BNTS = None
    if capture:
      k, v = (x.swapaxes(1, 2) if cached else x for x in (k, v))
      out_BTNH, weights_BNTS = attend(q_BTNH, k, v, sight, scoring, sinks_N)
    elif cached and self.cached_path(q_BTNH, k) == "cudnn":
      k_BSKH, v_BSKH = k.swapaxes(1, 2), v.swapaxes(1, 2)
      out_BTNH = attend_cudnn(q_BTNH, k_BSKH, v_BSKH, sight, scoring)
    elif cached:
      out_BTNH = attend_cached(q_BTNH, k, v, sight, scoring, sinks_N)
    elif self.run.attention == OUTLINE:
      out_BTNH = attend_outline(q_BTNH, k, v)
    elif not self.is_initializing() and self.path_of(q_BTNH, k) == "cudnn":
      out_BTNH = attend_cudnn(q_BTNH, k, v, sight, scoring, reach)
    else:
      out_BTNH = attend_blocked(q_BTNH, k, v, sight, scoring, sinks_N, reach)
    return self.o(out_BTNH), weights_BNTS

  def path_of(self, q_BTNH: jax.Array, k_BSKH: jax.Array) -> str:
    return path_here(self.cfg, self.run, (q_BTNH.shape[1], k_BSKH.shape[1])).name

  def cached_path(self, q_BTNH: jax.Array, k_BKSH: jax.Array) -> str:
    """Prompts take the kernel where it can; how a run was trained decides nothing here, as
    it may answer elsewhere."""
    lengths = q_BTNH.shape[1], k_BKSH.shape[2]
    if lengths[0] < PROMPT or self.run.attention == "blocked":
      return "blocked"
    run = dataclasses.replace(self.run, attention="auto")
    return path_here(self.cfg, run, lengths).name


class HeadNorm(nn.Module):
  """RMSNorm of queries or keys, of each head alone or of all heads at once.

  Of each head: Dehghani et al. (2023), section 2; over the width: OLMo 2.
  """

  epsilon: float
  shape: tuple[int, int]
  heads_name: str
  over_width: bool

  @nn.compact
  def __call__(self, x_BTNH: jax.Array) -> jax.Array:
    names = (self.heads_name, "head_dim") if self.over_width else ("head_dim",)
    ones = nn.with_logical_partitioning(nn.initializers.ones, names)
    scale = self.param("scale", ones, self.shape[-len(names) :], jnp.float32)
    x = x_BTNH.astype(jnp.float32)
    dims = (-2, -1) if self.over_width else -1
    x *= jax.lax.rsqrt(jnp.mean(x * x, dims, keepdims=True) + self.epsilon)
    return (x * scale).astype(x_BTNH.dtype)
