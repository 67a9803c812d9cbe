# SPDX-License-Identifier: Apache-2.0
"""Parameters laid out for decoding: the same numbers, where the loop reads them once.

Each layer has arrays of its own, since a slice of a stacked one is a copy at every token.
Each projection is one matrix (inputs, outputs): XLA's CPU compiler fuses a reshape into
the product, which then runs on one core. A tied embedding is kept as the head's matrix.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from flaxlm.config import ModelConfig

# Projections, and how many dims of their kernel are contracted.
PROJECTIONS = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1, "head": 1}


KINDS = ("float32", "bfloat16", "int8")


def prepare_params(params: Any, cfg: ModelConfig, kind: str | None = None) -> Any:
  """The parameters as `generate` reads them fastest; a copy, made leaf by leaf.

  `kind` is what matrices are kept as, None for what they are. int8 has a scale for each
  output, and experts are not matrices: they stay. Norms and biases always do.
  """
  assert kind is None or kind in KINDS
  if is_prepared(params):
    return params
  prepared = {}
  for path, leaf in flatten_dict(params).items():
    shape = leaf.shape
    if "blocks" in path:
      shape = shape[1:]
    if path[-1] == "kernel" and path[-2] in PROJECTIONS and "experts" not in path:
      path = (*path[:-1], "matrix")
      inputs = math.prod(shape[: PROJECTIONS[path[-2]]])
      shape = (inputs, math.prod(shape) // inputs)
    if "blocks" in path:
      layer = path.index("blocks") + 1
      for n, part in enumerate(slice_layers(leaf, shape)):
        prepared[(*path[:layer], str(n), *path[layer:])] = part
    elif path == ("embedding", "table") and cfg.tied_embeddings:
      prepared["embedding", "matrix"] = transpose(leaf)
    else:
      prepared[path] = leaf.reshape(shape)
  for path in [path for path in prepared if path[-1] == "matrix"]:
    if kind == "int8":
      prepared[path], prepared[(*path[:-1], "scale")] = quantise(prepared[path])
    elif kind is not None:
      prepared[path] = prepared[path].astype(kind)
  return unflatten_dict(prepared)


@jax.jit
def quantise(matrix_IO: jax.Array) -> tuple[jax.Array, jax.Array]:
  """int8 of each output's own scale: its largest weight is 127 of it."""
  matrix_IO = matrix_IO.astype(jnp.float32)
  scale_O = jnp.maximum(jnp.abs(matrix_IO).max(0), 1e-30) / 127
  return jnp.round(matrix_IO / scale_O).astype(jnp.int8), scale_O


def is_prepared(params: Any) -> bool:
  return "0" in params.get("decoder", params)["blocks"]


@functools.partial(jax.jit, static_argnames="shape")
def slice_layers(stacked: jax.Array, shape: tuple[int, ...]) -> list[jax.Array]:
  return [of_layer.reshape(shape) for of_layer in stacked]


transpose = jax.jit(jnp.transpose)
