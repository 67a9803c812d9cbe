# SPDX-License-Identifier: Apache-2.0
"""Parts of a step: how the stages of a pipeline share its time, and when sums are made."""

from collections.abc import Mapping
from typing import NamedTuple

import jax

from flaxlm.config import TrainingConfig


class Schedule(NamedTuple):
  """The number of stages, of microbatches, and of their passes through all stages."""

  stages: int  # S
  microbatches: int  # M, a multiple of S
  repeats: int = 1  # R

  @property
  def visits(self) -> int:
    """Ticks in which a stage has work."""
    return self.microbatches * self.repeats

  @property
  def ticks(self) -> int:
    """Ticks from the first microbatch at the first stage to the last one at the last."""
    return self.visits + self.stages - 1

  @property
  def bubble(self) -> float:
    """The share of the ticks in which a stage waits."""
    return 1 - self.visits / self.ticks


def make_schedule(stages: int, microbatches: int | None, repeats: int) -> Schedule:
  """The schedule of a pipeline; by default it has as many microbatches as stages.

  Without a pipeline (one stage) the whole batch runs at once.
  """
  if stages == 1:
    return Schedule(1, 1)
  return Schedule(stages, microbatches or stages, repeats)


def training_schedule(training: TrainingConfig, sizes: Mapping[str, int]) -> Schedule:
  """The schedule of a training step on a mesh of these axis sizes."""
  repeats = training.pipeline_repeats
  return make_schedule(sizes["stage"], training.pipeline_microbatches, repeats)


def sums_at_ticks(item_size: int) -> bool:
  """Whether a pipeline sums the gradients of parameters of `item_size` bytes over `data` at
  every tick, and not once after the last: XLA's CPU compiler aborts at a sum of narrow
  gradients that is asked for by name."""
  return item_size < 4


def sums_once(
  sizes: Mapping[str, int],
  num_parts: int,
  attention: str | None = None,
  has_dropout: bool = False,
) -> bool:
  """Whether gradients are summed over `data` once, after all parts of a batch.

  Of a batch in one part the compiler sums each layer's as soon as it is there, which sends
  no more, and while the next layer is computed; a pipeline sums them after its last tick.
  The compiler also sums those of each part where JAX or XLA cannot leave `data` out of what
  the others compute: cuDNN's attention, which JAX cuts over the whole mesh; splash with jax
  0.10 ("Mosaic kernels cannot be automatically partitioned"); and a pipeline with jax 0.11
  ("Manual axes must be sorted by mesh axis index", but it lists the outer one's first).
  So it does in a pipeline with dropout: the units of a member's rows are drawn by its
  number, which jax 0.10 cannot tell below two maps over parts of a mesh.
  """
  is_old, stages = jax.__version_info__ < (0, 11), sizes.get("stage", 1)
  if attention == "cudnn" or (attention == "splash" and is_old):
    return False
  if stages > 1 and (has_dropout or not is_old):
    return False
  return sizes.get("data", 1) > 1 and num_parts > 1
