# SPDX-License-Identifier: Apache-2.0
"""Closed forms against the real model, and against published figures."""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, slow_but

from flaxlm.config import (
  Config,
  DataConfig,
  ModelConfig,
  MoEConfig,
  ResolvedModel,
  TrainingConfig,
  load_config,
)
from flaxlm.cost import (
  active_parameters,
  attention_passes,
  forward_work,
  kv_cache_bytes,
  parameters,
  step_cost,
  visible_keys,
  weight_bytes,
)
from flaxlm.decoding.weights import prepare_params
from flaxlm.nn.base import Source
from flaxlm.nn.cache import empty_cache
from flaxlm.nn.masks import Placement, visible
from flaxlm.nn.models import build_model, init_cache, init_params
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


@pytest.mark.slow
@pytest.mark.parametrize(
  "model", [{}, {"parallel": "one_norm"}, {"norm_placement": "both"}], ids=str
)
def test_what_is_only_added_is_not_computed_again(model: dict):
  """Against the dots of the compiled gradient, of one block of queries: remat=full adds a
  forward pass of the layers, less what goes into the residual stream at their end."""
  cfg = ModelConfig(depth=2, width=64, num_heads=2, vocab_size=64, **model).resolve()

  def executed(remat: Any) -> float:
    run = TrainingConfig(remat=remat, scanned=False, attention="blocked")
    module = build_model(cfg, run)
    params = jax.eval_shape(lambda: init_params(module, 0))
    ids = jax.ShapeDtypeStruct((1, 32), jnp.int32)
    loss = lambda params, ids: module.apply({"params": params}, ids, ids, ids).value.sum()
    compiled: Any = jax.jit(jax.grad(loss)).lower(params, ids).compile()
    return compiled.cost_analysis()["flops"]

  work = forward_work(cfg, 1, 32)
  assert (work.added > 0) is (cfg.norm_placement == "pre")
  again = executed("full") - executed("none")
  expected = work.matmul - work.added + work.attention_executed
  assert again == pytest.approx(expected, rel=0.1)


def test_the_cache_of_llama3_8b():
  """128 KiB per token in bfloat16: 32 layers, 8 heads of 128, keys and values."""
  cfg = ModelConfig(**PUBLISHED["llama3_8b"][0]).resolve()
  lengths = 2 * 4
  expected = 2 * 1000 * 131_072 + lengths
  assert kv_cache_bytes(cfg, rows=2, context=1000, item_size=2) == expected


# -- Local and global layers, of published models and of every card ------------------------


@pytest.mark.parametrize(("T", "keys"), [(4096, 2048), (8192, 3072), (32_768, 3840)])
def test_mistral_7b_attends_within_its_window(T: int, keys: int):
  """All 32 layers see 4,096 keys: 4,096 - 4,096^2 / 2T on average, not T / 2."""
  work = forward_work(resolve(load_config("mistral_7b")).model, 1, T)
  assert work.attention == 32 * 4 * 32 * 128 * T * keys
  assert work.attention_loose == 32 * 4 * 32 * 128 * T * T


def test_gemma3_27b_attends_within_its_windows():
  """Of 62 layers, LLLLLG over and over, 10 see everything and 52 their 1,024 tokens."""
  T = 131_072
  work = forward_work(resolve(load_config("gemma3_27b")).model, 1, T)
  local, everything = 1024 - 1024**2 / (2 * T), T / 2
  assert (local, everything) == (1020, 65_536)
  assert work.attention == 4 * 32 * 128 * T * (52 * 1020 + 10 * 65_536)


def test_the_cache_of_gemma3_27b_at_128k():
  """8 KiB per layer and token in bfloat16: 10 global layers of 1 GiB each, and 52 rings of
  1,664 slots (1,024 + 512 + 64 - 1); 10.7 GiB, 62 without rings."""
  cfg = resolve(load_config("gemma3_27b")).model
  per_slot = 2 * 16 * 128 * 2
  assert cfg.ring_slots == 1664
  expected = 10 * 131_072 * per_slot + 52 * 1664 * per_slot
  assert kv_cache_bytes(cfg, 1, 131_072, item_size=2) == expected + 4
  assert expected / 2**30 == pytest.approx(10.66, abs=0.005)
  # No context needs more than all of its slots.
  assert kv_cache_bytes(cfg, 1, 1000, item_size=2) == 62 * 1000 * per_slot + 4


@pytest.mark.parametrize("context", [8192, 32_768])
def test_the_cache_of_mistral_7b(context: int):
  """4 KiB per layer and token in bfloat16, and rings of 4,736 (4,096 + 512 + 64 - 1)."""
  cfg = resolve(load_config("mistral_7b")).model
  expected = 3 * 32 * 4736 * 4096 + 3 * 4
  assert kv_cache_bytes(cfg, 3, context, item_size=2) == expected


CARDS = slow_but(
  # One of each kind of layer; the sizes of a family differ in numbers alone.
  ("gpt2_124m", "gemma3_27b", "mixtral_8x7b", "bert_base", "flan_t5_small", "rnn_lstm"),
  sorted(path.stem for path in (ROOT / "configs").glob("*.py")),
)


def num_bytes(tree: Any) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", CARDS)
def test_the_planned_cache_of_every_card_is_the_one_that_decoding_makes(name: str):
  cfg = resolve(load_config(name))
  model, rows = build_model(cfg.model, cfg.training), 3
  item = jnp.dtype(cfg.training.dtype).itemsize
  ring = cfg.model.ring_slots or 1600
  for slots in (1, 100, ring - 1, ring, ring + 1, cfg.model.context):
    real = jax.eval_shape(functools.partial(init_cache, model, rows, slots))
    planned = kv_cache_bytes(cfg.model, rows, slots, item)
    assert planned == num_bytes(real), slots
  if cfg.model.family == "encoder_decoder":
    params = jax.eval_shape(functools.partial(init_params, model), jnp.uint32(0))
    source = Source(jax.ShapeDtypeStruct((rows, 24), jnp.int32))
    start = lambda params, source: model.apply(
      {"params": params}, source, 40, method="start"
    )
    real = jax.eval_shape(start, nn.unbox(params), source)
    assert kv_cache_bytes(cfg.model, rows, 40, item, source_len=24) == num_bytes(real)


LAID_OUT = ("llama3_8b", "gpt2_124m", "bert_base", "t5_base", "rnn_lstm", "mixtral_8x7b")


@pytest.mark.parametrize("name", slow_but(("llama3_8b", "t5_base"), LAID_OUT))
@pytest.mark.parametrize("kind", [None, "bfloat16", "int8", "int4"])
def test_planned_weights_are_those_that_decoding_lays_out(name: str, kind: str | None):
  cfg = resolve(load_config(name)).model
  model = build_model(dataclasses.replace(cfg, depth=2, encoder_depth=2))
  params = jax.eval_shape(lambda: nn.unbox(init_params(model, jnp.uint32(0))))
  lay_out = functools.partial(prepare_params, cfg=model.cfg, kind=kind)
  assert weight_bytes(model.cfg, 4, kind) == num_bytes(jax.eval_shape(lay_out, params))


@pytest.mark.parametrize("name", slow_but(("gemma3_27b",), ("gemma3_27b", "llama3_8b")))
def test_a_planned_narrow_cache_is_the_one_that_decoding_makes(name: str):
  cfg = resolve(load_config(name)).model
  for slots in (1, 100, 4000):
    real = jax.eval_shape(functools.partial(empty_cache, cfg, 3, slots, jnp.int8))
    planned = kv_cache_bytes(cfg, 3, slots, 2, narrow=True)
    assert planned == num_bytes(real), slots


def pairs_counted(num_queries: int, causal: bool, window: int | None, sinks: int) -> float:
  """Keys seen by all queries of a row by the strict convention, counted in the mask.

  A causal query that sees all keys so far counts half of its own one.
  """
  slots_BT = jnp.arange(num_queries)[None]
  mask_BTS = visible(Placement(slots_BT), num_queries, causal, window, sinks)
  if mask_BTS is None:
    return num_queries**2
  mask_TS = np.asarray(jnp.broadcast_to(mask_BTS, (1, num_queries, num_queries))[0])
  sees_all_T = mask_TS.sum(-1) == np.arange(num_queries) + 1
  return mask_TS.sum() - causal * sees_all_T.sum() / 2


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_visible_keys_are_those_of_the_mask(causal: bool, sinks: int):
  for window in (None, 1, 2, 5, 16, 19, 20, 21, 50):
    found = 20 * visible_keys(20, window, causal, sinks)
    assert found == pytest.approx(pairs_counted(20, causal, window, sinks)), window


def attention_counted(cfg: ResolvedModel, rows: int, T: int, S: int) -> float:
  """Strict FLOPs of attention: 4 H for each head, query and key that the masks show."""
  pattern = cfg.layer_pattern or ("G" if cfg.window is None else "L")

  def of_stack(depth: int, length: int, causal: bool) -> float:
    windows = [
      cfg.window if pattern[n % len(pattern)] == "L" else None for n in range(depth)
    ]
    return sum(
      windows.count(window) * pairs_counted(length, causal, window, cfg.sink_tokens)
      for window in set(windows)
    )

  if cfg.family == "rnn":
    return 0.0
  pairs = of_stack(cfg.depth, T, cfg.family != "encoder")
  if cfg.family == "encoder_decoder":
    pairs += of_stack(cfg.encoder_depth, S, False) + cfg.depth * T * S
  return 4 * cfg.head_dim * cfg.num_heads * rows * pairs


@pytest.mark.parametrize("name", CARDS)
def test_attention_of_every_card_is_that_of_its_masks(name: str):
  """Scaled down: T is 48, and a window has the share of it that it has of the context."""
  cfg, T, S = resolve(load_config(name)).model, 48, 36
  if cfg.window is not None:
    window = max(1, round(cfg.window * T / cfg.context))
    assert window < T
    cfg = dataclasses.replace(cfg, window=window)
  work = forward_work(cfg, 2, T, S)
  assert work.attention == pytest.approx(attention_counted(cfg, 2, T, S))


@pytest.mark.parametrize("name", CARDS)
def test_parameters_of_every_card(name: str):
  cfg = resolve(load_config(name)).model
  assert sum(parameters(cfg).values()) == real_parameters(cfg)


def test_experts_compute_the_places_that_nobody_takes():
  """Three products of 2 DF for each place, and 1.5 times as many places as choices."""
  moe = MoEConfig(num_experts=4, experts_per_token=2, expert_width=24, capacity_factor=1.5)
  model = ModelConfig(depth=3, width=32, num_heads=2, vocab_size=64, context=64, moe=moe)
  cfg = Config(model=model.resolve(), data=DataConfig(seq_len=64, batch_size=2))
  unlimited = dataclasses.replace(moe, capacity_factor=None)
  whole = dataclasses.replace(model, moe=unlimited).resolve()
  more, fewer = step_cost(cfg), step_cost(dataclasses.replace(cfg, model=whole))
  idle = 3 * 2 * 64 * 3 * 0.5 * 2 * (2 * 3 * 32 * 24)
  assert more.executed_flops - fewer.executed_flops == pytest.approx(idle)
  assert more.strict_flops == fewer.strict_flops


@pytest.mark.parametrize(
  ("path", "passes"), [("blocked", 3), ("cudnn", 3.5), ("splash", 4.5)]
)
def test_a_kernel_that_keeps_no_weights_computes_scores_again(path: Any, passes: float):
  """Two products forward; backward four, five in one kernel, or seven in two."""
  assert attention_passes(TrainingConfig(attention=path)) == passes
  assert attention_passes(TrainingConfig(attention=path, remat="full")) == passes + 1
