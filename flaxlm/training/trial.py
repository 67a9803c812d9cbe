# SPDX-License-Identifier: Apache-2.0
"""A small model that is trained for so many seconds, and what it reaches: nothing is kept.

This is how tokenizers are compared. The models are alike but for their vocabularies, and
have the same time; one that reads more bytes in a token reads more text in it.
"""

import dataclasses
import time
from typing import NamedTuple

import jax
import numpy as np

from flaxlm.config import Config
from flaxlm.data.corpus import Log
from flaxlm.data.prepare import prepare_data
from flaxlm.data.storage import data_dir
from flaxlm.errors import NonFiniteError
from flaxlm.platform import start_jax
from flaxlm.sharding import check_batch, make_mesh, mesh_for
from flaxlm.training.evaluation import Evaluator, batches_by_source, split_batches
from flaxlm.training.program import build_program, resolve_model
from flaxlm.training.step import put_batch


class Trial(NamedTuple):
  """What a model has reached on all held-out text."""

  bits_per_byte: float
  loss: float  # nats per token
  num_steps: int
  num_parameters: int
  unknown: float  # share of the held-out tokens


def train_for(cfg: Config, seconds: float, log: Log) -> Trial:
  """Trains `cfg` for `seconds`, at least one step, and evaluates it once.

  Compiling and preparing data take no time of it. The learning rate stays what it is after
  the warm-up: nobody knows how many steps there will be. Raises `NonFiniteError`.
  """
  constant = dataclasses.replace(cfg.optimizer, schedule="constant")
  cfg = dataclasses.replace(cfg, optimizer=constant)
  start_jax(cfg.simulated_devices, data_dir() / "xla")
  mesh = mesh_for(make_mesh(cfg.mesh), cfg.model)
  check_batch(cfg, mesh.shape)
  prepared = prepare_data(cfg.data, cfg.tokenizer, log)
  num_ids = prepared.tokenizer.vocab_size
  model_cfg = resolve_model(cfg, num_ids, mesh, None)
  resolved = dataclasses.replace(cfg.resolve(num_ids), model=model_cfg)
  program = build_program(model_cfg, cfg, mesh, fresh=True)
  state, seed = program.state, np.uint32(cfg.seed)
  assert state is not None, "it is fresh"
  batches = split_batches(resolved, prepared.train, mesh, shuffled=True)
  validation = batches_by_source(resolved, prepared.validation, mesh)
  evaluator = Evaluator(program.model, prepared.tokenizer, validation, None, mesh)
  num_steps, started = 0, time.perf_counter()
  with batches.iterate() as rows:
    for batch in rows:
      state, metrics = program.train_step(state, put_batch(batch, mesh), seed)
      if not bool(metrics["finite"]):  # waits for the step
        raise NonFiniteError(
          f"step {num_steps + 1} is NaN or infinite", "lower --optimizer.learning-rate"
        )
      num_steps += 1
      if time.perf_counter() - started >= seconds:
        break
  values = evaluator(state.params)
  return Trial(
    values["eval/bits_per_byte"],
    values["eval/loss"],
    num_steps,
    sum(x.size for x in jax.tree.leaves(state.params)),
    values.get("eval/unknown", 0.0),
  )
