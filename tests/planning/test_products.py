# SPDX-License-Identifier: Apache-2.0
"""The list of products against the closed formulas, and times from measured rates."""

import dataclasses

import pytest

from flaxlm.config import (
  Config,
  DataConfig,
  LoraConfig,
  ModelConfig,
  MoEConfig,
  OptimizerConfig,
  TrainingConfig,
  mesh_shape,
)
from flaxlm.cost import forward_work, step_cost
from flaxlm.devices import ANY, find_device
from flaxlm.planning.products import (
  Product,
  is_listed,
  muon_products,
  narrow_flops,
  training_products,
  weight_products,
)
from flaxlm.planning.roofline import (
  compute_seconds,
  memory_seconds,
  plan_training,
  product_seconds,
)

SMALL = dict(depth=4, width=64, num_heads=4, vocab_size=512, context=256)


def config(**model) -> Config:
  resolved = ModelConfig(**(SMALL | model)).resolve()
  return Config(model=resolved, data=DataConfig(seq_len=256, batch_size=4))


def total(products) -> float:
  return sum(count * product.flops for product, count in products.items())


@pytest.mark.parametrize(
  "model",
  [
    {},
    {"num_kv_heads": 2},
    {"num_kv_heads": 1, "head_dim": 32},
    {"gated": False, "activation": "gelu"},
    {"window": 100, "layer_pattern": "LG"},
    {"tied_embeddings": False},
  ],
)
def test_the_list_adds_up_to_the_executed_flops(model):
  cfg = config(**model)
  assert total(training_products(cfg)) == pytest.approx(step_cost(cfg).executed_flops)


def test_weights_add_up_to_a_forward_pass():
  model = config(num_kv_heads=2).model
  work = forward_work(model, 3, 1)
  assert total(weight_products(model, 3)) == work.matmul + work.head


def test_muon_counts_its_matrices_by_hand():
  """A layer: q, k, v, o (64, 64) and up, gate, down (64, 192); none for the embedding."""
  found = muon_products(config().model)
  n, m = 64, 192
  square, wide = 6 * n**3, 2 * n * n * m * 2 + 2 * n**3
  assert total(found) == 5 * 4 * (4 * square + 3 * wide)
  muon = dataclasses.replace(config(), optimizer=OptimizerConfig(kind="muon"))
  difference = total(training_products(muon)) - total(training_products(config()))
  assert difference == total(found)


def test_gradients_of_a_product():
  assert Product(2, 3, 4, 5).gradients == (Product(2, 4, 3, 5), Product(3, 2, 4, 5))


def test_what_is_not_listed_is_counted_in_one_sum():
  assert is_listed(config())
  assert not is_listed(config(family="encoder"))
  remat = dataclasses.replace(config(), training=TrainingConfig(remat="full"))
  assert not is_listed(remat)


def test_measured_rates_take_the_place_of_the_peak():
  one, other = Product(2, 3, 4), Product(5, 6, 7)
  device = dataclasses.replace(
    ANY, peak_flops={"float32": 100.0}, product_rates={one: 12.0}
  )
  # 2 x 48 FLOPs at 12 a second; 420 at 100.
  assert product_seconds({one: 2, other: 1}, device, "float32") == 8 + 4.2
  assert (
    product_seconds({one: 2}, dataclasses.replace(device, peak_flops={}), "float32") == 8
  )
  nowhere = dataclasses.replace(device, peak_flops={})
  assert product_seconds({other: 1}, nowhere, "float32") is None


def test_measured_bandwidths_take_the_place_of_the_memory_s():
  device = dataclasses.replace(
    ANY, memory_bandwidth=10.0, pass_bandwidths={"activations": 2.0}
  )
  assert memory_seconds({"activations": 8.0, "update": 20.0}, device) == 4 + 2
  assert memory_seconds({"update": 1.0}, ANY) is None


def test_a_plan_of_measured_rates():
  """All products at one rate: as if that were the peak."""
  cfg = config()
  rates = dict.fromkeys(training_products(cfg), 1e9)
  device = dataclasses.replace(ANY, memory_bandwidth=1e9, product_rates=rates)
  plan = plan_training(cfg, mesh_shape({}), device)
  assert plan.times.compute == pytest.approx(plan.cost.executed_flops / 1e9)


def with_run(cfg: Config, **run) -> Config:
  return dataclasses.replace(cfg, training=TrainingConfig(dtype="bfloat16", **run))


def test_products_of_8_bits():
  """By hand: fp8 rounds for all three products of a projection, int8 for two, and a frozen
  kernel has two. Under remat=full the outputs that are only added are not made again;
  experts, their router and the head are never narrow."""
  D, F, tokens, depth = 64, 172, 4 * 256, 4
  cfg = config(ffn_width=F)
  layer = 4 * D * D + 3 * D * F
  once = 2.0 * tokens * depth * layer
  assert narrow_flops(with_run(cfg)) == 0
  assert narrow_flops(with_run(cfg, matmul="fp8")) == 3 * once
  assert narrow_flops(with_run(cfg, matmul="int8")) == 2 * once
  again = 2.0 * tokens * depth * (layer - D * F)
  full = with_run(cfg, matmul="int8", remat="full")
  assert narrow_flops(full) == 2 * once + again
  frozen = dataclasses.replace(with_run(cfg, matmul="fp8"), lora=LoraConfig(rank=2))
  assert narrow_flops(frozen) == 2 * once
  experts = config(moe=MoEConfig(num_experts=4, experts_per_token=2, expert_width=32))
  assert narrow_flops(with_run(experts, matmul="fp8")) == 6.0 * tokens * depth * 4 * D * D


@pytest.mark.parametrize(
  ("device", "matmul", "peak"),
  [
    ("h100", "fp8", 1978.9e12),
    ("h100", "int8", 1978.9e12),
    ("v5e", "int8", 394e12),
    ("v4", "int8", 275e12),  # no faster there
    ("a100", "fp8", 312e12),  # has no such products, and widens
    ("v6e", "fp8", 918e12),  # XLA widens on a TPU
  ],
)
def test_they_run_at_the_peak_of_8_bits(device: str, matmul: str, peak: float):
  found, cfg = find_device(device), config()
  full, narrow = with_run(cfg), with_run(cfg, matmul=matmul)
  sizes, cost = mesh_shape({}), step_cost(full)
  seconds = [compute_seconds(one, sizes, found, cost) for one in (full, narrow)]
  wide, part = found.peak_flops["bfloat16"], found.matmul_fraction
  assert seconds[0] and seconds[1] and part
  saved = narrow_flops(narrow) / part * (1 / wide - 1 / peak)
  assert seconds[0] - seconds[1] == pytest.approx(saved, abs=1e-12)
