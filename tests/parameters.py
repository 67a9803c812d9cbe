# SPDX-License-Identifier: Apache-2.0
"""Random parameters whose initialisation nothing compiles: it takes as long as a test.
And how near the gradients of two trees are."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from flaxlm.nn.base import LanguageModel
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


def cosines(ours: Any, theirs: Any) -> list[float]:
  """The cosine of each two arrays of two trees."""
  pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
  cosine = lambda a, b: (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
  return [float(cosine(a, b)) for a, b in pairs]
