# SPDX-License-Identifier: Apache-2.0
"""Attention over long rows on a CPU: the scores of a head stay in a processor's cache.

Equal to `nn.attention.attend`. As in Dao et al. (2022), only the logarithm of each sum is
kept, and the backward pass computes the scores again. Unlike a GPU's kernel it takes one
head of one row after the other; the products of each use all processors.

Scores have keys first, (S, C), where C are the queries of all heads that share the keys: so
no product reads a transposed array of their size (docs/LOG.md).
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flaxlm.nn.kernels.fusion import unfused
from flaxlm.nn.kernels.products import turned
from flaxlm.nn.masks import LOWEST, Band, Reach, Scoring, Sight

QUERIES = 128  # of a tile: its scores with 1,024 keys are half a MiB
MOST_TILES = 16  # of a row; more would compile longer


class Tile(NamedTuple):
  """A range of queries, and the range of the keys that they can see."""

  queries: slice
  keys: slice


class Form(NamedTuple):
  """What is hidden: by the distance of keys (`band`) and by segments, or by a mask."""

  reach: Reach | None
  band: Band | None  # None: by a mask alone


# Of B rows, or of one for all: segments of queries (B, T) and of keys (B, S), a mask with
# keys first (B, S, T), or nothing.
Marks = tuple[jax.Array, ...]


def attend_tiled(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  sight: Sight,
  scoring: Scoring,
) -> jax.Array:
  """The values of `attend` (B, T, N, H), without a bias, a soft cap or learned sinks.

  A mask that has a pattern is computed, and not read.
  """
  B, T, N, H = q_BTNH.shape
  K = k_BSKH.shape[2]
  q_BTKGH = (q_BTNH * scoring.scale).reshape(B, T, K, N // K, H)
  q_XGTH = q_BTKGH.transpose(0, 2, 3, 1, 4).reshape(B * K, N // K, T, H)
  k_XSH, v_XSH = (x.swapaxes(1, 2).reshape(B * K, -1, H) for x in (k_BSKH, v_BSKH))
  out_XGTH = mix_heads(*hidden_by(sight), q_XGTH, k_XSH, v_XSH)
  return out_XGTH.reshape(B, K * (N // K), T, H).swapaxes(1, 2)


def hidden_by(sight: Sight) -> tuple[Form, Marks]:
  if (pattern := sight.pattern) is not None:
    return Form(sight.reach, Band.of(pattern)), pattern.segments or ()
  mask_BTS = sight.mask_BTS
  return Form(sight.reach, None), () if mask_BTS is None else (mask_BTS.swapaxes(1, 2),)


def tiles(reach: Reach | None, num_queries: int, num_keys: int) -> Iterator[Tile]:
  count = max(1, min(MOST_TILES, num_queries // QUERIES))
  for n in range(count):
    start, end = num_queries * n // count, num_queries * (n + 1) // count
    first = 0 if reach is None or reach.window is None else max(0, start - reach.window + 1)
    yield Tile(slice(start, end), slice(first, end if reach else num_keys))


def scores_of(
  form: Form, marks: Marks, tile: Tile, q_GTH: jax.Array, k_SH: jax.Array
) -> jax.Array:
  """The scores (S, C) of a tile in float32, `LOWEST` where a key is hidden."""
  q_CH = columns(q_GTH, tile)
  scores_SC = product("SH,CH->SC", k_SH[tile.keys], q_CH)
  seen_ST = visible_in(form, marks, tile)
  if seen_ST is None:
    return scores_SC
  scores_SGT = scores_SC.reshape(len(scores_SC), len(q_GTH), -1)
  return jnp.where(seen_ST[:, None], scores_SGT, LOWEST).reshape(scores_SC.shape)


def visible_in(form: Form, marks: Marks, tile: Tile) -> jax.Array | None:
  """Which queries of a tile see which of its keys (S, T); None: all see all."""
  if form.band is None:
    return marks[0][tile.keys, tile.queries] if marks else None
  seen = []
  if not form.band.is_all:
    sides = tile.keys, tile.queries
    shape = [side.stop - side.start for side in sides]
    keys_ST, queries_ST = (
      side.start + jax.lax.broadcasted_iota(jnp.int32, shape, dim)
      for dim, side in enumerate(sides)
    )
    seen.append(form.band(queries_ST, keys_ST))
  if marks:
    queries_T, keys_S = marks
    seen.append(keys_S[tile.keys, None] == queries_T[None, tile.queries])
  return functools.reduce(jnp.logical_and, seen) if seen else None


def columns(x_GTH: jax.Array, tile: Tile) -> jax.Array:
  """The queries of a tile, of all G heads (C, H)."""
  return x_GTH[:, tile.queries].reshape(-1, x_GTH.shape[-1])


def product(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
  return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def each_head(function: Callable, marks: Marks, *arrays: jax.Array) -> Any:
  """`function(marks, *arrays)` of one kv head of one row after the other."""
  heads = arrays[0].shape[0]

  def one(numbered: tuple[jax.Array, tuple[jax.Array, ...]]) -> Any:
    n, of_head = numbered
    own = unfused(lambda n: tuple(x[n * len(x) // heads] for x in marks))(n)
    return function(own, *of_head)

  return jax.lax.map(one, (jnp.arange(heads), arrays))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def mix_heads(
  form: Form, marks: Marks, q_XGTH: jax.Array, k_XSH: jax.Array, v_XSH: jax.Array
) -> jax.Array:
  """softmax(q k^T) v of X = B K heads, of the keys that are visible."""
  return mix_forward(form, marks, q_XGTH, k_XSH, v_XSH)[0]


def mix_forward(
  form: Form, marks: Marks, q_XGTH: jax.Array, k_XSH: jax.Array, v_XSH: jax.Array
) -> tuple[jax.Array, tuple]:
  def forward(
    marks: Marks, q_GTH: jax.Array, k_SH: jax.Array, v_SH: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    outs, logs = [], []
    G, T, H = q_GTH.shape
    v_HS = turned(v_SH)
    for tile in tiles(form.reach, T, len(k_SH)):
      scores_SC = scores_of(form, marks, tile, q_GTH, k_SH)
      max_C = scores_SC.max(0)
      exp_SC = jnp.exp(scores_SC - max_C)
      sum_C = exp_SC.sum(0)
      out_HC = product("HS,SC->HC", v_HS[:, tile.keys], exp_SC.astype(v_SH.dtype)) / sum_C
      outs.append(turned(out_HC).astype(v_SH.dtype).reshape(G, -1, H))
      logs.append((max_C + jnp.log(sum_C)).reshape(G, -1))
    return jnp.concatenate(outs, 1), jnp.concatenate(logs, 1)

  out_XGTH, log_XGT = each_head(forward, marks, q_XGTH, k_XSH, v_XSH)
  return out_XGTH, (marks, q_XGTH, k_XSH, v_XSH, out_XGTH, log_XGT)


def mix_backward(form: Form, residuals: tuple, grad_XGTH: jax.Array) -> tuple:
  marks, q_XGTH, k_XSH, v_XSH, out_XGTH, log_XGT = residuals
  delta_XGT = (grad_XGTH * out_XGTH).astype(jnp.float32).sum(-1)

  def backward(
    marks: Marks,
    q_GTH: jax.Array,
    k_SH: jax.Array,
    v_SH: jax.Array,
    grad_GTH: jax.Array,
    log_GT: jax.Array,
    delta_GT: jax.Array,
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    (G, T, H), dtype, grads_q = q_GTH.shape, v_SH.dtype, []
    grad_k, grad_v = jnp.zeros(k_SH.shape), jnp.zeros(v_SH.shape)
    k_HS = turned(k_SH)
    for tile in tiles(form.reach, T, len(k_SH)):
      queries, keys = tile
      q_CH, grad_CH = columns(q_GTH, tile), columns(grad_GTH, tile)
      scores_SC = scores_of(form, marks, tile, q_GTH, k_SH)
      weights_SC = jnp.exp(scores_SC - log_GT[:, queries].reshape(-1))
      of_weights = product("SH,CH->SC", v_SH[keys], grad_CH)
      of_scores = weights_SC * (of_weights - delta_GT[:, queries].reshape(-1))
      weights_SC, of_scores = weights_SC.astype(dtype), of_scores.astype(dtype)
      grad_v = grad_v.at[keys].add(product("SC,CH->SH", weights_SC, grad_CH))
      grad_k = grad_k.at[keys].add(product("SC,CH->SH", of_scores, q_CH))
      grad_HC = product("HS,SC->HC", k_HS[:, keys], of_scores)
      grads_q.append(turned(grad_HC).astype(dtype).reshape(G, -1, H))
    return jnp.concatenate(grads_q, 1), grad_k.astype(dtype), grad_v.astype(dtype)

  arrays = (q_XGTH, k_XSH, v_XSH, grad_XGTH, log_XGT, delta_XGT)
  return None, *each_head(backward, marks, *arrays)


mix_heads.defvjp(mix_forward, mix_backward)
