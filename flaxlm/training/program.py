# SPDX-License-Identifier: Apache-2.0
"""What runs on the devices: the model, its compiled training step, the state of step 0.

Compiling takes longer than preparing data, so it starts in a thread as soon as the size of
the vocabulary is known.
"""

import dataclasses
import math
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flaxlm.checkpoint.store import CheckpointStore
from flaxlm.config import Config, ResolvedConfig, ResolvedModel
from flaxlm.decoding.loading import load_params
from flaxlm.errors import CheckpointError, ConfigError, OutOfMemoryError
from flaxlm.nn.base import LanguageModel
from flaxlm.nn.execution import Execution
from flaxlm.nn.kernels.paths import Path as AttentionPath
from flaxlm.nn.kernels.paths import training_path
from flaxlm.nn.lora import boxed_adapters, freeze, init_adapters
from flaxlm.nn.models import abstract_params, build_model
from flaxlm.origin import COMPARES, HAS_ADAPTERS, Origin, located
from flaxlm.platform import fused_kernel, host_memory
from flaxlm.runs import CHECKPOINTS
from flaxlm.sharding import check_replication, whole_sizes
from flaxlm.tokenizers import expected_vocab_size
from flaxlm.training.optimizer import Optimizer, build_optimizer
from flaxlm.training.rewards import Judge, load_judge
from flaxlm.training.step import (
  TrainState,
  TrainStep,
  abstract_batch,
  abstract_state,
  init_state,
  jit_train_step,
  shardings_of,
)


class Program(NamedTuple):
  """A compiled training step, the model and optimizer in it, and the state of step 0."""

  model: LanguageModel
  optimizer: Optimizer
  train_step: TrainStep
  state: TrainState | None  # None for a run that resumes: its state is stored


class Compiler:
  """Compiles programs of one run in a thread, one for each model that is asked for."""

  def __init__(self, cfg: Config, mesh: Mesh, fresh: bool):
    """`fresh` makes the state of step 0, too."""
    self.cfg, self.mesh, self.fresh = cfg, mesh, fresh
    self._thread = ThreadPoolExecutor(1, "compile")
    self._programs: dict[ResolvedModel, Future[Program]] = {}

  def start(self, model_cfg: ResolvedModel) -> None:
    """Starts compiling and returns at once; once for each model."""
    if model_cfg not in self._programs:
      self._programs[model_cfg] = self._thread.submit(
        build_program, model_cfg, self.cfg, self.mesh, self.fresh
      )

  def program(self, model_cfg: ResolvedModel) -> Program:
    """Waits for the program of a model. Raises what compiling it raised."""
    self.start(model_cfg)
    future = self._programs.pop(model_cfg)
    self._programs.clear()  # a wrong guess holds a whole state on the devices
    return future.result()

  def __enter__(self) -> "Compiler":
    return self

  def __exit__(self, *_: object) -> None:
    self._thread.shutdown(cancel_futures=True)


def build_program(
  model_cfg: ResolvedModel, cfg: Config, mesh: Mesh, fresh: bool
) -> Program:
  """Compiles the training step of a config; `fresh` makes the state of step 0, too."""
  model = build_model(model_cfg, cfg.training, fused_kernel())
  optimizer = build_optimizer(cfg.optimizer, cfg.training.num_steps)
  abstract = abstract_state_of(cfg, model, optimizer, mesh)
  base = abstract.frozen or abstract.params
  check_replication(base, mesh.shape, cfg.training.replication_tolerance)
  if jax.default_backend() == "cpu":
    check_memory(abstract, host_memory())
  state = init_state(model, optimizer, mesh, cfg.seed) if fresh else None
  what = (cfg.lora, cfg.active_dpo)
  train_step = jit_train_step(model, optimizer, cfg.training, mesh, *what)
  train_step.lower(abstract, abstract_batch(cfg.data, mesh)).compile()
  return Program(model, optimizer, train_step, state)


def abstract_state_of(
  cfg: Config, model: LanguageModel, optimizer: Optimizer, mesh: Mesh
) -> TrainState:
  """`abstract_state` of a config."""
  has_reference = cfg.active_dpo is not None
  return abstract_state(model, optimizer, mesh, cfg.lora, has_reference)


def check_memory(state: TrainState, available: int) -> None:
  """Raises `OutOfMemoryError` for a state that, with its gradient, is larger than a host's
  memory of `available` bytes: the system would end the process without a word."""

  def size(tree: Any) -> int:
    return sum(
      math.prod(x.sharding.shard_shape(x.shape))
      * x.dtype.itemsize
      * len(x.sharding.addressable_devices)
      for x in jax.tree.leaves(tree)
    )

  needed = size(state) + size(state.params)
  if needed > available:
    raise OutOfMemoryError(
      f"parameters, optimizer state and gradient take {needed / 1e9:,.1f} GB of the "
      f"{available / 1e9:,.1f} GB of memory here",
      "make model.width or model.depth smaller; `flaxlm plan` says what a model takes",
    )


def restore_state(
  store: CheckpointStore, step: int, program: Program, mesh: Mesh, cfg: Config
) -> TrainState:
  """The stored state of a step, sharded over the mesh as a new one would be.

  Adapters get their base from the run that they began from, and preferences their
  reference; see `located`.
  """
  target = abstract_state_of(cfg, program.model, program.optimizer, mesh)
  items = store.restore(step, params=target.params, opt_state=target.opt_state)
  counter = jax.device_put(np.int32(step), target.step.sharding)
  frozen = reference = None
  load = lambda why: load_params(
    located(cfg.run_dir, why), abstract_params(program.model, mesh), mesh
  )
  if cfg.lora.rank:
    frozen = freeze(load(HAS_ADAPTERS), target.frozen, cfg.lora)
  elif target.reference is not None:
    reference = load(COMPARES)
  return TrainState(counter, items["params"], items["opt_state"], frozen, reference)


def begin_state(origin: Origin, program: Program, mesh: Mesh, cfg: Config) -> TrainState:
  """The state of step 0 with the parameters of another run, sharded as a new one would be.

  With `lora` they are frozen, under new adapters. Preferences are compared with them: then
  there is a copy, but for adapters. The optimizer's state is new or, with
  `init_optimizer`, that of the other run, whose learning rate begins anew. Raises
  `CheckpointError` if the other run has no such state, or it does not fit.
  """
  optimizer = program.optimizer
  target = abstract_state_of(cfg, program.model, optimizer, mesh)
  load = lambda: load_params(origin, abstract_params(program.model, mesh), mesh)
  if cfg.lora.rank:  # nobody else keeps the base: as int8 it takes a quarter
    frozen = freeze(load(), target.frozen, cfg.lora)
    params = init_adapters(target.params, cfg.seed)
  else:
    params, frozen = load(), None
  reference = None if target.reference is None else jax.tree.map(jnp.copy, params)
  if cfg.init_optimizer:
    opt_state = restart_schedules(load_opt_state(origin, target.opt_state))
  else:
    init = jax.jit(optimizer.init, out_shardings=shardings_of(target.opt_state))
    opt_state = init(params)
  counter = jax.device_put(np.int32(0), target.step.sharding)
  return TrainState(counter, params, opt_state, frozen, reference)


def load_opt_state(origin: Origin, target: Any) -> Any:
  store = CheckpointStore(origin.path / CHECKPOINTS)
  try:
    return store.restore(origin.step, opt_state=target)["opt_state"]
  except CheckpointError as e:
    raise CheckpointError(
      f"init_optimizer: the optimizer's state cannot be taken over: {e.cause}",
      "leave out --init-optimizer, or use the optimizer that the run was trained with",
    ) from e
  finally:
    store.close()


def restart_schedules(opt_state: Any) -> Any:
  """The state with every schedule at its start. Moments keep the steps that they count."""
  is_schedule = lambda x: getattr(x, "_fields", None) == ("count",)
  restart = lambda x: jax.tree.map(jnp.zeros_like, x) if is_schedule(x) else x
  return jax.tree.map(restart, opt_state, is_leaf=is_schedule)


def resolve_model(
  cfg: Config, num_ids: int, mesh: Mesh, before: ResolvedConfig | None
) -> ResolvedModel:
  """The model with every number known, for a tokenizer of `num_ids` ids.

  A new run pads its vocabulary for the mesh. A run that resumes, from the config `before`,
  keeps the rows that it has.
  """
  model = cfg.model.resolve(num_ids)
  if before is not None and before.model.num_ids == model.num_ids:
    return dataclasses.replace(model, vocab_size=before.model.vocab_size)
  return model.padded(whole_sizes(mesh.shape)["tensor"])


def check_base(cfg: Config) -> None:
  """Raises `ConfigError` for adapters or preferences without a base, and for adapters of
  nothing."""
  if cfg.active_dpo is not None and cfg.init is None:
    raise ConfigError(
      "data.objective=preference compares with the run that training begins from",
      "add --init RUN",
    )
  if not cfg.lora.rank:
    return
  if cfg.init is None:
    raise ConfigError(
      f"lora.rank={cfg.lora.rank} adapts the parameters of another run", "add --init RUN"
    )
  boxed_adapters(build_model(expected_model(cfg), cfg.training), cfg.lora)


def find_judge(cfg: Config) -> Judge | None:
  """What judges completions, if rewards are learnt from.

  Raises `ConfigError` for rewards without a model that can earn some, and for a function
  that cannot be loaded.
  """
  if cfg.data.objective != "reward":
    return None
  if cfg.init is None:
    raise ConfigError(
      "data.objective=reward is for a model that answers some questions rightly already",
      "add --init RUN",
    )
  return load_judge(cfg.reward.function)


def expected_model(cfg: Config) -> ResolvedModel:
  """The model with every number known, as far as can be told before the data are read."""
  if isinstance(cfg.model, ResolvedModel):  # that of another run
    return cfg.model
  return cfg.model.resolve(expected_vocab_size(cfg.tokenizer))


def choose_attention(cfg: Config, mesh: Mesh) -> AttentionPath | None:
  """The path that attention takes in a training step; None for an RNN.

  Raises `ConfigError` for a path that is asked for but cannot compute this model here.
  """
  model_cfg = expected_model(cfg)
  execution = Execution.of(cfg.training, fused_kernel())
  lengths = (cfg.data.seq_len, cfg.source_length)
  return training_path(model_cfg, execution, mesh.shape, *lengths)
