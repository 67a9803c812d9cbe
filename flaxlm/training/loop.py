# SPDX-License-Identifier: Apache-2.0
"""The training loop: the host's side, with all its effects.

Order matters to whoever waits: config, then files and data, then devices, then compiling,
so that most mistakes show within seconds.
"""

import contextlib
import dataclasses
import secrets
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from flaxlm.checkpoint.manifest import write_atomically
from flaxlm.checkpoint.store import CheckpointStore
from flaxlm.config import (
  Config,
  ResolvedModel,
  check_config,
  slow_axes,
  to_json,
)
from flaxlm.data.batches import Batches
from flaxlm.data.prepare import Prepared, prepare
from flaxlm.data.sources import data_dir, to_stderr
from flaxlm.decoding.completions import complete, search
from flaxlm.decoding.encoding import fill_masks
from flaxlm.decoding.loading import Run
from flaxlm.decoding.sampling import make_sampling
from flaxlm.distributed.peers import Alone
from flaxlm.distributed.start import joined
from flaxlm.errors import (
  INTERRUPTED,
  PREEMPTED,
  NonFiniteError,
)
from flaxlm.nn.base import LanguageModel
from flaxlm.nn.kernels.paths import Path as AttentionPath
from flaxlm.nn.kernels.paths import training_path
from flaxlm.nn.models import build_model
from flaxlm.platform import kernel_head_dim, start_jax
from flaxlm.runs import (
  CHECKPOINTS,
  CONFIG,
  SAMPLE,
  TOKENIZER,
  check_same_experiment,
  load_config_of,
  locked,
  make_room_after,
  resume_step,
)
from flaxlm.sharding import check_batch, check_replication, describe_mesh, make_mesh
from flaxlm.tokenizers import MASK, expected_vocab_size
from flaxlm.training.evaluation import Evaluator, describe_evaluation, split_batches
from flaxlm.training.optimizer import Optimizer, build_optimizer
from flaxlm.training.reporting import Reporter
from flaxlm.training.step import (
  SEED,
  Metrics,
  TrainState,
  TrainStep,
  abstract_batch,
  abstract_state,
  compile_train_step,
  init_state,
  put_batch,
)
from flaxlm.training.watchdog import Watchdog

MOST_SKIPPED_STEPS = 3  # in a row, before a run that keeps diverging is stopped

# Process 0 leaves it in the run directory, where network file systems show it soon.
MARK, MARK_SECONDS = ".job", 30.0


def train(cfg: Config) -> int:
  """Trains `cfg` into its run directory, resuming what is there; returns the exit code."""
  check_config(cfg)
  flags = start_jax(cfg.simulated_devices, data_dir() / "xla")
  with joined(cfg) as peers, contextlib.ExitStack() as stack:
    mesh = make_mesh(cfg.mesh)
    check_batch(cfg, mesh.shape)
    attention = choose_attention(cfg, mesh)
    # -- Run directory: ours alone from here on.
    stack.enter_context(locked(cfg.run_dir, peers.process))
    check_shared(cfg.run_dir, peers)
    first_step = peers.decide(lambda: resume_step(cfg, to_stderr))

    # -- Data: what there is to learn from decides the vocabulary. It is known before, but
    # for the smallest corpora, so the program compiles while data are prepared.
    guess = make_model_config(cfg, expected_vocab_size(cfg.tokenizer), mesh, first_step)
    with ThreadPoolExecutor(1, "compile") as thread:
      compiling = lambda model_cfg: thread.submit(
        Program.compiled, model_cfg, cfg, mesh, fresh=not first_step
      )
      early: list[Future[Program]] = []
      writes = peers.process == 0
      prepared = prepare(
        cfg.data.corpus,
        cfg.tokenizer,
        log=to_stderr if writes else lambda line: None,
        objective=cfg.data.objective,
        # Of several processes some may find their data prepared: none runs ahead.
        meanwhile=lambda: (
          early.append(compiling(guess)) if peers.num_processes == 1 else None
        ),
      )
      peers.agree(f"the text of {cfg.data.corpus}", prepared.fingerprint)
      num_ids = prepared.tokenizer.vocab_size
      model_cfg = make_model_config(cfg, num_ids, mesh, first_step)
      cfg = dataclasses.replace(cfg.resolve(num_ids), model=model_cfg)
      batches = split_batches(cfg, prepared.train, mesh, shuffled=True)
      validation = split_batches(cfg, prepared.validation, mesh, shuffled=False)
      if first_step:
        check_resumable(cfg, prepared.fingerprint, first_step, peers)
      stop = stack.enter_context(stop_signals(peers))
      future = early[0] if early and guess == cfg.model else compiling(cfg.model)
      if writes:
        write_atomically(cfg.run_dir / CONFIG, to_json(cfg))
        prepared.tokenizer.save(cfg.run_dir / TOKENIZER)
      reporter = Reporter(cfg.run_dir, first_step, cfg.training.num_steps, writes)
      stack.callback(reporter.close)
      store = CheckpointStore(cfg.run_dir / CHECKPOINTS, cfg.checkpoint.keep)
      stack.callback(store.close)
      program = future.result()

    # -- State: born sharded, or read back to where it was.
    model, state = program.model, program.state
    if state is None:
      target = abstract_state(model, program.optimizer, mesh)
      items = store.restore(first_step, params=target.params, opt_state=target.opt_state)
      step = jax.device_put(np.int32(first_step), target.step.sharding)
      state = TrainState(step, items["params"], items["opt_state"])
      reporter.log(f"resuming {cfg.run_dir} at step {first_step}")
    for flag in flags:
      reporter.log(flag.line)
    if cfg.model.padding:
      reporter.log(cfg.model.padding)
    reporter.log(describe(cfg, state, prepared, mesh))
    if attention is not None and jax.default_backend() != "cpu":
      why = f": {attention.why}" if attention.why else ""
      reporter.log(f"attention: {attention.name}{why}")

    # -- Steps.
    evaluator = Evaluator(
      model, prepared.tokenizer, validation, cfg.training.eval_batches, mesh
    )
    with Watchdog(cfg.training.hang_seconds, peers.leave) as watchdog:
      run = Trainer(
        cfg,
        prepared.fingerprint,
        mesh,
        program.train_step,
        evaluator,
        store,
        reporter,
        watchdog,
      )
      state, exit_code = run.steps(state, first_step, batches, stop)

    # -- A word at the end.
    if exit_code == 0:
      step = int(state.step)
      show_sample(
        Run(cfg.run_dir, cfg, prepared.tokenizer, step, model, state.params, mesh),
        reporter,
      )
    return exit_code


class Program(NamedTuple):
  """What runs on the devices: the model, its training step, and a first state."""

  model: LanguageModel
  optimizer: Optimizer
  train_step: TrainStep
  state: TrainState | None

  @staticmethod
  def compiled(model_cfg: ResolvedModel, cfg: Config, mesh: Mesh, fresh: bool) -> "Program":
    """The program of a config, ready to run; `fresh` makes the state of step 0 too."""
    model = build_model(model_cfg, cfg.training, kernel_head_dim())
    optimizer = build_optimizer(cfg.optimizer, cfg.training.num_steps)
    params = abstract_state(model, optimizer, mesh).params
    check_replication(params, mesh.shape, cfg.training.replication_tolerance)
    state = init_state(model, optimizer, mesh, cfg.seed) if fresh else None
    train_step = compile_train_step(model, optimizer, cfg.training, mesh)
    batch = abstract_batch(cfg.data, mesh)
    train_step.lower(abstract_state(model, optimizer, mesh), batch, SEED).compile()
    return Program(model, optimizer, train_step, state)


class Trainer:
  """The steps of one run, and what happens between them."""

  def __init__(
    self,
    cfg: Config,
    fingerprint: str,
    mesh: Mesh,
    train_step: TrainStep,
    evaluator: "Evaluator",
    store: CheckpointStore,
    reporter: Reporter,
    watchdog: Watchdog,
  ):
    self.cfg, self.fingerprint, self.mesh = cfg, fingerprint, mesh
    self.train_step, self.evaluator = train_step, evaluator
    self.store, self.reporter, self.watchdog = store, reporter, watchdog
    self.clock = Clock()
    self.skipped = 0
    self.evaluated = False

  def steps(
    self, state: TrainState, first_step: int, batches: Batches, stop: "Stop"
  ) -> tuple[TrainState, int]:
    """Runs until num_steps, the end of the data, or a signal; returns the exit code.

    While the devices work on step n, the host reads the metrics of step n - 1.
    """
    training, seed = self.cfg.training, np.uint32(self.cfg.seed)
    step, saved, pending, stopped = first_step, first_step, None, 0
    with batches.iterate(first_step) as rows:
      while step < training.num_steps:
        stopped = stop.at(step)
        if stopped:
          break
        with self.clock.waiting_for_data():
          batch = next(rows, None)
        if batch is None:
          self.reporter.log(f"the data end after step {step}: {training.num_steps} asked")
          break
        if jax.default_backend() == "cpu":
          # While something is still being computed, the next program runs in a thread of
          # the pool, and so would all after it: their memory is mapped anew each time.
          jax.block_until_ready(state)
        state, metrics = self.train_step(state, put_batch(batch, self.mesh), seed)
        step += 1
        self.report(pending)
        pending = (step, metrics)
        evaluate = step % training.eval_every_steps == 0
        save = step % self.cfg.checkpoint.every_steps == 0
        if evaluate or save:
          self.report(pending)
          pending = None
          if evaluate:
            self.evaluate(step, state)
          if save:
            self.save(step, state)
            saved = step
          self.clock.restart()
    self.report(pending)
    stopped = stopped or stop.at(step)
    if stopped:
      self.reporter.log(f"{signal.Signals(stopped).name}: saving step {step}")
    elif step > first_step and step % training.eval_every_steps:
      self.evaluate(step, state)
    if step > saved:
      self.save(step, state)
    with self.watchdog.resting():  # a large checkpoint takes its time
      self.store.wait()
    if stopped:
      return state, INTERRUPTED if stopped == signal.SIGINT else PREEMPTED
    return state, 0

  def report(self, pending: tuple[int, Metrics] | None) -> None:
    """Waits for a step's metrics and writes them; stops a run that has diverged."""
    if pending is None:
      return
    step, metrics = pending
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    self.watchdog.progress()
    self.reporter.advance(step)
    if not self.clock.first_step_done:
      seconds = time.perf_counter() - self.clock.started
      self.reporter.log(f"compiled and made the first step in {seconds:.1f} s")
    self.clock.step_done(values["tokens"])
    if values.pop("finite"):
      self.skipped = 0
    else:
      self.skipped += 1
      self.reporter.log(f"step {step} skipped: its loss or gradient is NaN or infinite")
      if self.skipped >= MOST_SKIPPED_STEPS:
        raise NonFiniteError(
          f"{self.skipped} steps in a row, up to step {step}, were NaN or infinite",
          "lower --optimizer.learning_rate, or lengthen --optimizer.warmup_steps",
        )
    if step % self.cfg.training.log_every_steps == 0:
      named = {f"train/{name}": value for name, value in values.items()}
      self.reporter.metrics(step, named | self.clock.rates())

  def evaluate(self, step: int, state: TrainState) -> None:
    # The first evaluation compiles.
    with contextlib.nullcontext() if self.evaluated else self.watchdog.resting():
      values = self.evaluator(
        state.params, self.watchdog.progress if self.evaluated else lambda: None
      )
    self.evaluated = True
    self.reporter.metrics(step, values)
    self.reporter.log(f"step {step:>6}  held-out: {describe_evaluation(values)}")

  def save(self, step: int, state: TrainState) -> None:
    # The next batch has the step's number: nothing else is needed to go on with the data.
    progress = {"step": step, "corpus": self.fingerprint}
    self.watchdog.progress()
    self.store.save(step, state.params, state.opt_state, progress)


class Clock:
  """Rates over blocks of steps; a block ends when its last step's result was read."""

  def __init__(self):
    self.first_step_done = False
    self.restart()

  def restart(self) -> None:
    """Leaves out what is not training: evaluation, saving, and compiling before it."""
    self.started = time.perf_counter()
    self.tokens = self.data_seconds = 0.0

  @contextlib.contextmanager
  def waiting_for_data(self) -> Iterator[None]:
    started = time.perf_counter()
    yield
    self.data_seconds += time.perf_counter() - started

  def step_done(self, tokens: float) -> None:
    if self.first_step_done:
      self.tokens += tokens
    else:  # the first step includes compiling
      self.first_step_done = True
      self.restart()

  def rates(self) -> dict[str, float]:
    """Tokens per second and the share of time spent waiting for data, of this block."""
    seconds = time.perf_counter() - self.started
    rates = {}
    if self.tokens:
      rates["perf/tokens_per_sec"] = self.tokens / seconds
      rates["perf/data_wait_fraction"] = self.data_seconds / seconds
    self.restart()
    return rates


# -- Before the first step ---------------------------------------------------------------


def make_model_config(
  cfg: Config, tokenizer_size: int, mesh: Mesh, first_step: int
) -> ResolvedModel:
  """The model with every number known. A new run pads its vocabulary for the mesh; one
  that goes on keeps the rows that it has.
  """
  model = cfg.model.resolve(tokenizer_size)
  if first_step:
    stored = load_config_of(cfg.run_dir).model
    if stored.num_ids == model.num_ids:
      return dataclasses.replace(model, vocab_size=stored.vocab_size)
  return model.padded(mesh.shape["tensor"])


def choose_attention(cfg: Config, mesh: Mesh) -> AttentionPath | None:
  """The path that attention takes in a step; refuses one that is asked for and cannot."""
  model_cfg = cfg.model.resolve(expected_vocab_size(cfg.tokenizer))
  run = build_model(model_cfg, cfg.training, kernel_head_dim()).run
  source_len = cfg.data.source_len or cfg.data.seq_len
  return training_path(model_cfg, run, mesh.shape, cfg.data.seq_len, source_len)


def check_shared(run_dir: Path, peers: Alone) -> None:
  """Refuses to train into a directory that not all processes see."""
  if peers.num_processes == 1:
    return

  def leave_mark() -> str:
    mark = secrets.token_hex(8)
    write_atomically(run_dir / MARK, mark)
    return mark

  mark = peers.decide(leave_mark)
  seen, deadline = "", time.monotonic() + MARK_SECONDS
  while seen != mark and time.monotonic() < deadline:
    with contextlib.suppress(OSError):
      seen = (run_dir / MARK).read_text("utf-8")
    time.sleep(0.0 if seen == mark else 0.2)
  peers.agree(f"what is in {run_dir}", seen)


def check_resumable(cfg: Config, fingerprint: str, step: int, peers: Alone) -> None:
  """Refuses to resume from a step of other data or another model, else makes room."""
  directory = cfg.run_dir / CHECKPOINTS
  store = CheckpointStore(directory)
  try:
    stored = store.restore_progress(step)
  finally:
    store.close()
  check_same_experiment(load_config_of(cfg.run_dir), cfg, stored["corpus"], fingerprint)
  peers.decide(lambda: make_room_after(directory, step))


def describe(cfg: Config, state: TrainState, prepared: Prepared, mesh: Mesh) -> str:
  num_params = sum(x.size for x in jax.tree.leaves(state.params))
  axes = describe_mesh(mesh.shape, slow_axes(cfg.mesh))
  device = jax.devices()[0].device_kind
  return (
    f"{cfg.run_dir}: {num_params:,} parameters; {cfg.data.corpus}: "
    f"{prepared.train.num_tokens:,} tokens to learn from, "
    f"{prepared.validation.num_tokens:,} held out; "
    f"{jax.device_count()} {device} device(s){f', mesh {axes}' if mesh.size > 1 else ''}"
  )


# -- Signals, and the end ------------------------------------------------------------------


@dataclasses.dataclass
class Stop:
  """The signal that asked this process to save and end, if one did."""

  peers: Alone
  requested: int = 0

  def at(self, step: int) -> int:
    """The signal because of which all processes stop after this step, or 0."""
    return self.peers.stop_at(step, self.requested)


@contextlib.contextmanager
def stop_signals(peers: Alone) -> Iterator[Stop]:
  """SIGTERM and Ctrl-C ask once; the second time they act at once."""
  stop = Stop(peers)

  def request(number: int, _: Any) -> None:
    stop.requested = number
    signal.signal(number, previous[number])

  previous: dict[int, Any] = {}
  try:
    for wanted in (signal.SIGTERM, signal.SIGINT):
      previous[wanted] = signal.signal(wanted, request)
  except ValueError:  # not the main thread: whoever runs us handles signals
    yield stop
    return
  try:
    yield stop
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)


def show_sample(run: Run, reporter: Reporter) -> None:
  """Prints what the model makes of `sample_prompt`, and what to try next.

  Every process computes it, for the model may lie on all of them.
  """
  family, prompt = run.cfg.model.family, run.cfg.training.sample_prompt
  infer, text = f"python infer.py {run.path}", ""
  if family == "encoder":
    prompt = prompt if MASK in prompt else f"import {MASK}"
    (filled,) = fill_masks(run, [prompt])
    text = filled.filled
    tries = [f'{infer} --fill "{prompt}"', f'flaxlm embed {run.path} --text "a sentence"']
  elif family == "encoder_decoder":
    prompt = prompt or "Search"
    (found,) = search(run, [prompt], num_beams=4)
    text = f"{prompt} => {found.completion}"
    tries = [f'{infer} --prompt "{prompt}" --beams 4', f"flaxlm eval {run.path} --bleu"]
  else:
    sampling = make_sampling(1, temperature=0.8, top_p=0.95, seed=run.cfg.seed)
    (sample,) = complete(run, [prompt], sampling)
    text = sample.prompt + sample.completion
    tries = [f'{infer} --prompt "{prompt or "Once"}"']
  reporter.end_progress()
  reporter.log("a sample:")
  if reporter.writes:
    print(text, flush=True)
    (run.path / SAMPLE).write_text(f"{text}\n", "utf-8")
  tries.append(f"python train.py --name=longer --training.num_steps={2 * run.step}")
  tries.append(f"tensorboard --logdir {run.cfg.runs_dir}   (pip install tensorboard)")
  reporter.log("next, try:\n" + "\n".join(f"  {line}" for line in tries))
