# SPDX-License-Identifier: Apache-2.0
"""What happens between the steps of a run, with steps that end as a test wants: what is
saved, when it stops, and what it says."""

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import pytest

from flaxlm.config import CheckpointConfig, Config, TrainingConfig
from flaxlm.errors import INTERRUPTED, PREEMPTED, NonFiniteError
from flaxlm.sharding import make_mesh
from flaxlm.training.clock import Clock
from flaxlm.training.step import TrainState
from flaxlm.training.trainer import Trainer


class Fakes:
  """Everything around a trainer. `fates` has a letter for each step: `.` is a good one, `x`
  one that is skipped, `i` one whose parameters become infinite."""

  def __init__(self, fates: str):
    self.fates, self.saved, self.lines = fates, [], []
    self.kept: dict[int, dict[str, float]] = {}

  # The step.
  def __call__(self, state: TrainState, batch: Any, seed: Any) -> tuple[TrainState, dict]:
    fate = self.fates[int(state.step)]
    params = {"w": jnp.array([1.0, jnp.inf if fate == "i" else 0.0])}
    loss = jnp.nan if fate == "x" else 1.0
    metrics = {"loss": loss, "tokens": 8.0, "finite": fate != "x"}
    return TrainState(state.step + 1, params, None), metrics

  # The batches.
  @contextlib.contextmanager
  def iterate(self, start: int) -> Iterator[Any]:
    yield iter([()] * (len(self.fates) - start))

  # The store, the reporter and the watchdog.
  def save(self, step: int, *_: Any) -> None:
    self.saved.append(step)

  def log(self, text: str) -> None:
    self.lines.append(text)

  def metrics(self, step: int, values: dict[str, float]) -> None:
    self.kept[step] = values

  def nothing(self, *_: Any) -> None: ...

  wait = vouch = advance = progress = nothing

  def resting(self) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def train(
  fates: str,
  stop: dict[int, int] | None = None,
  every: int = 1,
  rollouts: Any = None,
  seconds_at_peak: float | None = None,
) -> Fakes:
  """Runs a step for each letter; `stop` has signals by the step after which they arrive."""
  training = TrainingConfig(num_steps=len(fates), eval_every_steps=1_000)
  cfg = Config(training=training, checkpoint=CheckpointConfig(every_steps=every))
  fakes: Any = Fakes(fates)
  evaluator: Any = lambda params, progress, *references: {
    f"eval/{name}": 1.0 for name in ("loss", "perplexity", "bits_per_byte")
  }
  mesh = make_mesh({"data": 8})
  around = (fakes, evaluator, fakes, fakes, fakes)
  clock = Clock(seconds_at_peak=seconds_at_peak)
  trainer = Trainer(cfg, "text", mesh, *around, rollouts, clock)
  state = TrainState(jnp.int32(0), {"w": jnp.zeros(2)}, None)
  stop_at = lambda step: (stop or {}).get(step, 0)
  try:
    _, fakes.code = trainer.steps(state, 0, fakes, stop_at)
  except NonFiniteError as e:
    fakes.code = e.exit_code
    fakes.log(e.cause)
  return fakes


@pytest.mark.parametrize(
  ("fates", "saved"),
  [
    ("....", [1, 2, 3, 4]),
    (".xx.", [1, 4]),
    ("x.x.", [2, 4]),
    ("..xx", [1, 2, 4]),  # the end: its parameters are those of step 2, and nothing follows
  ],
)
def test_nothing_is_saved_while_steps_are_skipped(fates: str, saved: list[int]):
  run = train(fates)
  assert (run.code, run.saved) == (0, saved)


def test_a_run_that_diverges_leaves_the_checkpoints_before():
  run = train("..xxx")
  assert (run.code, run.saved) == (5, [1, 2])
  assert "3 steps in a row" in run.lines[-1]


@pytest.mark.parametrize(("fates", "every"), [(".i.", 1), (".i", 5), ("..i..", 3)])
def test_infinite_parameters_are_not_saved(fates: str, every: int):
  """The gradient that made them was finite."""
  run = train(fates, every=every)
  assert run.code == 5
  assert run.saved == ([1] if every == 1 else [])
  assert f"the parameters after step {fates.index('i') + 1} are NaN or" in run.lines[-1]


@pytest.mark.parametrize(
  ("fates", "every", "at", "saved", "said"),
  [
    ("....", 9, 2, [2], "saving step 2"),
    ("....", 1, 0, [], "stopping after step 0: there is nothing to save"),
    ("....", 2, 2, [2], "stopping after step 2, which is saved"),
    (".x..", 1, 2, [1], "stopping after step 2, which was skipped; step 1 is saved"),
    ("x...", 1, 1, [], "stopping after step 1: there is nothing to save"),
  ],
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_saves_what_is_worth_it_and_says_so(
  fates: str, every: int, at: int, saved: list[int], said: str, number: signal.Signals
):
  run = train(fates, stop={at: number}, every=every)
  assert run.code == (INTERRUPTED if number == signal.SIGINT else PREEMPTED)
  assert run.saved == saved
  assert run.lines[-1] == f"{number.name}: {said}"


def test_a_batch_is_drawn_before_its_step():
  """With the parameters of the step and its number; what the run begins from is judged."""
  asked = []

  def rollouts(params: Any, step: int, questions: Any) -> tuple[Any, dict[str, float]]:
    asked.append((step, [*params], questions))
    return (), {"reward": step / 2}

  run = train("." * 20, every=99, rollouts=rollouts)
  assert asked == [(step, ["w"], ()) for step in range(20)]
  assert run.kept[0]["eval/loss"] == 1.0
  assert run.kept[10]["train/reward"] == 4.5
  assert 0 < run.kept[10]["perf/drawing_fraction"] < 1
  assert 0 not in train("..").kept


def test_an_mfu_that_cannot_be_is_told_once_and_left_out():
  run = train("." * 30, every=99, seconds_at_peak=1e6)
  assert len([line for line in run.lines if line.startswith("no perf/mfu")]) == 1
  assert all("perf/mfu" not in values for values in run.kept.values())
  slow = train("." * 30, every=99, seconds_at_peak=1e-9)
  assert 0 < slow.kept[20]["perf/mfu"] < slow.kept[20]["perf/goodput"] < 1
