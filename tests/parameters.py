# SPDX-License-Identifier: Apache-2.0
"""Random parameters whose initialisation nothing compiles: it takes as long as a test.
And how near the gradients of two trees are; and what the reference finds of batches."""

import itertools
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
import reference_step
from jax.sharding import Mesh
from meshes import mesh_of

from flaxlm.config import ResolvedModel
from flaxlm.data.objectives import Batch
from flaxlm.nn.base import LanguageModel
from flaxlm.nn.models import abstract_params
from flaxlm.training.optimizer import Optimizer
from flaxlm.training.step import TrainState, abstract_state, shardings_of
from flaxlm.verify.case import random_params


def random_state(
  model: LanguageModel, optimizer: Optimizer, mesh: Mesh, params: Any = None
) -> TrainState:
  """A state of step 0 with the same numbers on every mesh, cut as the rules say: random
  ones, or these parameters in float32."""
  if params is None:
    params = random_params(model)
  else:
    params = jax.tree.map(lambda x: x.astype(np.float32), params)
  state = TrainState(np.int32(0), params, jax.jit(optimizer.init)(params))
  where = shardings_of(abstract_state(model, optimizer, mesh))
  return jax.device_put(jax.device_get(state), where)


def float64_params(model: LanguageModel, seed: int = 1) -> Any:
  """Normal parameters with a deviation of 0.5, norms too, for references in float64."""
  random = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: 0.5 * random.normal(size=x.shape), abstract_params(model, mesh_of())
  )


def reference_loss_and_norm(
  params: Any, cfg: ResolvedModel, batches: Iterable[Batch], count: float
) -> tuple[float, float]:
  """The loss of batches together and the norm of its gradient, both over `count`, by the
  reference, without dropout or smoothing."""
  total, gradient = 0.0, jax.tree.map(np.zeros_like, params)
  for batch in batches:
    given = params, cfg, batch, itertools.repeat(1.0)
    loss, more, _ = reference_step.loss_and_gradient(*given, smoothing=0.0)
    total, gradient = total + loss, jax.tree.map(np.add, gradient, more)
  squares = sum(np.sum((g / count) ** 2) for g in jax.tree.leaves(gradient))
  return total / count, float(squares**0.5)


def cosines(ours: Any, theirs: Any) -> list[float]:
  """The cosine of each two arrays of two trees."""
  pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
  cosine = lambda a, b: (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
  return [float(cosine(a, b)) for a, b in pairs]
