# SPDX-License-Identifier: Apache-2.0
"""The training loop: the host's side of training, with all its effects.

`train` is the whole story, one chapter after the other. Their order spares the user's time:
config, devices, then files and data, while the step compiles in a thread, so that most
mistakes show within seconds.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from flaxlm.checkpoint.store import CheckpointStore
from flaxlm.config import (
  Config,
  ResolvedConfig,
  TokenizerConfig,
  check_config,
  difference,
  slow_axes,
)
from flaxlm.data.batches import Batches
from flaxlm.data.corpus import SPLITS, Log
from flaxlm.data.prepare import Prepared, prepare_data
from flaxlm.data.questions import QuestionBatches, Questions, prepare_questions
from flaxlm.data.storage import data_dir, to_stderr
from flaxlm.data.stores import MixedStore, PairStore
from flaxlm.decoding.loading import Run
from flaxlm.distributed.start import joined
from flaxlm.errors import ConfigError
from flaxlm.nn.base import LanguageModel
from flaxlm.nn.kernels.paths import Path as AttentionPath
from flaxlm.nn.lora import merged, num_frozen, unadaptable
from flaxlm.nn.models import abstract_params, boxed_shapes, build_model
from flaxlm.origin import adopt, read_origin
from flaxlm.platform import Flag, check_matmul, start_jax
from flaxlm.runs import CHECKPOINTS, check_same_experiment, locked, make_room_after
from flaxlm.sharding import (
  KV_COPIES,
  check_batch,
  describe_mesh,
  make_mesh,
  mesh_for,
  whole_sizes,
)
from flaxlm.tokenizers import expected_vocab_size
from flaxlm.training.clock import MFU, Clock, seconds_at_peak, spent_before
from flaxlm.training.closing import sample, show_sample
from flaxlm.training.directory import find_start, tokenizer_to_use, write_files
from flaxlm.training.evaluation import Evaluator, batches_by_source, split_batches
from flaxlm.training.program import (
  Compiler,
  begin_state,
  check_base,
  choose_attention,
  find_judge,
  resolve_model,
  restore_state,
)
from flaxlm.training.reporting import Reporter
from flaxlm.training.rewards import Judge
from flaxlm.training.rollouts import AnswerEvaluator, Rollouts, Writer
from flaxlm.training.signals import stop_signals
from flaxlm.training.step import TrainState
from flaxlm.training.trackers import check_tracker
from flaxlm.training.tracking import start_tracking
from flaxlm.training.trainer import Trainer
from flaxlm.training.watchdog import Watchdog


def train(cfg: Config, arguments: Sequence[str] = ()) -> int:
  """Trains `cfg` into its run directory, resuming what is there; returns the exit code.

  `arguments` are those of the command line that named the config, for the hints at the end.
  """
  begun = time.perf_counter()
  cfg = adopt(cfg)
  check_config(cfg)
  if cfg.name is None:
    raise ConfigError("name is none, and a run has one", 'as in Config(name="mine")')
  check_base(cfg)
  check_tracker(cfg)
  judge = find_judge(cfg)
  flags = start_jax(cfg.simulated_devices, data_dir() / "xla")
  with joined(cfg) as peers, contextlib.ExitStack() as stack:
    # Several processes stop together. One alone ends at once, until it trains.
    if peers.num_processes > 1:
      stop_at = stack.enter_context(stop_signals(peers))
    check_alone(cfg, peers.num_processes)
    # -- Devices.
    mesh = mesh_for(make_mesh(cfg.mesh), cfg.model)
    check_batch(cfg, mesh.shape)
    check_matmul(cfg.training.matmul)
    attention = choose_attention(cfg, mesh)

    # -- The run directory: ours alone from here on.
    stack.enter_context(locked(cfg.run_dir, peers.process))
    start = find_start(cfg, peers)
    first_step, before = start.step, start.before

    # -- Data: their tokenizer decides the vocabulary. Its size can be told before, except
    # for the smallest corpora, so the program compiles while the data are prepared.
    compiler = stack.enter_context(Compiler(cfg, mesh, fresh=start.is_random))
    tokenizer_cfg = tokenizer_to_use(cfg, start.origin)
    guess = resolve_model(cfg, expected_vocab_size(tokenizer_cfg), mesh, before)
    # Several processes compile later, together: some may find their data prepared already.
    is_alone = peers.num_processes == 1
    prepared = prepare_corpus(
      cfg,
      tokenizer_cfg,
      judge,
      log=to_stderr if peers.process == 0 else lambda line: None,
      meanwhile=lambda: compiler.start(guess) if is_alone else None,
    )
    peers.agree(f"the text of {cfg.data.corpus}", prepared.fingerprint)
    num_ids = prepared.tokenizer.vocab_size
    model_cfg = resolve_model(cfg, num_ids, mesh, before)
    cfg = dataclasses.replace(cfg.resolve(num_ids), model=model_cfg)
    batches = training_batches(cfg, prepared, mesh)

    # -- Files: what is stored fits this config, and the run says what it is.
    store = CheckpointStore(cfg.run_dir / CHECKPOINTS, cfg.checkpoint.keep)
    stack.callback(store.close)
    if before is not None:
      stored_corpus = store.restore_progress(first_step)["corpus"]
      check_same_experiment(before, cfg, stored_corpus, prepared.fingerprint)
      peers.decide(lambda: make_room_after(store.directory, first_step))
      store.reload()
    if peers.num_processes == 1:
      stop_at = stack.enter_context(stop_signals(peers))
    compiler.start(cfg.model)
    clock = Clock(begun, spent_before(cfg.run_dir, first_step), seconds_at_peak(cfg, mesh))
    if peers.process == 0:
      write_files(cfg, prepared, start)
    reporter = Reporter(
      cfg.run_dir, first_step, cfg.training.num_steps, writes=peers.process == 0
    )
    stack.callback(reporter.close)
    if peers.process == 0:
      reporter.tracker = start_tracking(cfg, first_step, reporter.log)

    # -- State: born sharded, or restored as it was.
    program = compiler.program(cfg.model)
    state = program.state
    if start.origin is not None:
      state = begin_state(start.origin, program, mesh, cfg)
    elif state is None:
      state = restore_state(store, first_step, program, mesh, cfg)
    report_start(reporter, cfg, before, first_step, flags, attention)
    reporter.log(describe(cfg, state, prepared, mesh))
    evaluator, rollouts = judges(cfg, prepared, judge, program.model, mesh)
    if clock.seconds_at_peak is None:
      reporter.log(describe_no_mfu(cfg))
    for note in notes_of(batches, evaluator):
      reporter.log(note)

    # -- Steps.
    asked = held_out_prompt(prepared)
    as_run = functools.partial(run_of, cfg, prepared, program.model, mesh)
    with Watchdog(cfg.training.hang_seconds, peers.leave) as watchdog:
      trainer = Trainer(
        cfg,
        prepared.fingerprint,
        mesh,
        program.train_step,
        evaluator,
        store,
        reporter,
        watchdog,
        rollouts,
        clock,
        sampler=lambda state: sample(as_run(state), asked)[0],
      )
      state, exit_code = trainer.steps(state, first_step, batches, stop_at)
      reporter.exit_code = exit_code

    # -- A word at the end.
    if exit_code == 0:
      show_sample(as_run(state), reporter, arguments, asked)
    return exit_code


def check_alone(cfg: Config, num_processes: int) -> None:
  """Raises `ConfigError` for rewards in a job of several processes."""
  if cfg.data.objective == "reward" and num_processes > 1:
    raise ConfigError(
      f"data.objective=reward draws in one process, and the job has {num_processes}",
      "start one; it may have many devices",
    )


def prepare_corpus(
  cfg: Config,
  tokenizer_cfg: TokenizerConfig,
  judge: Judge | None,
  log: Log,
  meanwhile: Callable[[], object],
) -> Prepared | Questions:
  """The corpus, ready to be read or, for rewards, to be asked; `meanwhile` is called before
  long work."""
  if judge is not None:
    assert tokenizer_cfg.path is not None, "the run begins from another"
    folder = Path(tokenizer_cfg.path).parent
    return prepare_questions(cfg, cfg.data.corpus, folder, judge.digest, log)
  return prepare_data(cfg.data, tokenizer_cfg, log, meanwhile)


def training_batches(
  cfg: ResolvedConfig, prepared: Prepared | Questions, mesh: Mesh
) -> Batches | QuestionBatches:
  """What each step reads."""
  if isinstance(prepared, Prepared):
    return split_batches(cfg, prepared.train, mesh, shuffled=True)
  size = cfg.data.batch_size // cfg.reward.num_samples
  return QuestionBatches(
    prepared.splits["train"], size, cfg.seed, cfg.data.num_epochs, prepared.notes
  )


def judges(
  cfg: ResolvedConfig,
  prepared: Prepared | Questions,
  judge: Judge | None,
  model: LanguageModel,
  mesh: Mesh,
) -> tuple[Evaluator | AnswerEvaluator, Rollouts | None]:
  """What evaluates, and what draws and judges the batches of rewards."""
  most = cfg.training.eval_batches
  if isinstance(prepared, Prepared):
    validation = batches_by_source(cfg, prepared.validation, mesh)
    read = (model, prepared.tokenizer, validation, most, mesh)
    return Evaluator(*read, cfg.active_dpo, counts_loads(cfg)), None
  assert judge is not None
  writer = Writer(Run(cfg.run_dir, cfg, prepared.tokenizer, 0, model, None, mesh))
  held_out = prepared.splits["validation"]
  return AnswerEvaluator(writer, judge, held_out, most), Rollouts(writer, judge)


def notes_of(
  batches: Batches | QuestionBatches, evaluator: Evaluator | AnswerEvaluator
) -> list[str]:
  """What happened to text of both splits that did not fit; notes of prompts are of all."""
  if isinstance(evaluator, AnswerEvaluator):
    return [*batches.notes]
  splits = zip(SPLITS, (batches.notes, evaluator.notes), strict=True)
  return [f"{split}: {note}" for split, notes in splits for note in notes]


def counts_loads(cfg: Config) -> bool:
  """Whether evaluations count how often each expert is chosen. Stages of a pipeline keep to
  themselves what they choose."""
  has_experts = cfg.training.log_layers and cfg.model.moe.num_experts > 0
  return has_experts and not any(axis.startswith("stage") for axis in cfg.mesh)


def run_of(
  cfg: ResolvedConfig,
  prepared: Prepared | Questions,
  model: LanguageModel,
  mesh: Mesh,
  state: TrainState,
) -> Run:
  """The run as it is by now, its adapters merged into what they adapt."""
  params = state.params
  if state.frozen is not None:
    params = merged(state.frozen, params, abstract_params(model, mesh))
  return Run(cfg.run_dir, cfg, prepared.tokenizer, int(state.step), model, params, mesh)


def held_out_prompt(prepared: Prepared | Questions) -> list[int] | None:
  """The first prompt that is held out, if conversations are learnt or asked."""
  if isinstance(prepared, Questions):
    return [*prepared.splits["validation"][0].ids]
  store = prepared.validation
  if isinstance(store, MixedStore):
    store = next(iter(store.sources.values()))
  if isinstance(store, PairStore) or store.weights is None:
    return None
  end = int(store.bounds[1])
  return store.tokens[: int(np.argmax(store.weights[:end]))].tolist()


def report_start(
  reporter: Reporter,
  cfg: ResolvedConfig,
  before: ResolvedConfig | None,
  first_step: int,
  flags: Sequence[Flag],
  attention: AttentionPath | None,
) -> None:
  """Logs where the run starts from, what was chosen for it, and what it will not reach.

  `before` is the config with which it trained so far.
  """
  num_steps = cfg.training.num_steps
  if first_step and first_step >= num_steps:
    reporter.log(
      f"{cfg.run_dir}: already finished at step {first_step}: nothing to train. To train "
      "another run give it a --name of its own; to train this one longer, "
      f"--training.num-steps={2 * first_step}"
    )
  elif not num_steps:
    reporter.log(f"{cfg.run_dir}: training.num_steps=0: nothing to train")
  else:
    if before is not None:
      reporter.log(f"resuming {cfg.run_dir} at step {first_step}")
    if (origin := read_origin(cfg.run_dir)) is not None:
      reporter.log(f"{cfg.run_dir} begins from {origin}")
    lines = (*changes(before or cfg, cfg), *unreached(cfg), *unread(cfg), *unadapted(cfg))
    if cfg.training.log_layers and cfg.model.moe.num_experts and not counts_loads(cfg):
      lines = (*lines, "training.log_layers: no load of experts, as a pipeline has stages")
    for line in lines:
      reporter.log(line)
  for flag in flags:
    reporter.log(flag.line)
  if cfg.model.padding:
    reporter.log(cfg.model.padding)
  if attention is not None and jax.default_backend() != "cpu":
    why = f": {attention.why}" if attention.why else ""
    reporter.log(f"attention: {attention.name}{why}")


def changes(before: ResolvedConfig, cfg: ResolvedConfig) -> Iterator[str]:
  """A line if the rest of a run follows another schedule than what it has done."""
  changed = [
    f"{name} was {old}, now {new}"
    for name, (old, new) in difference(before, cfg).items()
    if name.startswith("optimizer.") or name == "training.num_steps"
  ]
  if changed:
    yield f"the learning rate and the update from here on: {', '.join(changed)}"


def unreached(cfg: ResolvedConfig) -> Iterator[str]:
  """A line for what the run is too short for."""
  num_steps, warmup = cfg.training.num_steps, cfg.optimizer.warmup_steps
  if warmup >= num_steps:
    yield (
      f"optimizer.warmup_steps={warmup} is not less than training.num_steps={num_steps}: "
      f"the learning rate ends at {(num_steps - 1) / warmup:.0%} of "
      f"optimizer.learning_rate={cfg.optimizer.learning_rate:g}"
    )
  if cfg.training.log_every_steps > num_steps:
    yield (
      f"training.log_every_steps={cfg.training.log_every_steps} is more than "
      f"training.num_steps={num_steps}: no train/loss will be written"
    )
  every = cfg.training.sample_every_steps
  if every is not None and every >= num_steps:
    yield (
      f"training.sample_every_steps={every} is not less than training.num_steps="
      f"{num_steps}: there will be no sample but the last"
    )


def unread(cfg: Config) -> Iterator[str]:
  """A line for settings that differ from the defaults, and that nothing reads."""
  objective = cfg.data.objective
  because = f"with data.objective={objective}"
  # What a run begins from has a tokenizer that nobody asked for here.
  is_trained = cfg.tokenizer.path is None or cfg.init is not None
  reads_texts = objective in ("next_token", "masked")
  for prefix, is_read, why in (
    ("lora.", cfg.lora.rank > 0, "with lora.rank=0"),
    ("dpo.", objective == "preference", because),
    ("reward.", objective == "reward", because),
    ("data.text_field", reads_texts, because),
    ("data.mask_fraction", objective == "masked", because),
    ("tokenizer.kind", is_trained, "with tokenizer.path"),
    ("tokenizer.vocab_size", is_trained, "with tokenizer.path"),
    ("track_project", cfg.track != "none", "with track=none"),
  ):
    names = [name for name in difference(Config(), cfg) if name.startswith(prefix)]
    if names and not is_read:
      yield f"not read {why}: {', '.join(names)}"


def unadapted(cfg: ResolvedConfig) -> Iterator[str]:
  """A line for what adapters never change, whatever `lora.targets` says."""
  if cfg.lora.rank:
    boxes = flatten_dict(boxed_shapes(build_model(cfg.model, cfg.training)))
    yield f"no adapters change {', '.join(unadaptable(boxes))}"


def describe_no_mfu(cfg: ResolvedConfig) -> str:
  """Why a run has no MFU: a peak that nobody has published is not guessed."""
  device, dtype = jax.devices()[0].device_kind, cfg.training.dtype
  return f"no {MFU}: the peak of this device ({device}) in {dtype} is not known"


def describe(
  cfg: Config, state: TrainState, prepared: Prepared | Questions, mesh: Mesh
) -> str:
  """One line: the run, its size, its text, and its devices."""
  size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  learns = f"{size(state.params):,} parameters"
  if state.frozen is not None:
    learns += f" of adapters, over {num_frozen(state.frozen):,} that are frozen"
  if state.reference is not None:
    learns += ", and as many of the reference"
  axes = describe_mesh(whole_sizes(mesh.shape), slow_axes(cfg.mesh))
  if copies := mesh.shape.get(KV_COPIES):
    axes += f" with each kv head on {copies} devices"
  device = jax.devices()[0].device_kind
  return (
    f"{cfg.run_dir}: {learns}; {cfg.data.corpus}: {prepared.sizes}; "
    f"{jax.device_count()} {device} device(s){f', mesh {axes}' if mesh.size > 1 else ''}"
  )
