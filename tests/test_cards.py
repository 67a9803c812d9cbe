# SPDX-License-Identifier: Apache-2.0
"""A card has as many parameters as the published model that it is named after.

Nothing is computed or allocated: `jax.eval_shape` only traces how parameters are made.
"""

import functools
import math
import re
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from flaxlm.config import (
  MESH_AXES,
  ModelConfig,
  check_config,
  load_config,
  override,
  parse_mesh,
)
from flaxlm.nn.models import build_model, init_params
from flaxlm.sharding import batch_shards, partition_spec

CONFIGS = Path(__file__).parent.parent / "configs"

# The published number of parameters, which the card states with its source. Two are known
# from their papers alone, rounded; the others are counted in the published checkpoints.
PUBLISHED = {
  "gpt2_124m": 124_439_808,
  "gpt2_355m": 354_823_168,
  "gpt2_774m": 774_030_080,
  "gpt2_1558m": 1_557_611_200,
  "gpt3_175b": 174_600_000_000,
  "llama_7b": 6_738_415_616,
  "llama_13b": 13_015_864_320,
  "llama_33b": 32_528_943_616,
  "llama_65b": 65_285_660_672,
  "llama3_8b": 8_030_261_248,
  "llama3_70b": 70_553_706_496,
  "llama3_405b": 405_853_388_800,
  "bloom_176b": 176_247_271_424,
  "palm_540b": 540_350_000_000,
  "bert_base": 110_106_428 - 1_538,  # without what predicts the next sentence
  "bert_large": 336_226_108 - 2_050,
  "t5_small": 60_506_624,
  "t5_base": 222_903_552,
  "t5_large": 737_668_096,
  "t5_3b": 2_851_598_336,
  "t5_11b": 11_307_321_344,
  "flan_t5_small": 76_961_152,
  "flan_t5_base": 247_577_856,
  "flan_t5_large": 783_150_080,
  "flan_t5_xl": 2_849_757_184,
  "flan_t5_xxl": 11_135_332_352,
  "mistral_7b": 7_241_732_096,
  "mixtral_8x7b": 46_702_792_704,
  "gemma2_2b": 2_614_341_888,
  "gemma2_9b": 9_241_705_984,
  "gemma2_27b": 27_227_128_320,
  "gemma3_1b": 999_885_952,
  "gemma3_4b": 4_300_079_472 - 419_816_304,  # without what sees pictures
  "gemma3_12b": 12_187_325_040 - 421_290_864,
  "gemma3_27b": 27_432_406_640 - 423_060_336,
  "qwen3_0_6b": 596_049_920,
  "qwen3_1_7b": 1_720_574_976,
  "qwen3_4b": 4_022_468_096,
  "qwen3_8b": 8_190_735_360,
  "qwen3_14b": 14_768_307_200,
  "qwen3_32b": 32_762_123_264,
  "qwen3_30b_a3b": 30_532_122_624,
}
TOLERANCE = {"gpt3_175b": 0.05e9, "palm_540b": 0.01e9}  # as far as the papers round


@functools.cache
def boxed_params(model: ModelConfig) -> Any:
  """Shape, dtype and logical names of each parameter."""
  init = functools.partial(init_params, build_model(model))
  return jax.eval_shape(init, jnp.uint32(0))


def num_parameters(model: ModelConfig) -> int:
  return sum(math.prod(x.shape) for x in jax.tree.leaves(boxed_params(model)))


def text_of(name: str) -> str:
  return (CONFIGS / f"{name}.py").read_text("utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_card_has_the_published_number_of_parameters(name: str):
  difference = num_parameters(load_config(name).model) - PUBLISHED[name]
  assert abs(difference) <= TOLERANCE.get(name, 0), f"{difference:+,}"


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_card_can_be_split_over_the_mesh_of_its_command(name: str):
  found = re.search(rf"python train.py {name} --mesh (\S+)", text_of(name))
  assert found
  cfg, mesh = load_config(name), dict.fromkeys(MESH_AXES, 1) | parse_mesh(found[1])
  is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)
  for box in jax.tree.leaves(boxed_params(cfg.model), is_leaf=is_box):
    partition_spec(box.names, box.value.shape, mesh)  # raises if a dim does not divide
  assert cfg.data.batch_size % batch_shards(mesh) == 0


def test_every_card_is_counted():
  names = {path.stem for path in CONFIGS.glob("*.py")}
  assert {name for name in names if "\nParameters:" in text_of(name)} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_card_states_its_number_and_where_it_is_from(name: str):
  assert f"\nParameters: {PUBLISHED[name]:,}" in text_of(name)
  assert "\nSource:     " in text_of(name)
  _, _, documentation = text_of(name).split('"""')[1].partition("\n\n")
  fields = ["What", "Cost", "Expected", "Command", "Source", "Parameters"]
  assert re.findall(r"^(\w+): +\S", documentation, re.MULTILINE) == fields


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_cost_of_a_card_is_that_of_its_config(name: str):
  """Tokens, FLOPs and bytes of state, which the card rounds to two or three digits."""
  cfg, text = load_config(name), " ".join(text_of(name).split())
  units = {"B": 1e9, "G": 1e9, "T": 1e12}
  state = re.search(r"float32 state with (Adam|Adafactor): ([\d.]+) ([GT])B", text)
  assert state
  bytes_each = {"Adam": 4 * 4, "Adafactor": 2 * 4}[state[1]]
  said = float(state[2]) * units[state[3]]
  assert said == pytest.approx(bytes_each * PUBLISHED[name], rel=0.05)
  assert (state[1] == "Adafactor") == (cfg.optimizer.kind == "adafactor")
  cost = re.search(r"([\d.]+)([BT]) tokens, (\S+) FLOPs \(6ND\)", text)
  assert (cost is None) == (cfg.model.family == "encoder_decoder")  # T5 counts its sources
  if cost:
    tokens = cfg.training.num_steps * cfg.data.batch_size * cfg.data.seq_len
    used = re.search(r"\(([\d,]+) for each token\)", text)
    active = int(used[1].replace(",", "")) if used else PUBLISHED[name]
    assert float(cost[1]) * units[cost[2]] == pytest.approx(tokens, rel=0.005)
    assert float(cost[3]) == pytest.approx(6 * active * tokens, rel=0.02)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_card_has_room_for_its_tokenizer(name: str):
  cfg = load_config(name)
  assert cfg.tokenizer.vocab_size == cfg.model.vocab_size


# -- From 12 heads to 128 and beyond -------------------------------------------------------


@pytest.mark.parametrize("num_heads", [12, 48, 96, 128, 256])
def test_more_heads_are_only_a_config(num_heads: int):
  """They share the width: narrower heads, and not one parameter more."""
  cfg = override(load_config("gpt2_124m"), [f"--model.num_heads={num_heads}"])
  check_config(cfg)
  kernel = boxed_params(cfg.model)["blocks"]["attention"]["q"]["kernel"].value
  assert kernel.shape == (12, 768, num_heads, 768 // num_heads)
  assert num_parameters(cfg.model) == PUBLISHED["gpt2_124m"]


def test_more_heads_of_the_same_size_are_wider_attention():
  wider = ["--model.num_heads=128", "--model.head_dim=64"]
  cfg = override(load_config("gpt2_124m"), wider)
  check_config(cfg)
  more = (128 - 12) * 64  # columns of q, k and v with their biases, and rows of o
  expected = PUBLISHED["gpt2_124m"] + 12 * (3 * (768 + 1) + 768) * more
  assert num_parameters(cfg.model) == expected
