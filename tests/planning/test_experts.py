# SPDX-License-Identifier: Apache-2.0
"""Experts on several devices: the fullest one, and what really travels to them."""

import dataclasses
import math

import numpy as np
import pytest
from conftest import fuzz

from flaxlm.config import (
  Config,
  DataConfig,
  ModelConfig,
  MoEConfig,
  ResolvedConfig,
  TrainingConfig,
  load_config,
  mesh_shape,
)
from flaxlm.devices import ANY, find_device
from flaxlm.planning.compile import compile_step
from flaxlm.planning.decoding import plan_decoding
from flaxlm.planning.experts import SPREAD, awaited_flops, fullest_share
from flaxlm.planning.network import network_bytes
from flaxlm.planning.planner import resolve
from flaxlm.planning.roofline import compute_seconds, plan_training

MIXTRAL = resolve(load_config("mixtral_8x7b"))


def with_capacity(cfg: ResolvedConfig, factor: float | None) -> ResolvedConfig:
  moe = dataclasses.replace(cfg.model.moe, capacity_factor=factor)
  return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, moe=moe))


def test_the_fullest_of_some_members():
  """By hand: of 4 members with 2 experts each, 1 + spread / sqrt(2) x 1.05; and nobody
  waits for others on one device, or where places are counted."""
  share = fullest_share(MIXTRAL, mesh_shape({"expert": 4}))
  assert share == pytest.approx(1 + SPREAD / math.sqrt(2) * 1.049, abs=0.01)
  assert fullest_share(MIXTRAL, mesh_shape({"fsdp": 8})) == 1
  assert fullest_share(with_capacity(MIXTRAL, 1.25), mesh_shape({"expert": 4})) == 1
  shares = [fullest_share(MIXTRAL, mesh_shape({"expert": n})) for n in (2, 4, 8)]
  assert shares == sorted(shares)


@pytest.mark.parametrize("members", [2, 4, 8])
def test_the_fullest_of_many_draws(members: int):
  """Loads drawn as the model says: mean of the largest member's, over an even share."""
  rng, E, choices = np.random.default_rng(0), 8, 4096 * 2
  data = dataclasses.replace(MIXTRAL.data, batch_size=members, seq_len=4096 // members)
  cfg = dataclasses.replace(MIXTRAL, data=data)
  chances = np.clip(1 + SPREAD * rng.standard_normal((2000, E)), 0, None)
  chances /= chances.sum(1, keepdims=True)
  loads = rng.multinomial(choices, chances).reshape(2000, members, -1).sum(2)
  drawn = (loads.max(1) * members / choices).mean()
  share = fullest_share(cfg, mesh_shape({"expert": members}))
  assert share - 1 == pytest.approx(drawn - 1, rel=0.15)


def test_a_step_waits_for_the_fullest():
  """Three products of an expert, forward, twice that backward, and again under remat."""
  sizes, tpu = mesh_shape({"expert": 8}), find_device("v5p")
  cfg = dataclasses.replace(
    MIXTRAL, training=dataclasses.replace(MIXTRAL.training, remat="full")
  )
  tokens = cfg.data.batch_size * cfg.data.seq_len
  served = 2 * tokens * 32 * 2 * 3 * 4096 * 14_336
  share = fullest_share(cfg, sizes)
  assert awaited_flops(cfg, sizes) == pytest.approx(4 * served * (share - 1))
  plan = plan_training(cfg, sizes, tpu)
  assert plan.fullest_share == share > 1.1
  even = compute_seconds(with_capacity(cfg, 1.0), sizes, tpu, plan.cost)
  rate = tpu.attainable_flops("bfloat16")
  assert rate and even and plan.times.compute
  waited = 4 * served * (share - 1) / rate / 8
  assert plan.times.compute - even == pytest.approx(waited, rel=1e-6)


@pytest.mark.parametrize(("remat", "times"), [("none", 4), ("full", 5)])
def test_tokens_travel_to_all_members(remat: str, times: int):
  """All tokens to all others, and sums back; gradients of all but the experts, in float32.
  With a capacity the places of 2 choices, at 1.25 times the room."""
  training = dataclasses.replace(MIXTRAL.training, remat=remat, accumulation_steps=1)
  cfg = dataclasses.replace(MIXTRAL, training=training)
  tokens = cfg.data.batch_size * cfg.data.seq_len // 8
  vectors, experts = tokens * 4096 * 2 * 32, 32 * 8 * 3 * 4096 * 14_336
  beside = 2 * 4 * (46_702_792_704 - experts) * 7 / 8
  found = network_bytes(cfg, mesh_shape({"expert": 8}))["expert"]
  assert found == pytest.approx(times * vectors * 7 + beside, rel=1e-6)
  placed = network_bytes(with_capacity(cfg, 1.25), mesh_shape({"expert": 8}))["expert"]
  times += remat == "full"
  assert placed == pytest.approx(times * vectors * 2.5 * 7 / 8 + beside, rel=1e-6)


def test_decoding_gathers_rows_and_scatters_sums():
  device = dataclasses.replace(find_device("v5p"), collective_seconds=0.0)
  point = lambda n: plan_decoding(MIXTRAL, mesh_shape({"expert": n}), device, 64, 128)
  slow = dataclasses.replace(device, link_bandwidth=1.0)
  found = plan_decoding(MIXTRAL, mesh_shape({"expert": 8}), slow, 64, 128).seconds
  assert found == pytest.approx(2 * 8 * 4096 * 2 * 32 * 7 / 3, rel=0.01)  # three axes
  assert point(8).seconds < point(1).seconds


TINY = resolve(
  Config(
    model=ModelConfig(
      depth=2,
      width=128,
      num_heads=4,
      vocab_size=256,
      context=64,
      moe=MoEConfig(num_experts=4, experts_per_token=2, expert_width=32),
    ),
    data=DataConfig(seq_len=64, batch_size=8),
    training=TrainingConfig(scanned=True),
  )
)


@pytest.mark.slow
@pytest.mark.parametrize(("capacity", "remat"), [(None, "full"), fuzz(1.25, "none")])
def test_what_travels_is_what_the_formula_says(capacity: float | None, remat: str):
  """Counted in the compiled step. Beside the formula: the weights and the numbers of the
  chosen experts, 16 bytes a token for 512 of its vector."""
  training = dataclasses.replace(TINY.training, remat=remat)
  cfg = dataclasses.replace(with_capacity(TINY, capacity), training=training)
  sizes = mesh_shape({"expert": 4})
  compiled = compile_step(cfg, sizes, ANY)
  found = sum(one.bytes for one in compiled.collectives)
  assert all(one.axes == "expert" for one in compiled.collectives)
  kinds = {one.kind for one in compiled.collectives}
  assert ("all-to-all" in kinds) is (capacity is not None)
  assert found == pytest.approx(network_bytes(cfg, sizes)["expert"], rel=0.03)
