# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters (Hu et al., 2021): W + alpha / rank A B, of which only A and B learn.

The parameters of a model that learns this way are two trees. The *adapters* hold `lora_a`
and `lora_b` of every kernel that is adapted, under the kernel's own path; they alone have
gradients, moments and a checkpoint. The *frozen* tree is everything else: the base's
parameters, the kernels as int8 if asked for, and the constants of the adapters. `combined`
puts the two together, and the model runs with the result (`layers.Einsum`).
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from flaxlm.config import LoraConfig
from flaxlm.errors import ConfigError
from flaxlm.nn.base import LanguageModel
from flaxlm.nn.layers import PROJECTIONS
from flaxlm.nn.models import boxed_shapes
from flaxlm.nn.quantized import narrowed
from flaxlm.sharding import with_shardings

Path = tuple[str, ...]
Boxes = Mapping[Path, nn.LogicallyPartitioned]


def adaptable(boxes: Boxes) -> list[Path]:
  """The kernels of a model that adapters can change: the projections of its blocks."""
  return [
    path
    for path in boxes
    if path[-1] == "kernel"
    and path[-2] in PROJECTIONS
    and "blocks" in path
    and "experts" not in path
  ]


def unadaptable(boxes: Boxes) -> list[str]:
  """The other matrices of a model, as experts, routers, embeddings and heads, by name."""
  ours = adaptable(boxes)
  matrices = [path for path in boxes if path[-1] in {"kernel", "table"}]
  return ["/".join(path[:-1]) for path in matrices if path not in ours]


def adapted(boxes: Boxes, cfg: LoraConfig) -> list[Path]:
  """The kernels that `lora.targets` names. Raises `ConfigError` if it names none."""
  could_be = adaptable(boxes)
  found = [path for path in could_be if re.search(cfg.targets, "/".join(path[:-1]))]
  if not found:
    names = ", ".join("/".join(path[:-1]) for path in could_be) or "none in this family"
    raise ConfigError(
      f"lora.targets={cfg.targets!r} matches no projection", f"there are {names}"
    )
  return found


def boxed_adapters(model: LanguageModel, cfg: LoraConfig) -> Any:
  """Shape, dtype and logical names of each adapter; computes and allocates nothing.

  A has the input dims of its kernel and B the output dims, and both lie as those do.
  """
  boxes = flatten_dict(boxed_shapes(model))
  adapters = {}
  for path in adapted(boxes, cfg):
    box = boxes[path]
    shape, names, dtype = box.value.shape, box.names, box.value.dtype
    split = 1 + PROJECTIONS[path[-2]]
    a, b = (*shape[:split], cfg.rank), (shape[0], cfg.rank, *shape[split:])
    a_names, b_names = (*names[:split], None), (names[0], None, *names[split:])
    adapters[(*path[:-1], "lora_a")] = boxed(a, dtype, a_names)
    adapters[(*path[:-1], "lora_b")] = boxed(b, dtype, b_names)
  return unflatten_dict(adapters)


def boxed_frozen(model: LanguageModel, cfg: LoraConfig) -> Any:
  """Shape, dtype and logical names of everything that does not learn."""
  boxes = flatten_dict(boxed_shapes(model))
  frozen = dict(boxes)
  for path in adapted(boxes, cfg):
    layers = boxes[path].value.shape[:1]
    for name in constants(cfg):
      frozen[(*path[:-1], name)] = boxed(layers, jnp.float32, ("layers",))
  if cfg.base_weights == "int8":
    for path in adaptable(boxes):
      shape, names = boxes[path].value.shape, boxes[path].names
      split = 1 + PROJECTIONS[path[-2]]
      scale, scale_names = (shape[0], *shape[split:]), (names[0], *names[split:])
      frozen[path] = boxed(shape, jnp.int8, names)
      frozen[(*path[:-1], "kernel_scale")] = boxed(scale, jnp.float32, scale_names)
  return unflatten_dict(frozen)


def boxed(shape: tuple, dtype: Any, names: tuple) -> nn.LogicallyPartitioned:
  return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, dtype), names)


def constants(cfg: LoraConfig) -> dict[str, float]:
  """What the model has to know of an adapter, by the name of its leaf."""
  dropout = {"lora_dropout": cfg.dropout} if cfg.dropout else {}
  return {"lora_scale": cfg.alpha / cfg.rank, **dropout}


def abstract_adapters(model: LanguageModel, cfg: LoraConfig, mesh: Mesh) -> Any:
  """Shape, dtype and sharding of each adapter; computes and allocates nothing."""
  return with_shardings(boxed_adapters(model, cfg), mesh)


def abstract_frozen(model: LanguageModel, cfg: LoraConfig, mesh: Mesh) -> Any:
  """Shape, dtype and sharding of what does not learn; computes and allocates nothing."""
  return with_shardings(boxed_frozen(model, cfg), mesh)


def init_adapters(abstract: Any, seed: int) -> Any:
  """New adapters, made on the devices that keep them: A is uniform in +-1 / sqrt(inputs),
  as in PEFT, and B is 0, so that nothing has changed yet."""

  def init(seed: jax.Array) -> Any:
    adapters = {}
    for number, (path, leaf) in enumerate(sorted(flatten_dict(abstract).items())):
      key = jax.random.fold_in(jax.random.key(seed), number)
      if path[-1] == "lora_b":
        adapters[path] = jnp.zeros(leaf.shape, leaf.dtype)
      else:
        limit = math.prod(leaf.shape[1:-1]) ** -0.5
        drawn = jax.random.uniform(key, leaf.shape, jnp.float32, -limit, limit)
        adapters[path] = drawn.astype(leaf.dtype)
    return unflatten_dict(adapters)

  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  return jax.jit(init, out_shardings=shardings)(jnp.uint32(seed))


def freeze(params: Any, abstract: Any, cfg: LoraConfig) -> Any:
  """The frozen tree with the parameters of a base, of which the caller keeps none."""
  flat, values = flatten_dict(params), constants(cfg)
  del params
  frozen = {}
  for path, leaf in flatten_dict(abstract).items():
    scale = (*path[:-1], "kernel_scale")
    if path[-1] in values:
      constant = jnp.full(leaf.shape, values[path[-1]], leaf.dtype)
      frozen[path] = jax.device_put(constant, leaf.sharding)
    elif path in flat and leaf.dtype == jnp.int8:
      shardings = (leaf.sharding, flatten_dict(abstract)[scale].sharding)
      narrow = jax.jit(quantised, static_argnums=1, out_shardings=shardings)
      frozen[path], frozen[scale] = narrow(flat.pop(path), PROJECTIONS[path[-2]])
    elif path in flat:
      frozen[path] = flat.pop(path)
  return unflatten_dict(frozen)


def quantised(kernel: jax.Array, num_inputs: int) -> tuple[jax.Array, jax.Array]:
  """Stacked kernels as int8, and a scale for each output, 1/127 of its largest weight."""
  inputs = tuple(range(1, 1 + num_inputs))
  values, scales = narrowed(kernel, inputs)
  return values, scales.squeeze(inputs)


def combined(frozen: Any, adapters: Any) -> Any:
  """The parameters with which the model runs; without a frozen tree, `adapters` alone."""
  if frozen is None:
    return adapters
  return unflatten_dict(flatten_dict(frozen) | flatten_dict(adapters))


def num_frozen(frozen: Any) -> int:
  """How many parameters of the base there are in a frozen tree, whose other leaves belong
  to adapters and to the form that kernels are stored in."""
  is_own = lambda name: name.startswith("lora_") or name == "kernel_scale"
  return sum(x.size for path, x in flatten_dict(frozen).items() if not is_own(path[-1]))


def has_dropout(frozen: Any) -> bool:
  return frozen is not None and any(
    path[-1] == "lora_dropout" for path in flatten_dict(frozen)
  )


def merged(frozen: Any, adapters: Any, target: Any) -> Any:
  """Plain parameters, like `target`, with which the model computes the same."""
  return jit_merge(target)(combined(frozen, adapters))


def jit_merge(target: Any) -> Callable[[Any], Any]:
  """A compiled function of the `combined` parameters that returns the `merged` ones."""

  def merge(params: Any) -> Any:
    flat = flatten_dict(params)
    params = {}
    for path, leaf in flatten_dict(target).items():
      kernel, module = flat[path], path[:-1]
      if path[-1] == "kernel" and (*module, "kernel_scale") in flat:
        num_inputs = PROJECTIONS[path[-2]]
        scale = jnp.expand_dims(
          flat[(*module, "kernel_scale")], tuple(range(1, 1 + num_inputs))
        )
        kernel = kernel.astype(jnp.float32) * scale
      if path[-1] == "kernel" and (*module, "lora_a") in flat:
        a, b = flat[(*module, "lora_a")], flat[(*module, "lora_b")]
        scale = flat[(*module, "lora_scale")]
        product = jax.vmap(lambda a, b: jnp.tensordot(a, b, 1, precision="highest"))
        change = product(a.astype(jnp.float32), b.astype(jnp.float32))
        change *= scale.reshape(-1, *[1] * (change.ndim - 1))
        kernel = kernel.astype(jnp.float32) + change
      params[path] = kernel.astype(leaf.dtype)
    return unflatten_dict(params)

  shardings = jax.tree.map(lambda leaf: leaf.sharding, target)
  return jax.jit(merge, out_shardings=shardings)
