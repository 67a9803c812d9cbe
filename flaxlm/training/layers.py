# SPDX-License-Identifier: Apache-2.0
"""What each layer does while a run learns: `training.log_layers`.

A step says how large each layer's gradient and update are, and an evaluation how evenly the
experts of each layer are used. All of it is computed beside what a run computes anyway:
without the option, nothing of it is in the programs.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from flaxlm.config import ResolvedModel
from flaxlm.data.objectives import Batch
from flaxlm.nn.base import LanguageModel, Output
from flaxlm.nn.models import unrolled
from flaxlm.nn.moe import MoE, count, route
from flaxlm.training.logprobs import forward

BLOCKS = "blocks"  # holds the parameters of all layers, along a leading dim
LOADS = "expert_loads"  # among the sums of an evaluation: choices (L, E)
# Above so many experts of all layers, only the extremes of each layer are written.
MOST_LOADS = 1024


def layer_sizes(gradient: Any, updates: Any, params: Any) -> dict[str, dict]:
  """{figure: {part: its values}} of each layer, and of each part outside the layers.

  `gradient_norm`: the length of the gradient, before it is clipped. `update_size`: the
  length of the update over that of the parameters. A part that is named `blocks`, or ends
  in it, has a value for each layer (L,); others have one.
  """
  norms = [norms_of(tree) for tree in (gradient, updates, params)]
  tiny = jnp.finfo(jnp.float32).tiny
  ratio = lambda update, param: update / jnp.maximum(param, tiny)
  return {"gradient_norm": norms[0], "update_size": jax.tree.map(ratio, *norms[1:])}


def norms_of(tree: Any) -> dict[str, jax.Array]:
  """{part: the length of all its numbers}; of layers the length of each (L,)."""
  squares: dict[str, jax.Array] = {}
  for path, x in flatten_dict(tree).items():
    is_stacked = BLOCKS in path
    part = path[: path.index(BLOCKS) + 1] if is_stacked else path[:-1] or path
    kept = range(1 if is_stacked else 0, x.ndim)
    total = jnp.square(x.astype(jnp.float32)).sum(tuple(kept))
    name = "/".join(part)
    squares[name] = squares[name] + total if name in squares else total
  return jax.tree.map(jnp.sqrt, squares)


def named_sizes(sizes: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
  """The figures of `layer_sizes` as metrics: `gradient_norm/embedding`, `.../layer_0`."""
  return {
    f"{figure}/{name}": value
    for figure, parts in sizes.items()
    for part, values in sorted(parts.items(), key=lambda item: item[0] != "embedding")
    for name, value in named_layers(part, np.asarray(values, float))
  }


def named_layers(part: str, values: np.ndarray) -> Iterator[tuple[str, float]]:
  """(name, value) of a part or of each of its layers."""
  if values.ndim:
    prefix = part.removesuffix(BLOCKS)
    yield from ((f"{prefix}layer_{n}", float(x)) for n, x in enumerate(values))
  else:
    yield part, float(values)


# -- Experts -------------------------------------------------------------------------------


def forward_with_loads(
  model: LanguageModel, params: Any, batch: Batch
) -> tuple[Output, jax.Array]:
  """The model's output, and how often each expert of each layer was chosen, (L, E).

  An encoder's layers come before a decoder's. A choice that found no room counts, too.
  """
  loads: list[jax.Array] = []
  with nn.intercept_methods(functools.partial(count_choices, loads)):
    output = forward(unrolled(model), params, batch)
  return output, jnp.stack(loads)


def count_choices(
  loads: list[jax.Array], next_fun: Any, args: tuple, kwargs: Any, context: Any
) -> Any:
  """Adds to `loads` the choices (E,) of a layer whose experts are called."""
  module = context.module
  if not isinstance(module, MoE):
    return next_fun(*args, **kwargs)
  if context.method_name == "__call__":
    loads.append(args[1])  # real_BT, until the router is asked
    return next_fun(*args, **kwargs)
  out = next_fun(*args, **kwargs)
  if context.method_name == "project" and args[0] == "router":
    real_BT = jnp.ones(out.shape[:2], bool) if loads[-1] is None else loads[-1]
    _, experts_BTA = route(module.cfg, out, real_BT)
    loads[-1] = count(experts_BTA, module.cfg.moe.num_experts, (0, 1, 2))
  return out


def named_loads(cfg: ResolvedModel, loads_LE: np.ndarray) -> dict[str, float]:
  """`eval/expert_load/layer_0/expert_0` and so on: choices over those of an even share.

  Of very many experts only each layer's `most` and `least`.
  """
  loads_LE = loads_LE / np.maximum(loads_LE.mean(1, keepdims=True), 1e-30)
  names = [f"layer_{n}" for n in range(cfg.depth)]
  if cfg.family == "encoder_decoder":
    of_encoder = [f"encoder/layer_{n}" for n in range(cfg.encoder_depth)]
    names = of_encoder + [f"decoder/{name}" for name in names]
  values: dict[str, float] = {}
  for name, loads_E in zip(names, loads_LE.tolist(), strict=True):
    each = {f"expert_{n}": load for n, load in enumerate(loads_E)}
    if loads_LE.size > MOST_LOADS:
      each = {"most": max(loads_E), "least": min(loads_E)}
    values |= {f"eval/expert_load/{name}/{key}": load for key, load in each.items()}
  return values
