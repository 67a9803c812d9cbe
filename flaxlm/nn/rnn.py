# SPDX-License-Identifier: Apache-2.0
"""Recurrent language models, the transformer's predecessors: a state carries the past.

Layers are LSTMs (Hochreiter & Schmidhuber, 1997) or GRUs (Cho et al., 2014), made of the
cells of `flax.linen`. Each reads the normalised residual stream and adds to it. The state
is reset where a document begins, and padding does not change it.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from flaxlm.config import ResolvedModel
from flaxlm.nn.base import LanguageModel, Output
from flaxlm.nn.cache import put_rows
from flaxlm.nn.execution import Execution, run_layers, stacked_class, with_remat
from flaxlm.nn.layers import Dropout, build_norm
from flaxlm.sharding import (
  axis_sizes_in_use,
  constrain,
  cutting_axes,
  on_members,
  partition_spec,
)

STATE_NAMES = (None, "batch", "act_embed")


class RNNCache(NamedTuple):
  """The state after the tokens so far, and their number; used like a `KVCache`.

  `state` is (c, h) for LSTMs and h for GRUs, each (L, B, D). It is always in float32,
  because it accumulates small steps.
  """

  state: Any
  lengths_B: jax.Array

  def take(self, rows_R: jax.Array) -> "RNNCache":
    """The state of these rows, in this order."""
    state = jax.tree.map(lambda x_LBD: x_LBD[:, rows_R], self.state)
    return RNNCache(state, self.lengths_B[rows_R])

  def put(self, rows: "RNNCache", rows_R: jax.Array) -> "RNNCache":
    """The state with `rows` in place of its rows `rows_R`."""
    put = lambda old_LBD, new_LRD: put_rows(old_LBD, new_LRD, rows_R, dim=1)
    state = jax.tree.map(put, self.state, rows.state)
    lengths_B = put_rows(self.lengths_B, rows.lengths_B, rows_R)
    return RNNCache(state, lengths_B).constrained()

  def constrained(self) -> "RNNCache":
    """The same state, in its one layout on a mesh."""
    state = jax.tree.map(lambda x: constrain(x, *STATE_NAMES), self.state)
    return RNNCache(state, constrain(self.lengths_B, "batch"))

  def resized(self, *_: Any, **__: Any) -> "RNNCache":
    return self


def init_rnn_cache(cfg: ResolvedModel, batch: int) -> RNNCache:
  """The state of `batch` rows that have read nothing."""
  zeros_LBD = jnp.zeros((cfg.depth, batch, cfg.width), jnp.float32)
  state = (zeros_LBD, zeros_LBD.copy()) if cfg.cell == "lstm" else zeros_LBD
  return RNNCache(state, jnp.zeros((batch,), jnp.int32))


class Steps(NamedTuple):
  """Which tokens begin a document, and so reset the state, and which are not padding."""

  first_BT: jax.Array
  real_BT: jax.Array


class RNN(LanguageModel):
  """L recurrent layers between an embedding and a head."""

  def setup_body(self) -> None:
    self.dropout = Dropout(self.cfg.dropout)
    blocks = stacked_class(RecurrentBlock, self.cfg.depth, in_axes=(0, nn.broadcast))
    self.blocks = blocks(self.cfg, self.execution)
    self.final_norm = build_norm(self.cfg)

  def hidden(
    self,
    tokens_BT: jax.Array,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    *,
    cache: RNNCache | None = None,
    num_new_B: jax.Array | None = None,
    deterministic: bool = True,
  ) -> Output:
    """The last layer's normalised output (B, T, D), and the new cache.

    Without a cache a row is read from its start, and the state is reset where a packed
    document begins. With a cache the T tokens follow each row's `lengths_B` earlier ones,
    and the first `num_new_B` of them count. `positions_BT` is ignored: only order matters.
    """
    B, T = tokens_BT.shape
    assert cache is None or segments_BT is None, "a cached row is one document"
    steps = Steps(jnp.zeros((B, T), bool), jnp.ones((B, T), bool))
    if segments_BT is not None:  # the numbers of documents increase along a row
      before_BT = jnp.pad(jax.lax.cummax(segments_BT, 1), ((0, 0), (1, 0)))[:, :-1]
      steps = Steps(segments_BT > before_BT, segments_BT > 0)
    elif num_new_B is not None:
      steps = steps._replace(real_BT=jnp.arange(T) < num_new_B[:, None])
    x_BTD = self.dropout(self.embed(tokens_BT), deterministic=deterministic)
    x_BTD = constrain(x_BTD, "batch", "length", "act_embed")
    state = (init_rnn_cache(self.cfg, B) if cache is None else cache).state
    x_BTD, state = self.run_blocks(x_BTD, state, steps, deterministic)
    if cache is not None:
      cache = RNNCache(state, cache.lengths_B + (T if num_new_B is None else num_new_B))
    return Output(self.final_norm(x_BTD), cache, losses={}, attention={})

  def run_blocks(
    self, x_BTD: jax.Array, state: Any, steps: Steps, deterministic: bool
  ) -> tuple[jax.Array, Any]:
    """Runs all layers, each from its own state; the new states are stacked along L."""
    if self.is_initializing():
      return self.blocks(x_BTD, state, steps)
    block = RecurrentBlock(self.cfg, self.execution, parent=None)
    keys_L = None
    if not deterministic:
      keys_L = jax.random.split(self.make_rng("dropout"), self.cfg.depth)

    def layer(x_BTD: jax.Array, inputs: Any) -> tuple[jax.Array, Any]:
      params, state, key = inputs
      rngs = {} if key is None else {"dropout": key}
      return block.apply({"params": params}, x_BTD, state, steps, deterministic, rngs=rngs)

    params, scanned = self.blocks.variables["params"], self.execution.scanned
    layers = [with_remat(layer, self.execution, scanned)] * self.cfg.depth
    return run_layers(layers, 1, scanned, x_BTD, params, state, keys_L)


class RecurrentBlock(nn.Module):
  """x + cell(norm(x)), over all time steps; dropout is outside the loop (Zaremba, 2014)."""

  cfg: ResolvedModel
  execution: Execution

  @nn.compact
  def __call__(
    self, x_BTD: jax.Array, state: Any, steps: Steps, deterministic: bool = True
  ) -> tuple[jax.Array, Any]:
    """The layer's output (B, T, D), and its state after the last real token."""
    cell = build_cell(self.cfg, self.execution)
    h_BTD = build_norm(self.cfg, name="norm")(x_BTD)
    params = self.param("cell", lambda key: cell.init(key, state, h_BTD[:, 0])["params"])
    y_BTD, state = over_mesh(cell, params, h_BTD, state, steps)
    dropout = Dropout(self.cfg.dropout)
    x_BTD = x_BTD + dropout(y_BTD.astype(x_BTD.dtype), deterministic)
    return constrain(x_BTD, "batch", "length", "act_embed"), state


def build_cell(cfg: ResolvedModel, execution: Execution) -> nn.Module:
  """One step of one layer; its kernels, all (D, D), carry logical names."""
  named = nn.with_logical_partitioning
  kinds = {"lstm": nn.OptimizedLSTMCell, "gru": nn.GRUCell}
  return kinds[cfg.cell](
    cfg.width,
    kernel_init=named(nn.initializers.lecun_normal(), ("embed", "hidden")),
    recurrent_kernel_init=named(orthogonal, ("embed", "hidden")),
    bias_init=named(nn.initializers.zeros, ("hidden",)),
    parent=None,
    **execution.dtypes,
  )


def orthogonal(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
  """A random orthogonal matrix, made in float32 because LAPACK has no bfloat16."""
  return nn.initializers.orthogonal()(key, shape, jnp.float32).astype(dtype)


def over_mesh(
  cell: nn.Module, params: Any, x_BTD: jax.Array, state: Any, steps: Steps
) -> tuple[jax.Array, Any]:
  """`over_time` on a mesh: each device has its own rows and all of the layer's kernels.

  A step needs all of h, so the other mesh axes only share the storage of the kernels. These
  are gathered before the loop, and their gradients are summed after it.
  """
  sizes = axis_sizes_in_use()
  axes = cutting_axes("batch")
  if not axes:
    return over_time(cell, params, x_BTD, state, steps)

  def on_device(params, x_BTD, state, steps):
    params = jax.lax.pcast(params, axes, to="varying")
    return over_time(cell, params, x_BTD, state, steps)

  rows = partition_spec(("batch",), x_BTD.shape[:1], {axis: sizes[axis] for axis in axes})
  whole = PartitionSpec()
  on_mesh = on_members(on_device, (whole, rows, rows, rows), (rows, rows))
  return on_mesh(params, x_BTD, state, steps)


def over_time(
  cell: nn.Module, params: Any, x_BTD: jax.Array, state: Any, steps: Steps
) -> tuple[jax.Array, Any]:
  """Runs the cell from token to token: its outputs (B, T, D), and the last state."""

  def step(state: Any, now: Any) -> tuple[Any, jax.Array]:
    x_BD, first_B, real_B = now
    where = lambda mask_B, yes, no: jnp.where(mask_B[:, None], yes, no)
    state = jax.tree.map(functools.partial(where, first_B, 0), state)
    after, y_BD = cell.apply({"params": params}, state, x_BD)
    return jax.tree.map(functools.partial(where, real_B), after, state), y_BD

  by_time = jax.tree.map(lambda x: x.swapaxes(0, 1), (x_BTD, *steps))
  state, y_TBD = jax.lax.scan(step, state, by_time)
  return y_TBD.swapaxes(0, 1), state
