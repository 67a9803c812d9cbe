# SPDX-License-Identifier: Apache-2.0
"""Random parameters whose initialisation nothing compiles: it takes as long as a test."""

from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from flaxlm.nn.base import LanguageModel
from flaxlm.nn.models import boxed_shapes
from flaxlm.training.optimizer import Optimizer
from flaxlm.training.step import TrainState, abstract_state, shardings_of


def random_params(model: LanguageModel, seed: int = 0, spread: float = 0.2) -> Any:
  """Every parameter random, norms and biases too, as zeros and ones would hide mistakes:
  normal with a deviation of `spread`, around 1 if it scales."""
  random = np.random.default_rng(seed)

  def fill(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    around = 1 if path[-1].key == "scale" else 0
    return (around + spread * random.normal(size=leaf.shape)).astype(leaf.dtype)

  shapes = nn.unbox(boxed_shapes(model))
  return jax.device_put(jax.tree_util.tree_map_with_path(fill, shapes))


def random_state(model: LanguageModel, optimizer: Optimizer, mesh: Mesh) -> TrainState:
  """A state of step 0 with the same numbers on every mesh, cut as the rules say."""
  params = random_params(model)
  state = TrainState(np.int32(0), params, jax.jit(optimizer.init)(params))
  where = shardings_of(abstract_state(model, optimizer, mesh))
  return jax.device_put(jax.device_get(state), where)
