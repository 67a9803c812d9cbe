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


def prepare_params(params: Any, cfg: ModelConfig) -> Any:
  """The parameters as `generate` reads them fastest; a copy, made leaf by leaf."""
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
  return unflatten_dict(prepared)


def is_prepared(params: Any) -> bool:
  return "0" in params.get("decoder", params)["blocks"]


@functools.partial(jax.jit, static_argnames="shape")
def slice_layers(stacked: jax.Array, shape: tuple[int, ...]) -> list[jax.Array]:
  return [of_layer.reshape(shape) for of_layer in stacked]


transpose = jax.jit(jnp.transpose)
