# SPDX-License-Identifier: Apache-2.0
"""Closed forms against the real model, and against what the papers and checkpoints say."""

import functools
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from flaxlm.config import (
  Config,
  DataConfig,
  ModelConfig,
  MoEConfig,
  TrainingConfig,
  load_config,
)
from flaxlm.nn.models import build_model, init_params
from flaxlm.planning.cost import (
  active_parameters,
  forward_work,
  kv_cache_bytes,
  parameters,
  step_cost,
  visible_keys,
)
from flaxlm.planning.planner import resolve

SMALL = dict(depth=3, width=48, num_heads=4, vocab_size=96, context=32)

# Every kind of model that the code can build; a new family adds its line here.
BUILDABLE = {
  "llama": dict(num_kv_heads=2, tied_embeddings=False),
  "gpt2": dict(positions="learned", norm="layernorm", gated=False, activation="gelu_tanh"),
  "biased": dict(positions="learned", norm="layernorm", gated=False, biased=True),
  "multi_query": dict(num_kv_heads=1, head_dim=16, window=8),
  "post_norm": dict(norm_placement="post", positions="sinusoidal", gated=False),
  "bloom": dict(positions="alibi", norm="layernorm", biased=True, embedding_norm=True),
  "palm": dict(num_kv_heads=1, parallel="one_norm", norm="layernorm", norm_biased=False),
  "two_norms": dict(parallel="two_norms", o_biased=True, qkv_biased=False),
  "gemma": dict(norm_placement="both", window=8, layer_pattern="LG", qk_norm="head"),
  "olmo": dict(norm_placement="output", qk_norm="width", learned_sinks=True),
  "head": dict(head_biased=True, head_transform=True, tied_embeddings=False),
  "relative": dict(positions="relative"),
  "moe": dict(moe=MoEConfig(num_experts=4)),
  "shared_experts": dict(
    moe=MoEConfig(num_experts=4, expert_width=24, num_shared_experts=2, shared_gated=True)
  ),
  "moe_biased": dict(biased=True, moe=MoEConfig(num_experts=4, num_shared_experts=1)),
  "bert": dict(
    family="encoder",
    norm="layernorm",
    norm_placement="post",
    positions="learned",
    embedding_norm=True,
    biased=True,
    num_token_types=2,
    pooler=True,
    head_transform=True,
    head_biased=True,
  ),
  "lstm": dict(family="rnn"),
  "gru": dict(family="rnn", cell="gru", norm="layernorm", tied_embeddings=False),
  "t5": dict(family="encoder_decoder", positions="relative", encoder_depth=2),
  "t5_both": dict(family="encoder_decoder", norm_placement="both", positions="learned"),
}


def real_parameters(cfg: ModelConfig) -> int:
  init = functools.partial(init_params, build_model(cfg))
  tree = jax.eval_shape(init, jax.ShapeDtypeStruct((), np.uint32))
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", BUILDABLE)
def test_parameters_are_those_of_the_model(name: str):
  cfg = ModelConfig(**SMALL, **BUILDABLE[name]).resolve()
  assert sum(parameters(cfg).values()) == real_parameters(cfg)


LLAMA = dict(tied_embeddings=False)
GPT = dict(positions="learned", norm="layernorm", gated=False, biased=True)
BERT = GPT | dict(family="encoder", norm_placement="post", embedding_norm=True)
BERT |= dict(num_token_types=2, pooler=True, vocab_size=30_522, context=512)
T5 = dict(family="encoder_decoder", positions="relative", head_dim=64, vocab_size=32_128)

# Checkpoints on the Hugging Face hub, counted there.
PUBLISHED = {
  "gpt2": (
    GPT | dict(depth=12, width=768, num_heads=12, vocab_size=50_257, context=1024),
    124_439_808,
  ),
  "llama_7b": (
    LLAMA | dict(depth=32, width=4096, num_heads=32, ffn_width=11_008, vocab_size=32_000),
    6_738_415_616,
  ),
  "llama3_8b": (
    LLAMA
    | dict(depth=32, width=4096, num_heads=32, num_kv_heads=8, ffn_width=14_336)
    | dict(vocab_size=128_256),
    8_030_261_248,
  ),
  "mistral_7b": (
    LLAMA
    | dict(depth=32, width=4096, num_heads=32, num_kv_heads=8, ffn_width=14_336)
    | dict(vocab_size=32_000, window=4096),
    7_241_732_096,
  ),
  "mixtral_8x7b": (
    LLAMA
    | dict(depth=32, width=4096, num_heads=32, num_kv_heads=8, ffn_width=14_336)
    | dict(vocab_size=32_000, moe=MoEConfig(num_experts=8)),
    46_702_792_704,
  ),
  "gemma2_9b": (
    dict(depth=42, width=3584, num_heads=16, num_kv_heads=8, head_dim=256)
    | dict(ffn_width=14_336, vocab_size=256_000, norm_placement="both"),
    9_241_705_984,
  ),
  "qwen3_8b": (
    LLAMA
    | dict(depth=36, width=4096, num_heads=32, num_kv_heads=8, head_dim=128)
    | dict(ffn_width=12_288, vocab_size=151_936, qk_norm="head"),
    8_190_735_360,
  ),
  "bloom_176b": (
    GPT
    | dict(depth=70, width=14_336, num_heads=112, vocab_size=250_880)
    | dict(positions="alibi", embedding_norm=True),
    176_247_271_424,
  ),
  "bert_base": (BERT | dict(depth=12, width=768, num_heads=12), 109_482_240),
  "bert_large": (BERT | dict(depth=24, width=1024, num_heads=16), 335_141_888),
  "t5_base": (
    T5 | dict(depth=12, width=768, num_heads=12, ffn_width=3072, gated=False),
    222_903_552,
  ),
  "flan_t5_xxl": (
    T5 | dict(depth=24, width=4096, num_heads=64, ffn_width=10_240, tied_embeddings=False),
    11_135_332_352,
  ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_published_checkpoints(name: str):
  fields, number = PUBLISHED[name]
  assert sum(parameters(ModelConfig(**fields).resolve()).values()) == number


def test_mixtral_has_13_billion_active_parameters():
  cfg = ModelConfig(**PUBLISHED["mixtral_8x7b"][0]).resolve()
  assert active_parameters(cfg) == 12_879_925_248
  dense = ModelConfig(**PUBLISHED["mistral_7b"][0]).resolve()
  assert active_parameters(dense) == sum(parameters(dense).values())


def test_gpt3_as_in_its_paper():
  """Brown et al. (2020), table D.1: 174.6 B parameters, 3.14e23 FLOPs for 300 B tokens."""
  cfg = ModelConfig(
    **GPT, depth=96, width=12_288, num_heads=96, vocab_size=50_257, context=2048
  ).resolve()
  assert sum(parameters(cfg).values()) == pytest.approx(174.6e9, rel=1e-3)
  work = forward_work(cfg, 1, 2048)
  weights_only = 3 * (work.matmul + work.head) / 2048 * 300e9
  assert weights_only == pytest.approx(3.14e23, rel=2e-3)


def test_palm_mfu_as_in_its_appendix_b():
  """Chowdhery et al. (2022): 238.3 thousand tokens/s on 6,144 v4 chips are 46.2 % MFU."""
  cfg = ModelConfig(
    depth=118,
    width=18_432,
    num_heads=48,
    num_kv_heads=1,
    head_dim=256,
    ffn_width=4 * 18_432,
    vocab_size=256_000,
    norm="layernorm",
    norm_biased=False,
    parallel="one_norm",
    context=2048,
  ).resolve()
  assert sum(parameters(cfg).values()) == pytest.approx(540.35e9, rel=1e-3)
  per_token = 3 * forward_work(cfg, 1, 2048).loose / 2048
  assert per_token * 238.3e3 / (6144 * 275e12) == pytest.approx(0.462, abs=1e-3)


def test_llm_c_mfu_in_both_conventions():
  """468,000 tokens/s of GPT-2 124M per H100: 37.8 % strict, 40.5 % loose, of 989 T."""
  cfg = ModelConfig(**PUBLISHED["gpt2"][0] | dict(vocab_size=50_304)).resolve()
  work = forward_work(cfg, 1, 1024)
  mfu = lambda flops: 3 * flops / 1024 * 468e3 / 989.4e12
  assert mfu(work.strict) == pytest.approx(0.378, abs=1e-3)
  assert mfu(work.loose) == pytest.approx(0.405, abs=1e-3)


def test_attention_by_hand():
  """Two layers of four heads of 8: 4 FLOPs per query, key, head and head dim."""
  cfg = ModelConfig(depth=2, width=32, num_heads=4, vocab_size=64).resolve()
  work = forward_work(cfg, rows=3, seq_len=16)
  assert work.attention_loose == 3 * 2 * 4 * 4 * 8 * 16 * 16
  assert work.attention == work.attention_loose / 2
  assert work.head == 2 * 3 * 16 * 64 * 32
  local = ModelConfig(
    depth=2, width=32, num_heads=4, vocab_size=64, window=4, layer_pattern="LG"
  ).resolve()
  # Of 16 queries with a window of 4: 4 keys each, less the triangle at the start.
  assert visible_keys(16, 4, causal=True) == 4 - 4**2 / 32
  assert forward_work(local, 3, 16).attention == 3 * 4 * 4 * 8 * 16 * (3.5 + 8)
  # Short rows are one block, computed whole: executed is what loose counts.
  assert work.attention_executed == work.attention_loose


def test_an_encoder_decoder_counts_both_rows():
  cfg = ModelConfig(
    family="encoder_decoder", depth=2, encoder_depth=3, width=32, num_heads=4, vocab_size=64
  ).resolve()
  ffn, square = 3 * 32 * cfg.ffn_width, 32 * 32
  work = forward_work(cfg, 1, seq_len=8, source_len=20)
  encoder = 3 * 20 * (4 * square + ffn)
  decoder = 2 * (8 * (4 * square + ffn) + 8 * 2 * square + 20 * 2 * square)
  assert work.matmul == 2 * (encoder + decoder)
  assert work.attention == 4 * 32 * (3 * 20 * 20 + 2 * 8 * 4 + 2 * 8 * 20)


def test_remat_executes_more_and_counts_no_more():
  costs = {
    remat: step_cost(
      Config(
        model=ModelConfig(depth=2, vocab_size=512).resolve(),
        data=DataConfig(seq_len=256, batch_size=4),
        training=TrainingConfig(remat=remat),
      )
    )
    for remat in ("none", "dots", "full", "attention", "offload")
  }
  assert costs["attention"] == costs["offload"] == costs["full"]
  assert len({cost.strict_flops for cost in costs.values()}) == 1
  none, dots, full, *_ = (cost.executed_flops for cost in costs.values())
  assert none < dots < full < 4 / 3 * none
  assert costs["none"].tokens == 1024


def test_the_cache_of_llama3_8b():
  """128 KiB per token in bfloat16: 32 layers, 8 heads of 128, keys and values."""
  cfg = ModelConfig(**PUBLISHED["llama3_8b"][0]).resolve()
  assert kv_cache_bytes(cfg, rows=2, context=1000, item_size=2) == 2 * 1000 * 131_072


CARDS = sorted(path.stem for path in Path(__file__).parents[2].glob("configs/*.py"))


@pytest.mark.parametrize("name", CARDS)
def test_parameters_of_every_card(name: str):
  cfg = resolve(load_config(name)).model
  assert sum(parameters(cfg).values()) == real_parameters(cfg)
