# SPDX-License-Identifier: Apache-2.0
"""Experts on several devices: how uneven their shares are, and what waiting for them costs.

Without a capacity (`nn.moe.dropless`) a member of `expert` serves all choices of its own
experts, and the sum over the members waits for the fullest in every layer. What travels and
what arrays need does not depend on the shares: both are those of the worst case.
"""

import math
from collections.abc import Mapping
from statistics import NormalDist

from flaxlm.config import ResolvedConfig
from flaxlm.cost import ForwardFlops
from flaxlm.sharding import batch_shards

# The standard deviation of the loads of a layer's experts, over their mean, of a router
# that has learnt with `model.moe.load_balance_weight`: measured on moe_tiny after 330
# steps, over all of its held-out text. Early on it is larger (docs/LOG.md).
SPREAD = 0.14


def fullest_share(cfg: ResolvedConfig, sizes: Mapping[str, int]) -> float:
  """Choices that the fullest member of `expert` serves / an even share of them.

  Loads of experts are taken as independent and normal: around their mean with `SPREAD`, and
  with the variance of a draw of so many choices. A member's load is a mean over its
  experts, and the largest of n normal numbers is about the quantile (n - 3/8) / (n + 1/4)
  (Blom, 1958). No member serves a token more often than it has experts.
  """
  moe, members = cfg.model.moe, sizes["expert"]
  if not moe.num_experts or moe.capacity_factor is not None or members == 1:
    return 1.0
  E, A = moe.num_experts, moe.experts_per_token
  rows = cfg.data.batch_size * members
  rows //= batch_shards(sizes) * cfg.training.accumulation_steps
  choices = rows * cfg.data.seq_len * A / sizes["context"]
  spread = math.sqrt((SPREAD**2 + E / choices) * members / E)
  largest = NormalDist().inv_cdf((members - 3 / 8) / (members + 1 / 4))
  return min(1 + spread * largest, members * min(A, E // members) / A)


def awaited_flops(cfg: ResolvedConfig, sizes: Mapping[str, int]) -> float:
  """FLOPs of a step, of all devices, for which others wait: as if every member of `expert`
  computed what the fullest does."""
  model, moe = cfg.model, cfg.model.moe
  if (share := fullest_share(cfg, sizes)) == 1:
    return 0.0
  expert = (3 if model.gated else 2) * model.width * moe.expert_width
  tokens = cfg.data.batch_size * cfg.data.seq_len
  served = 2.0 * tokens * model.depth * moe.experts_per_token * expert
  work = ForwardFlops((share - 1) * served, 0, 0, 0, 0)
  return work.step(cfg.training) + cfg.reference_passes * work.matmul
