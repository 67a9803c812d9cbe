# SPDX-License-Identifier: Apache-2.0
"""What the compiler makes of a training step on a CPU."""

import re

from meshes import mesh_of

from flaxlm.config import DataConfig, ModelConfig, OptimizerConfig, TrainingConfig
from flaxlm.nn.models import build_model
from flaxlm.training.optimizer import build_optimizer
from flaxlm.training.step import abstract_batch, abstract_state, jit_train_step


def test_an_update_copies_neither_parameters_nor_moments():
  """They are overwritten where they are: a copy of both moments is a fifth of an update."""
  cfg = ModelConfig(depth=1, width=8, num_heads=2, vocab_size=16, context=8).resolve()
  model, mesh = build_model(cfg), mesh_of()
  optimizer = build_optimizer(OptimizerConfig(), 10)
  step = jit_train_step(model, optimizer, TrainingConfig(), mesh)
  batch = abstract_batch(DataConfig(seq_len=8, batch_size=2), mesh)
  program = step.lower(abstract_state(model, optimizer, mesh), batch).compile().as_text()
  assert re.search(r"%state_opt_state\S*mu\S*embedding", program)
  assert not re.findall(r"copy\(%state_(?:params|opt_state)\S*(?:kernel|table)", program)
