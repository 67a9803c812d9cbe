# SPDX-License-Identifier: Apache-2.0
"""Sums over the parts of a batch: micro-batch by micro-batch, then once over `data`.

Along `data` the members of a mesh have the same parameters, and gradients of rows of their
own. The compiler would add these up as soon as they are there, in every micro-batch. Here
each member adds up its own, and they are summed at the end; nn/pipeline.py does the same.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from flaxlm.data.objectives import Batch
from flaxlm.sharding import axis_sizes_in_use, sums_once

AXIS = "data"


def accumulate(
  function: Callable,
  num_parts: int,
  params: Any,
  batch: Batch,
  key: jax.Array,
  attention: str | None = None,
  has_dropout: bool = False,
) -> tuple[Any, Any]:
  """Sums `function(params, part, key)`, itself a sum over rows, over parts of the batch.

  `params` are all arrays that it reads besides: a member cannot read what is enclosed. The
  sums over parts are in float32. On a mesh, each member of `data` has them for its own
  rows first, where that sends less; `attention` is the path that the function takes, and
  `has_dropout` whether it drops units.
  """
  sizes = axis_sizes_in_use()
  if not sums_once(sizes, num_parts, attention, has_dropout):
    return accumulate_parts(function, num_parts, params, batch, key)
  # Rows lie over `stage` first (sharding.RULES): each member has some of every stage's.
  grid = sizes.get("stage", 1), sizes[AXIS]

  def on_member(params: Any, batch: Batch, key: jax.Array) -> tuple[Any, Any]:
    batch = jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), batch)
    return sum_members(accumulate_parts(function, num_parts, params, batch, key))

  batch = jax.tree.map(lambda x: x.reshape(*grid, -1, *x.shape[1:]), batch)
  rows, whole = PartitionSpec(None, AXIS), PartitionSpec()
  on_mesh = jax.shard_map(
    on_member,
    in_specs=(whole, rows, whole),
    out_specs=whole,
    axis_names={AXIS},
    check_vma=False,  # with it, every gradient would be summed where it is made
  )
  return on_mesh(params, batch, key)


def sum_members(values: Any) -> Any:
  """Sums over the members of `data`, in float32: narrower ones do not compile on CPUs."""
  total = lambda x: jax.lax.psum(x.astype(jnp.float32), AXIS).astype(x.dtype)
  return jax.tree.map(total, values)


def accumulate_parts(
  function: Callable, num_parts: int, params: Any, batch: Batch, key: jax.Array
) -> tuple[Any, Any]:
  """Sums `function(params, part, key)` over parts of the batch, in float32.

  Part i takes rows i, i + n, i + 2n, ...: each device divides its own rows, and no row
  moves to another device.
  """
  if num_parts == 1:
    return function(params, batch, key)

  def cut(x: jax.Array) -> jax.Array:
    parts = x.reshape(x.shape[0] // num_parts, num_parts, *x.shape[1:])
    return jnp.moveaxis(parts, 1, 0)

  def add(total: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, None]:
    result = function(params, *part)
    return jax.tree.map(lambda t, r: t + r.astype(t.dtype), total, result), None

  parts = jax.tree.map(cut, batch), jax.random.split(key, num_parts)
  shapes = jax.eval_shape(function, params, *jax.tree.map(lambda x: x[0], parts))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
  total, _ = jax.lax.scan(add, zeros, parts)
  return total
