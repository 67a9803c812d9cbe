# SPDX-License-Identifier: Apache-2.0
"""Parameters laid out for decoding: the same numbers, in the layout that reads fastest.

Each layer has arrays of its own, since a slice of a stacked array is a copy at every token.
Each projection is one matrix (outputs, inputs): with a reshape before the product, XLA's
CPU compiler fuses the two into a loop that runs on one core. A tied embedding is such a
matrix already.
"""

import functools
import math
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from flaxlm.config import ResolvedModel
from flaxlm.errors import ConfigError
from flaxlm.nn.execution import is_split
from flaxlm.nn.kernels.int4 import group_size, packed_int4
from flaxlm.nn.layers import PROJECTIONS
from flaxlm.nn.quantized import narrowed

KINDS = ("float32", "bfloat16", "int8", "int4")
WEIGHTS_KERNELS = ("pallas",)  # of products of a few rows, see nn/kernels/few_rows.py


def check_stored(family: str, weights: str | None, narrow_cache: bool) -> None:
  """Raises `ConfigError` for a family that has no such weights or cache."""
  if family == "rnn" and (weights or narrow_cache):
    raise ConfigError("an RNN has no narrow weights or cache", "leave the flags out")


def prepare_params(params: Any, cfg: ResolvedModel, kind: str | None = None) -> Any:
  """A copy of the parameters, laid out for decoding; made leaf by leaf.

  `kind` is the dtype that matrices are stored in; None keeps theirs. int8 matrices have a
  scale for each output, int4 ones for each group of inputs; with int4, the head and a tied
  embedding are int8, because what they round is the logits themselves. Norms, biases and
  experts, which are no matrices, keep their dtype. Parameters that are laid out already are
  returned as they are; `ValueError` if `kind` asks for another dtype. Raises `ConfigError`
  for int4 of a matrix with an odd number of inputs.
  """
  assert kind is None or kind in KINDS
  if is_laid_out_for_decoding(params):
    if kind is not None:
      raise ValueError(f"the parameters are laid out already: too late for kind={kind!r}")
    return params
  prepared = {}
  for path, leaf in flatten_dict(params).items():
    num_inputs = 0  # contracted dims of a matrix
    if path[-1] == "kernel" and path[-2] in PROJECTIONS and "experts" not in path:
      path, num_inputs = (*path[:-1], "matrix"), PROJECTIONS[path[-2]]
    elif path == ("embedding", "table") and cfg.tied_embeddings:
      path = ("embedding", "matrix")
    if "blocks" in path:
      layer = path.index("blocks") + 1
      for n, part in enumerate(matrices_of_layers(leaf, num_inputs)):
        prepared[(*path[:layer], str(n), *path[layer:])] = part
    else:
      prepared[path] = as_matrix(leaf, num_inputs)
  for path in [path for path in prepared if path[-1] == "matrix"]:
    if kind in ("int8", "int4"):
      in_blocks = "blocks" in path
      narrow = pack if kind == "int4" and in_blocks else quantise
      prepared[path], prepared[(*path[:-1], "scale")] = narrow(prepared[path])
    elif kind is not None:
      prepared[path] = prepared[path].astype(kind)
  return unflatten_dict(prepared)


def is_laid_out_for_decoding(params: Any) -> bool:
  """Whether a model's parameters have been through `prepare_params`."""
  return is_split(params.get("decoder", params)["blocks"])


@functools.partial(jax.jit, static_argnames="num_inputs")
def as_matrix(kernel: jax.Array, num_inputs: int) -> jax.Array:
  """A kernel as (outputs, inputs), if its first `num_inputs` dims are contracted.

  With 0 of them it is no kernel, and returned as it is.
  """
  if not num_inputs:
    return kernel
  return kernel.reshape(math.prod(kernel.shape[:num_inputs]), -1).T


@functools.partial(jax.jit, static_argnames="num_inputs")
def matrices_of_layers(stacked: jax.Array, num_inputs: int) -> list[jax.Array]:
  """`as_matrix` of each layer of a stacked array."""
  return [as_matrix(of_layer, num_inputs) for of_layer in stacked]


@jax.jit
def quantise(matrix_OI: jax.Array) -> tuple[jax.Array, jax.Array]:
  """An int8 matrix and a scale for each output, 1/127 of its largest weight."""
  values_OI, scales_O1 = narrowed(matrix_OI)
  return values_OI, scales_O1[:, 0]


@jax.jit
def pack(matrix_OI: jax.Array) -> tuple[jax.Array, jax.Array]:
  """An int4 matrix, two numbers in a byte, and its scales. `ConfigError` if its inputs
  cannot be paired."""
  if group_size(matrix_OI.shape[1]) == 1:
    raise ConfigError(
      f"weights is 'int4', which needs an even number of inputs, not {matrix_OI.shape[1]}",
      "int8 does not pair them",
    )
  return packed_int4(matrix_OI)
