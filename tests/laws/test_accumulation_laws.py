# SPDX-License-Identifier: Apache-2.0
"""Parts of a batch, on members of `data`: summed once, and the same as on one device."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from conftest import fuzz, slow
from meshes import mesh_of
from test_training_laws import (
  CFG,
  EXPERTS,
  OTHERS,
  assert_same,
  loss_and_gradient_on,
  on_one,
)

from flaxlm.config import DataConfig, OptimizerConfig, TrainingConfig
from flaxlm.nn.models import build_model
from flaxlm.planning.collectives import find_collectives
from flaxlm.sharding import sums_once
from flaxlm.training.optimizer import build_optimizer
from flaxlm.training.step import abstract_batch, abstract_state, jit_train_step

TWICE = TrainingConfig(scanned=True, accumulation_steps=2)


def sent_over_data(mesh, run) -> float:
  """Bytes that a compiled training step sends over `data` of each byte of the parameters
  on a device."""
  model, optimizer = build_model(CFG, run), build_optimizer(OptimizerConfig(), 10)
  step = jit_train_step(model, optimizer, run, mesh)
  state = abstract_state(model, optimizer, mesh)
  batch = abstract_batch(DataConfig(seq_len=16, batch_size=32), mesh)
  text = step.lower(state, batch).compile().as_text()
  found = find_collectives(text, dict(mesh.shape))
  share = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
  held = sum(map(share, jax.tree.leaves(state.params)))
  return sum(one.bytes for one in found if "data" in one.axes) / held


@pytest.mark.parametrize(
  ("sizes", "parts"),
  [
    (dict(data=2, fsdp=2), 4),
    fuzz(dict(data=2, tensor=2), 2),
    slow(dict(stage=2, data=2), 1),
    slow(dict(stage=2, data=2), 2),
    fuzz(dict(stage=2, data=2, fsdp=2), 2),
  ],
  ids=str,
)
def test_gradients_are_summed_over_data_once(sizes, parts):
  run, mesh = dataclasses.replace(TWICE, accumulation_steps=parts), mesh_of(**sizes)
  if parts > 1 and not sums_once(mesh.shape, parts):
    pytest.skip("XLA cannot do so with this jaxlib: see sharding/schedule.py")
  # An all-reduce sends twice (n - 1) / n: over two members as much as there is.
  # A pipeline also sums what all members of `data` share (1.13 in all).
  assert 0.98 < sent_over_data(mesh, run) < 1.2


def test_one_part_is_left_to_the_compiler():
  """It sums each layer's gradient while it computes the next one."""
  assert not sums_once(dict(data=4), 1)
  assert not sums_once(dict(fsdp=4), 2)
  assert not sums_once({}, 2)
  assert sums_once(dict(data=4), 2)
  assert not sums_once(dict(data=4), 2, "cudnn")
  is_old = jax.__version_info__ < (0, 11)
  assert sums_once(dict(data=4), 2, "splash") != is_old
  assert sums_once(dict(data=4, stage=2), 2) == is_old


@pytest.mark.parametrize(
  ("changes", "sizes"),
  [
    (dict(dropout=0.3), dict(data=2, fsdp=2)),
    slow(dict(dropout=0.3, family="rnn", cell="gru"), dict(data=4, fsdp=2)),
    fuzz(dict(family="rnn"), dict(data=4, fsdp=2)),
    slow(dict(positions="learned", num_kv_heads=4), dict(data=2, fsdp=2, tensor=2)),
    slow(OTHERS["encoder_decoder"], dict(data=2, fsdp=2, tensor=2)),
    fuzz(OTHERS["encoder"], dict(data=2, context=2, tensor=2)),
    slow(dict(moe=EXPERTS), dict(data=2, fsdp=2, expert=2)),
    fuzz(OTHERS["capacity"], dict(data=2, expert=2)),
    fuzz(dict(moe=EXPERTS), dict(stage=2, data=2, expert=2)),
    fuzz(dict(tied_embeddings=True), dict(stage=2, data=2, tensor=2)),
  ],
  ids=str,
)
def test_parts_on_members_equal_parts_on_one_device(changes, sizes):
  """With the same units dropped, wherever rows lie."""
  cfg = dataclasses.replace(CFG, **changes)
  on_mesh = loss_and_gradient_on(mesh_of(**sizes), cfg, TWICE)
  assert_same(on_mesh, on_one(cfg, TWICE))
  if cfg.dropout:
    loss, _ = on_one(dataclasses.replace(cfg, dropout=0.0), TWICE)
    assert abs(loss - on_mesh[0]) > 1e-3 * np.abs(loss), "nothing was dropped"


@pytest.mark.slow
def test_dropout_in_a_pipeline_is_the_same_with_copies():
  """It did not compile with remat, and dropped other units without."""
  cfg = dataclasses.replace(CFG, dropout=0.3)
  run = dataclasses.replace(TWICE, remat="full")
  alone = loss_and_gradient_on(mesh_of(stage=2), cfg, run)
  assert_same(loss_and_gradient_on(mesh_of(stage=2, data=2), cfg, run), alone)
