# SPDX-License-Identifier: Apache-2.0
"""Reads and writes checkpoints in Hugging Face's layout: config.json and safetensors.

Tensors go one at a time from the file to their shards, and back. Arrays stacked over layers
are filled on the devices, slice by slice, so that the host never holds more than one
tensor. Nothing is guessed: a missing, unexpected or misshapen tensor is an error, and so is
a config that the other side cannot express.
"""

import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flaxlm.config import ResolvedModel, TrainingConfig
from flaxlm.errors import CheckpointError
from flaxlm.interop.families import find_family
from flaxlm.interop.family import Family, read_config
from flaxlm.interop.layouts import Shape
from flaxlm.interop.safetensors import (
  DTYPES,
  Tensor,
  is_finite,
  open_checkpoint,
  write_files,
)
from flaxlm.interop.values import Values, read_json, shortened
from flaxlm.nn.models import abstract_params, boxed_shapes, build_model
from flaxlm.sharding import mesh_for, whole_sizes

CONFIG = "config.json"
MAX_LISTED = 8  # names in an error's list


class Loaded(NamedTuple):
  """A Hugging Face checkpoint as a model of ours."""

  cfg: ResolvedModel
  params: Any  # sharded over the mesh
  dtype: str  # of the parameters
  family: Family
  note: str = ""  # for the user, where the parameters take more than the checkpoint

  @property
  def num_parameters(self) -> int:
    return sum(array.size for array in jax.tree.leaves(self.params))


# -- From Hugging Face ---------------------------------------------------------------------


def load_checkpoint(folder: Path, mesh: Mesh, dtype: str | None = None) -> Loaded:
  """The model in `folder`, its parameters on `mesh`.

  `dtype` of the parameters is float32 or bfloat16. None keeps bfloat16 where all matrices
  are stored in it, and else takes float32, which holds the values of any: then the result
  has a note of the cost. Norms are always float32. A vocabulary that the mesh does not
  divide is padded. Raises `CheckpointError` for a checkpoint that is damaged or not
  supported.
  """
  values = read_json(folder / CONFIG)
  find_family(values.get("model_type"), str(folder / CONFIG))
  if values.get("quantization_config") is not None:
    raise CheckpointError(
      f"{folder} is quantized", "import the weights before quantization"
    )
  return load_tensors(values, str(folder / CONFIG), open_checkpoint(folder), mesh, dtype)


def load_tensors(
  values: dict[str, Any],
  origin: str,
  tensors: Mapping[str, Tensor],
  mesh: Mesh,
  dtype: str | None = None,
) -> Loaded:
  """The model of a config.json's `values` and of tensors by Hugging Face's names.

  `origin` names the config in errors; for the rest see `load_checkpoint`.
  """
  family = find_family(values.get("model_type"), origin)
  cfg = read_config(family, Values(values, origin, tensors))
  check_sizes(cfg, tensors, origin)
  mesh = mesh_for(mesh, cfg)
  cfg = cfg.padded(whole_sizes(mesh.shape)["tensor"])
  abstract = flat_params(cfg, mesh, dtype or "bfloat16")
  shapes = real_shapes(cfg, abstract)
  expected = family.expected(cfg, shapes)
  wanted = {name: shape for name, (_, _, shape) in expected.items()}
  found = match(family, tensors, wanted, origin)
  note = ""
  if dtype is None:
    narrow = {path for path, x in abstract.items() if x.dtype == jnp.bfloat16}
    matrices = [n for n, (row, *_) in expected.items() if not narrow.isdisjoint(row.ours)]
    dtype, note = dtype_of([found[name] for name in matrices])
    abstract = flat_params(cfg, mesh, dtype)
  params: dict[str, jax.Array] = {}
  for name, (row, place, _) in expected.items():
    inner = [shapes[path][row.stacked :] for path in row.ours]
    arrays = row.layout.to_ours(read_finite(found[name], name), inner)
    for path, array in zip(row.ours, arrays, strict=True):
      whole = abstract[path].shape[row.stacked :]
      params[path] = put(params.get(path), abstract[path], zero_padded(array, whole), place)
  return Loaded(cfg, unflatten_dict(params, sep="/"), dtype, family, note)


def check_sizes(cfg: ResolvedModel, tensors: Mapping[str, Tensor], path: str) -> None:
  """Raises `CheckpointError` if a size in the config cannot be one of the tensors'.

  What does not fit is found later, by name; but only to describe a model of such a size
  would take minutes and gigabytes.
  """
  most = max((math.prod(tensor.shape) for tensor in tensors.values()), default=0)
  sizes = {
    "the vocabulary": cfg.vocab_size,
    "the width": cfg.width,
    "all heads together": cfg.num_heads * cfg.head_dim,
    "a feed-forward": cfg.moe.expert_width if cfg.moe.num_experts else cfg.ffn_width,
    "the position table": cfg.context if cfg.positions == "learned" else 0,
    "the table of distances": cfg.relative_buckets if cfg.positions == "relative" else 0,
    "the table of token types": cfg.num_token_types,
  }
  for name, size in sizes.items():
    if size > most:
      raise CheckpointError(
        f"{path}: {name} of {size:,} is larger than any of the tensors",
        "the config is damaged, or that of another checkpoint",
      )


def flat_params(cfg: ResolvedModel, mesh: Mesh, dtype: str) -> dict[str, Any]:
  """The shape, dtype and sharding of every parameter, by its path."""
  model = build_model(cfg, TrainingConfig(dtype=dtype, param_dtype=dtype))  # type: ignore[arg-type]
  return flatten_dict(abstract_params(model, mesh), sep="/")


def dtype_of(matrices: list[Tensor]) -> tuple[str, str]:
  """The dtype that holds all of `matrices`, and a line about it if it takes more bytes."""
  matrices = [tensor for tensor in matrices if tensor.is_readable]  # others are refused
  kinds = sorted({tensor.dtype for tensor in matrices})
  if kinds == ["BF16"]:
    return "bfloat16", ""
  stored = sum(tensor.num_bytes for tensor in matrices)
  taken = sum(4 * math.prod(tensor.shape) for tensor in matrices)
  if taken <= stored:
    return "float32", ""
  names = " and ".join(DTYPES[kind].name if kind in DTYPES else kind for kind in kinds)
  return "float32", (
    f"weights stored as {names} become float32: {taken / 1e9:.3g} GB for "
    f"{stored / 1e9:.3g} GB; --dtype bfloat16 takes {taken / 2e9:.3g} GB, and rounds"
  )


def read_finite(tensor: Tensor, name: str) -> np.ndarray:
  """The values of a tensor. Raises `CheckpointError` for NaN and infinity among them."""
  values = tensor.read()
  if not is_finite(values):
    raise CheckpointError(
      f"{tensor.path}: {name} has values that are NaN or infinite",
      "the checkpoint is damaged, or its training had diverged: get another",
    )
  return values


def real_shapes(cfg: ResolvedModel, flat: Mapping[str, Any]) -> dict[str, Shape]:
  """The shapes of parameters without the padding of the vocabulary, as a checkpoint has
  them."""
  if not cfg.is_padded:
    return {path: array.shape for path, array in flat.items()}
  real = flatten_dict(nn.unbox(boxed_shapes(build_model(cfg.unpadded))), sep="/")
  return {path: real[path].shape for path in flat}


def zero_padded(array: np.ndarray, shape: Shape) -> np.ndarray:
  """`array` with zeros at the end of each dim, up to `shape`."""
  missing = [(0, n - m) for n, m in zip(shape, array.shape, strict=True)]
  return np.pad(array, missing) if array.shape != shape else array


def match(
  family: Family, tensors: Mapping[str, Tensor], expected: Mapping[str, Shape], origin: str
) -> dict[str, Tensor]:
  """The tensor of each expected name.

  Raises `CheckpointError`, with lists of the missing, unexpected and misshapen ones.
  """
  found: dict[str, Tensor] = {}
  unexpected = []
  twins = dict(family.tied)
  for given, tensor in tensors.items():
    name = given
    for older, newer in family.renamed:
      name = name.removesuffix(older) + newer if name.endswith(older) else name
    for candidate in (name, family.prefix + name):
      if candidate in expected or candidate in twins:
        if candidate in found:
          raise CheckpointError(
            f"{tensor.path}: {candidate} is there twice, once as {shortened(given)}"
          )
        found[candidate] = tensor
        break
    else:
      if not family.ignores(name):
        unexpected.append(given)
  for twin, target in family.tied:
    if twin in found and twin not in expected:
      other = found.pop(twin)
      same = found.setdefault(target, other)
      if same.shape != other.shape or (same.read() != other.read()).any():
        raise CheckpointError(
          f"{other.path}: {twin} is not {target}, to which the config ties it",
          "if they are meant to differ, set tie_word_embeddings: false in config.json",
        )
  missing = [name for name in expected if name not in found]
  misshaped = [
    f"{name} is {list(found[name].shape)}, not {list(shape)}"
    for name, shape in expected.items()
    if name in found and found[name].shape != shape
  ]
  lists = {"missing": missing, "unexpected": unexpected, "wrong shape": misshaped}
  if any(lists.values()):
    text = "; ".join(f"{title}: {some(names)}" for title, names in lists.items() if names)
    raise CheckpointError(f"the tensors do not fit {origin}: {text}")
  return found


def some(names: list[str]) -> str:
  """The first names of a list, and the number of others."""
  more = len(names) - MAX_LISTED
  return ", ".join(map(shortened, names[:MAX_LISTED])) + (
    f" and {more} more" if more > 0 else ""
  )


def put(
  whole: jax.Array | None,
  target: jax.ShapeDtypeStruct,
  part: np.ndarray,
  place: tuple[int, ...],
) -> jax.Array:
  """`whole` (None: zeros) with `part` written at the index `place` of its leading dims.

  All of it stays on the devices, sharded like `target`.
  """
  sharding = target.sharding
  assert isinstance(sharding, NamedSharding)
  stacked = len(place)
  inner = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[stacked:]))
  of_shard = lambda at: np.asarray(part[at], target.dtype, order="C")
  array = jax.make_array_from_callback(part.shape, inner, of_shard)
  if not stacked:
    return array
  if whole is None:
    whole = _zeros(target.shape, target.dtype, sharding)
  return _filler(sharding, stacked)(whole, array, np.array(place, np.int32))


def _zeros(shape: Shape, dtype: Any, sharding: NamedSharding) -> jax.Array:
  return jax.jit(functools.partial(jnp.zeros, shape, dtype), out_shardings=sharding)()


@functools.cache
def _filler(sharding: NamedSharding, stacked: int) -> Callable:
  """A jitted function that writes one slice of a stacked array in place."""

  def fill(whole: jax.Array, part: jax.Array, place: jax.Array) -> jax.Array:
    start = (*place, *[0] * part.ndim)
    return jax.lax.dynamic_update_slice(whole, part[(None,) * stacked], start)

  return jax.jit(fill, donate_argnums=0, out_shardings=sharding)


# -- To Hugging Face -----------------------------------------------------------------------


class Export(NamedTuple):
  """A model of ours as a family has it."""

  keys: dict[str, Any]  # of config.json
  shapes: dict[str, Shape]  # of each tensor, by its name
  read: Callable[[str], np.ndarray]  # the tensor of a name, on the host


def save_checkpoint(
  folder: Path, cfg: ResolvedModel, params: Any, family: Family, dtype: str, most: int
) -> dict[str, Any]:
  """Writes safetensors files of at most `most` bytes; returns the keys of config.json.

  Raises `CheckpointError` where `family` cannot express the model.
  """
  keys, shapes, read = describe(cfg, params, family)
  write_files(folder, shapes, jnp.dtype(dtype), most, read)
  return keys | {"torch_dtype": dtype}


def describe(cfg: ResolvedModel, params: Any, family: Family) -> Export:
  """How `family` has a model; no tensor is read yet.

  Raises `CheckpointError` where `family` cannot express the model.
  """
  flat = flatten_dict(params, sep="/")
  ours = real_shapes(cfg, flat)
  cfg = cfg.unpadded
  expected = family.expected(cfg, ours)
  headless = cfg.family == "encoder" and not cfg.head_transform
  keys = family.keys(cfg, tuple(expected))
  keys["architectures"] = [family.architectures[headless]]

  def read(name: str) -> np.ndarray:
    row, place, _ = expected[name]
    real = lambda path: tuple(slice(dim) for dim in ours[path][row.stacked :])
    return row.layout.to_theirs([slice_at(flat[p], place)[real(p)] for p in row.ours])

  return Export(keys, {name: shape for name, (_, _, shape) in expected.items()}, read)


def slice_at(whole: jax.Array | np.ndarray, place: tuple[int, ...]) -> np.ndarray:
  """The slice at the index `place` of the leading dims, on the host."""
  if not place or isinstance(whole, np.ndarray):
    return np.asarray(whole[place])
  return np.asarray(_slicer(len(place))(whole, np.array(place, np.int32)))


@functools.cache
def _slicer(stacked: int) -> Callable:
  def part(whole: jax.Array, place: jax.Array) -> jax.Array:
    start = (*place, *[0] * (whole.ndim - stacked))
    sizes = (*[1] * stacked, *whole.shape[stacked:])
    return jax.lax.dynamic_slice(whole, start, sizes).reshape(whole.shape[stacked:])

  return jax.jit(part)
