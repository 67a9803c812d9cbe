# SPDX-License-Identifier: Apache-2.0
"""Parameters laid out for decoding: the same numbers, where the loop reads them once.

Each layer has arrays of its own, since a slice of a stacked one is a copy at every token.
Each projection is one matrix (outputs, inputs): XLA's CPU compiler fuses a reshape into
the product, which then runs on one core. A tied embedding is such a matrix as it is.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from flaxlm.config import ResolvedModel

# Projections, and how many dims of their kernel are contracted.
PROJECTIONS = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1, "head": 1}


KINDS = ("float32", "bfloat16", "int8")


def prepare_params(params: Any, cfg: ResolvedModel, kind: str | None = None) -> Any:
  """The parameters as `generate` reads them fastest; a copy, made leaf by leaf.

  `kind` is what matrices are kept as, None for what they are. int8 has a scale for each
  output, and experts are not matrices: they stay. Norms and biases always do.
  """
  assert kind is None or kind in KINDS
  if is_prepared(params):
    return params
  prepared = {}
  for path, leaf in flatten_dict(params).items():
    inputs = 0  # dims, of a matrix
    if path[-1] == "kernel" and path[-2] in PROJECTIONS and "experts" not in path:
      path, inputs = (*path[:-1], "matrix"), PROJECTIONS[path[-2]]
    elif path == ("embedding", "table") and cfg.tied_embeddings:
      path = ("embedding", "matrix")
    if "blocks" in path:
      layer = path.index("blocks") + 1
      for n, part in enumerate(lay_out_layers(leaf, inputs)):
        prepared[(*path[:layer], str(n), *path[layer:])] = part
    else:
      prepared[path] = lay_out(leaf, inputs)
  for path in [path for path in prepared if path[-1] == "matrix"]:
    if kind == "int8":
      prepared[path], prepared[(*path[:-1], "scale")] = quantise(prepared[path])
    elif kind is not None:
      prepared[path] = prepared[path].astype(kind)
  return unflatten_dict(prepared)


@jax.jit
def quantise(matrix_OI: jax.Array) -> tuple[jax.Array, jax.Array]:
  """int8 of each output's own scale: its largest weight is 127 of it."""
  matrix_OI = matrix_OI.astype(jnp.float32)
  scale_O1 = jnp.maximum(jnp.abs(matrix_OI).max(1, keepdims=True), 1e-30) / 127
  return jnp.round(matrix_OI / scale_O1).astype(jnp.int8), scale_O1[:, 0]


def is_prepared(params: Any) -> bool:
  return "0" in params.get("decoder", params)["blocks"]


@functools.partial(jax.jit, static_argnames="inputs")
def lay_out(leaf: jax.Array, inputs: int) -> jax.Array:
  """A kernel as (outputs, inputs), its first `inputs` dims being contracted; 0: as is."""
  if not inputs:
    return leaf
  return leaf.reshape(math.prod(leaf.shape[:inputs]), -1).T


@functools.partial(jax.jit, static_argnames="inputs")
def lay_out_layers(stacked: jax.Array, inputs: int) -> list[jax.Array]:
  return [lay_out(of_layer, inputs) for of_layer in stacked]
