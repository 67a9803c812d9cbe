# SPDX-License-Identifier: Apache-2.0
"""The steps of a run, and what happens between them: metrics, evaluation, saving.

The devices do not wait for the host: it dispatches a step, then reads the metrics of the
step before. On a CPU, which is both, a step is waited for.
"""

import contextlib
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from flaxlm.checkpoint.store import CheckpointStore
from flaxlm.config import Config
from flaxlm.data.batches import Batches
from flaxlm.data.objectives import Batch
from flaxlm.data.questions import QuestionBatches
from flaxlm.errors import INTERRUPTED, PREEMPTED, ConfigError, NonFiniteError
from flaxlm.nn.lora import combined
from flaxlm.sharding import wait_on_cpu
from flaxlm.training.clock import MFU, Clock
from flaxlm.training.evaluation import Evaluator, describe_evaluation
from flaxlm.training.layers import named_sizes
from flaxlm.training.reporting import Reporter
from flaxlm.training.rollouts import AnswerEvaluator, Rollouts
from flaxlm.training.signals import StopAt
from flaxlm.training.step import LAYERS, TrainState, TrainStep, jit_all_finite, put_batch
from flaxlm.training.watchdog import Watchdog

MOST_SKIPPED_STEPS = 3  # in a row, before a run that keeps diverging is stopped
LOWER_RATE = "lower --optimizer.learning-rate, or lengthen --optimizer.warmup-steps"


@dataclass
class Trainer:
  """The steps of one run, and what happens between them."""

  cfg: Config
  fingerprint: str  # of the corpus
  mesh: Mesh
  train_step: TrainStep
  evaluator: Evaluator | AnswerEvaluator
  store: CheckpointStore
  reporter: Reporter
  watchdog: Watchdog
  rollouts: Rollouts | None = None  # what makes a batch of questions; None: it is one
  clock: Clock = field(default_factory=Clock)
  sampler: Callable[[TrainState], str] | None = None  # what the model writes by now

  def __post_init__(self) -> None:
    self.clock.restart()
    self.all_finite = jit_all_finite(self.mesh)
    self.skipped = 0  # steps in a row that were not finite
    self.evaluated = self.sampled = False

  def steps(
    self,
    state: TrainState,
    first_step: int,
    batches: Batches | QuestionBatches,
    stop_at: StopAt,
  ) -> tuple[TrainState, int]:
    """Runs until num_steps, the end of the data, or a signal: (last state, exit code).

    While the devices work on step n, the host reads the metrics of step n - 1.
    """
    training, seed = self.cfg.training, np.uint32(self.cfg.seed)
    step, saved, pending, stopped = first_step, first_step, None, 0
    if self.rollouts is not None and not first_step:
      with self.clock.stopped():
        self.evaluate(0, state)  # what the run begins from was not judged by this reward
    with batches.iterate(first_step) as rows:
      while step < training.num_steps:
        stopped = stop_at(step)
        if stopped:
          break
        with self.clock.waiting_for_data():
          batch = next(rows, None)
        if batch is None:
          self.reporter.log(f"the data end after step {step}: {training.num_steps} asked")
          break
        wait_on_cpu(state)
        batch, drawn = self.draw(state, step, batch)
        state, metrics = self.train_step(state, put_batch(batch, self.mesh), seed)
        step += 1
        self.report(pending)
        pending = (step, metrics | drawn)
        evaluate = step % training.eval_every_steps == 0
        save = step % self.cfg.checkpoint.every_steps == 0
        sample = self.is_sampled(step)
        if evaluate or save or sample:
          self.report(pending)
          pending = None
          with self.clock.stopped():
            if evaluate:
              self.evaluate(step, state)
            if save and self.skipped:
              self.reporter.log(f"step {step} is not saved: it was skipped")
            elif save:
              self.save(step, state)
              saved = step
            if sample:
              self.sample(step, state)
    self.report(pending)
    stopped = stopped or stop_at(step)
    if not stopped and step > first_step and step % training.eval_every_steps:
      self.evaluate(step, state)
    # At the end the state is saved after skipped steps, too: nothing is to follow.
    saves = step > saved and not (stopped and self.skipped)
    if stopped:
      self.reporter.log(describe_stop(stopped, step, step if saves else saved, saves))
    if saves:
      self.save(step, state)
    with self.watchdog.resting():  # a large checkpoint takes its time
      self.store.wait()
    if stopped:
      return state, INTERRUPTED if stopped == signal.SIGINT else PREEMPTED
    return state, 0

  def draw(
    self, state: TrainState, step: int, batch: Any
  ) -> tuple[Batch, dict[str, float]]:
    """The batch to learn from, which for rewards the model itself writes; and figures."""
    if self.rollouts is None:
      return batch, {}
    with self.clock.drawing():
      return self.rollouts(combined(state.frozen, state.params), step, batch)

  def report(self, pending: tuple[int, Mapping[str, Any]] | None) -> None:
    """Waits for a step's metrics and writes them. Raises `NonFiniteError` if the run has
    diverged."""
    if pending is None:
      return
    step, metrics = pending
    metrics = jax.device_get({**metrics})
    layers = metrics.pop(LAYERS, {})
    values = {name: float(value) for name, value in metrics.items()}
    self.watchdog.progress()
    self.reporter.advance(step)
    if not self.clock.first_step_done:
      seconds = time.perf_counter() - self.clock.started
      self.reporter.log(f"first step in {seconds:.1f} s")
    self.clock.step_done(values["tokens"])
    if values.pop("finite"):
      self.skipped = 0
    else:
      self.skipped += 1
      self.reporter.log(f"step {step} skipped: its loss or gradient is NaN or infinite")
      if self.skipped >= MOST_SKIPPED_STEPS:
        raise NonFiniteError(
          f"{self.skipped} steps in a row, up to step {step}, were NaN or infinite",
          LOWER_RATE,
        )
    if step % self.cfg.training.log_every_steps == 0:
      values |= named_sizes(layers)
      named = {f"train/{name}": value for name, value in values.items()}
      self.reporter.metrics(step, named | self.rates())

  def rates(self) -> dict[str, float]:
    """Those of the clock, without an MFU that cannot be."""
    rates = self.clock.rates()
    if rates.get(MFU, 0.0) > 1:
      mfu = rates.pop(MFU)
      self.clock.seconds_at_peak = None
      self.reporter.log(
        f"no {MFU} from here on: {mfu:.2f} is faster than the peak of the device's data "
        "sheet, so this is another device, or its clock is wrong"
      )
    return rates

  def evaluate(self, step: int, state: TrainState) -> None:
    # The first evaluation compiles.
    with contextlib.nullcontext() if self.evaluated else self.watchdog.resting():
      params = combined(state.frozen, state.params)
      progress = self.watchdog.progress if self.evaluated else lambda: None
      compares = self.cfg.active_dpo is not None
      references = [state.reference_params] if compares else []
      values = self.evaluator(params, progress, *references)
    self.evaluated = True
    self.reporter.metrics(step, values)
    self.reporter.log(f"step {step:>6}  held-out: {describe_evaluation(values)}")

  def is_sampled(self, step: int) -> bool:
    """Whether the model writes something after this step. At the end it does anyway."""
    every = self.cfg.training.sample_every_steps
    return every is not None and step % every == 0 and step < self.cfg.training.num_steps

  def sample(self, step: int, state: TrainState) -> None:
    if self.sampler is None:
      return
    try:
      # The first one compiles.
      with contextlib.nullcontext() if self.sampled else self.watchdog.resting():
        self.watchdog.progress()
        text = self.sampler(state)
      self.sampled = True
    except ConfigError as e:  # the prompt is too long, now and later
      self.reporter.log(f"no samples of training.sample_prompt: {e.cause}")
      self.sampler = None
    else:
      self.reporter.sample(step, text)

  def save(self, step: int, state: TrainState) -> None:
    """Raises `NonFiniteError` rather than to replace a good checkpoint by one of NaNs."""
    if not self.all_finite(state.params):
      raise NonFiniteError(
        f"the parameters after step {step} are NaN or infinite: they are not saved",
        LOWER_RATE,
      )
    # Batch n belongs to step n, so the step is all that resuming the data needs.
    progress = {"step": step, "corpus": self.fingerprint}
    self.watchdog.progress()
    self.store.save(step, state.params, state.opt_state, progress)
    self.reporter.vouch()


def describe_stop(number: int, step: int, last: int, saves: bool) -> str:
  """What a signal does: the run stops after `step`, and can resume from the step `last`."""
  name = signal.Signals(number).name
  if saves:
    return f"{name}: saving step {step}"
  if not last:
    return f"{name}: stopping after step {step}: there is nothing to save"
  if step == last:
    return f"{name}: stopping after step {step}, which is saved"
  return f"{name}: stopping after step {step}, which was skipped; step {last} is saved"
