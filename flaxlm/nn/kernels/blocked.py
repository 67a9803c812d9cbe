# SPDX-License-Identifier: Apache-2.0
"""Attention over whole rows in XLA's operations, in blocks of queries.

Equal to `nn.attention.attend`. It reads only the keys that a block can see under causal
attention or a window, and keeps one array of the scores' size for the backward pass instead
of three: at T=256 on a CPU, forward and backward of a layer took 30 ms instead of 76.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp

from flaxlm.nn.masks import LOWEST, Scoring, Sight
from flaxlm.sharding import constrain, is_cut

Ranges = tuple[tuple[int, int], ...]  # first and one past the last


def attend_blocked(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  sight: Sight,
  scoring: Scoring,
  sinks_N: jax.Array | None = None,
) -> jax.Array:
  """The values of `attend` in blocks of queries, over whole rows.

  A block reads only the keys within `sight.reach`: for causal attention that saves up to
  half of the work, for a window more.

  On a mesh with `context`, every device takes a share of each block, so that all have the
  same work although later queries see more keys.
  """
  B, T, N, H = q_BTNH.shape
  S, K = k_BSKH.shape[1:3]
  queries: Ranges = ((0, T),)
  keys: Ranges = ((0, S),)
  if sight.reach:
    queries = query_blocks(T)
    before = S if sight.reach.window is None else sight.reach.window - 1
    keys = tuple((max(0, start - before), end) for start, end in queries)
  split = cuts(q_BTNH * scoring.scale, queries), cuts(k_BSKH, keys), cuts(v_BSKH, keys)
  sinks_KG = None if sinks_N is None else sinks_N.reshape(K, N // K)
  blocks = []
  for own, seen, q, k, v in zip(queries, keys, *split, strict=True):
    # One matrix per kv head, whose rows are those of its G query heads in turn.
    q_BKGTH = q.reshape(B, -1, K, N // K, H).transpose(0, 2, 3, 1, 4)
    part = lambda x, own=own, seen=seen: (
      None if x is None else x[..., slice(*own), slice(*seen)]
    )
    out_BKGTH = mix(
      scoring.softcap,
      share_out(q_BKGTH),
      k.swapaxes(1, 2),
      v.swapaxes(1, 2),
      part(sight.mask_BTS),
      part(sight.bias_XNTS),
      sinks_KG,
    )
    blocks.append(out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(q.shape))
  return jnp.concatenate(blocks, 1)


def share_out(q_BKGTH: jax.Array) -> jax.Array:
  """A block of queries sharded over `context`; unchanged without that axis."""
  if not is_cut("length"):
    return q_BKGTH
  return constrain(q_BKGTH, "batch", "act_kv_heads", "head_dim", "length", "head_dim")


def query_blocks(num_queries: int) -> Ranges:
  """Up to four ranges of at least 64 queries; more would save little and compile longer."""
  count = max(1, min(4, num_queries // 64))
  edges = [num_queries * i // count for i in range(count + 1)]
  return tuple(itertools.pairwise(edges))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def cuts(x_BTNH: jax.Array, ranges: Ranges) -> list[jax.Array]:
  """Ranges that cover all positions; where they overlap their gradients are added.

  As JAX derives it, each gradient would be padded to all positions first, and rounded after
  each sum.
  """
  return [x_BTNH[:, slice(*bounds)] for bounds in ranges]


def _cuts_backward(ranges: Ranges, _: None, grads: list[jax.Array]) -> tuple[jax.Array]:
  edges, dtype = sorted(set().union(*ranges)), grads[0].dtype
  wide = jnp.promote_types(dtype, jnp.float32)
  pieces = []
  for start, end in itertools.pairwise(edges):
    covering = [
      grad[:, start - first : end - first].astype(wide)
      for grad, (first, last) in zip(grads, ranges, strict=True)
      if first <= start and end <= last
    ]
    pieces.append(functools.reduce(jnp.add, covering).astype(dtype))
  return (jnp.concatenate(pieces, 1),)


cuts.defvjp(lambda x, ranges: (cuts(x, ranges), None), _cuts_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def mix(softcap: float | None, *arguments: Any) -> jax.Array:
  """The output of `mix_forward`, with a backward pass written by hand."""
  return mix_forward(softcap, *arguments)[0]


def mix_forward(
  softcap: float | None,
  q_BKGTH: jax.Array,
  k_BKSH: jax.Array,
  v_BKSH: jax.Array,
  mask_BTS: jax.Array | None,
  bias_XNTS: jax.Array | None,
  sinks_KG: jax.Array | None,
) -> tuple[jax.Array, tuple]:
  """softmax(q k^T + bias) v where the mask allows, and what the backward pass needs.

  The weights stay unnormalised, exp(score - max). Their sum divides the output instead,
  which is S / H times smaller, and likewise its gradient (Dao et al., 2022, appendix B).
  """
  B, K, G, T, H = q_BKGTH.shape
  S = k_BKSH.shape[2]
  # The G heads of a kv head are rows of one matrix. B and K stay two dims: merging them
  # would lose the sharding of the heads over the mesh.
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
  delta_BKR1 = (grad_BKRH * out_BKRH).sum(-1, keepdims=True)  # of the softmax's gradient
  grad_scores_BKRS = exp_BKRS * (grad_exp_BKRS - delta_BKR1)
  grad_bias = grad_sinks = None
  if bias_batch is not None:
    grad_bias = grad_scores_BKRS.astype(jnp.float32).reshape(B, K * G, T, S)
    if bias_batch == 1:
      grad_bias = grad_bias.sum(0, keepdims=True)
  if sinks_BKR1 is not None:  # a sink is a key with a value of 0
    grad_sinks = -(sinks_BKR1 * delta_BKR1).reshape(B, K, G, T).sum((0, 3))
  if softcap is not None:
    grad_scores_BKRS *= (1 - tanh_BKRS * tanh_BKRS).astype(dtype)
  grad_q_BKRH = jnp.einsum("BKRS,BKSH->BKRH", grad_scores_BKRS, k_BKSH)
  grad_k_BKSH = jnp.einsum("BKRS,BKRH->BKSH", grad_scores_BKRS, q_BKRH)
  grad_q_BKGTH = grad_q_BKRH.reshape(grad_BKGTH.shape)
  return grad_q_BKGTH, grad_k_BKSH, grad_v_BKSH, None, grad_bias, grad_sinks


mix.defvjp(mix_forward, mix_backward)
