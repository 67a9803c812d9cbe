# SPDX-License-Identifier: Apache-2.0
"""Every variant of the architecture equals the float64 references, on packed rows.

Each variant is one compiled program, which takes half a second; some test two things.
"""

import jax
import numpy as np
import pytest
import references
from conftest import slow_but
from parameters import random_params

from flaxlm.config import ModelConfig, MoEConfig, RopeConfig
from flaxlm.nn import models

TINY = dict(depth=2, width=16, num_heads=4, vocab_size=32, context=32, ffn_width=24)
LAYERNORM = dict(norm="layernorm", gated=False, biased=True, norm_epsilon=1e-5)
STRETCHED = dict(theta=10.0, factor=3.0, original_context=12)  # 4 pairs: 1.9 to 0.3 turns
YARN = STRETCHED | dict(scaling="yarn", slow_turns=0.1, fast_turns=0.8)
LLAMA3 = STRETCHED | dict(scaling="llama3", slow_turns=0.5, fast_turns=1.5)
LOCAL = dict(window=3, layer_pattern="LG")


def rope(**kwargs) -> dict:
  return dict(rope=RopeConfig(**kwargs), head_dim=8)


POSITIONS = {
  "rope_ntk": rope(scaling="ntk", **STRETCHED),
  "rope_yarn": rope(**YARN),
  "rope_yarn_partial": rope(fraction=0.5, attention_factor=0.7, **YARN),
  "rope_llama3": rope(**LLAMA3),
  "rope_linear_local": rope(scaling="linear", local_theta=50.0, **STRETCHED) | LOCAL,
  "learned": dict(positions="learned", embedding_scaled=True, qkv_biased=True),
  "sinusoidal": dict(positions="sinusoidal"),
  "alibi_six_heads": dict(positions="alibi", num_heads=6, num_kv_heads=2, head_dim=4),
  "relative": dict(positions="relative", relative_buckets=6, relative_distance=7),
}
NORMS = {
  "layernorm_unbiased": LAYERNORM | dict(norm_biased=False),
  "output": dict(norm_placement="output"),
  "both": dict(norm_placement="both"),
  "parallel_one_norm": dict(parallel="one_norm"),
  "parallel_two_norms": LAYERNORM | dict(parallel="two_norms") | rope(fraction=0.6),
  "embedding_norm": dict(embedding_norm=True, positions="none"),
}
ATTENTION = {
  "multi_query_window": dict(num_kv_heads=1, window=3),
  "pattern": dict(window=2, layer_pattern="LGL", depth=4),
  "sink_tokens": LOCAL | dict(sink_tokens=2),
  "learned_sinks": LOCAL | dict(learned_sinks=True),
  "soft_cap": dict(attention_scale=1.5, attention_softcap=0.7),
  "soft_cap_before_bias": dict(positions="alibi", attention_softcap=0.7),
  "qk_norm_head": dict(qk_norm="head", num_kv_heads=2),
  "qk_norm_width": dict(qk_norm="width", num_kv_heads=2, tied_embeddings=False),
}
FEED_FORWARD = {
  "gated_gelu_biased": dict(activation="gelu", biased=True, o_biased=False),
  "experts": dict(moe=MoEConfig(num_experts=4)),
  "experts_shared": dict(
    moe=MoEConfig(
      num_experts=5,
      experts_per_token=3,
      expert_width=8,
      num_shared_experts=2,
      shared_gated=True,
      normalized=False,
    )
  ),
  "experts_plain": dict(
    gated=False,
    activation="gelu",
    moe=MoEConfig(num_experts=3, experts_per_token=1, num_shared_experts=1),
  ),
}
HEADS = {
  "head": dict(
    head_transform=True,
    head_biased=True,
    logit_scale=2.0,
    logit_softcap=1.5,
    activation="gelu",
  ),
}
ENCODERS = {
  "bert": LAYERNORM
  | dict(positions="learned", norm_placement="post", activation="gelu", pooler=True)
  | dict(embedding_norm=True, num_token_types=2, head_transform=True, head_biased=True),
  "encoder_local": LOCAL | dict(sink_tokens=1, num_kv_heads=2),
  "encoder_alibi": dict(positions="alibi"),
  "encoder_relative": dict(
    positions="relative", relative_buckets=8, relative_distance=6, learned_sinks=True
  ),
}
T5 = dict(
  positions="relative",
  relative_buckets=8,
  relative_distance=6,
  attention_scale=1.0,
  encoder_depth=1,
  head_dim=6,
)
ENCODER_DECODERS = {
  "transformer_2017": LAYERNORM
  | dict(positions="sinusoidal", embedding_scaled=True)
  | dict(norm_placement="post", activation="relu"),
  "t5": T5 | dict(activation="relu", gated=False, logit_scale=0.25),
  "flan_t5": T5 | dict(activation="gelu_tanh", tied_embeddings=False),
  "encoder_decoder_gpt": LAYERNORM
  | dict(positions="learned", embedding_norm=True, activation="gelu", head_biased=True),
  "encoder_decoder_both": LOCAL
  | dict(norm_placement="both", num_kv_heads=2, encoder_depth=1),
  "encoder_decoder_output": dict(norm_placement="output", positions="alibi"),
}
VARIANTS = (
  {**POSITIONS, **NORMS, **ATTENTION, **FEED_FORWARD, **HEADS}
  | {name: dict(family="encoder") | kwargs for name, kwargs in ENCODERS.items()}
  | {
    name: dict(family="encoder_decoder") | kwargs
    for name, kwargs in ENCODER_DECODERS.items()
  }
)

# Two documents and padding, one document and padding; positions begin again.
SEGMENTS_BT = np.array([[1] * 5 + [2] * 6 + [0], [1] * 9 + [0] * 3])
POSITIONS_BT = np.array([[*range(5), *range(6), 0], [*range(9), *range(3)]])
SOURCE_SEGMENTS_BS = np.array([[1] * 3 + [2] * 5 + [0] * 2, [1] * 10])
SOURCE_POSITIONS_BS = np.array([[*range(3), *range(5), *range(2)], [*range(10)]])


def inputs(cfg: ModelConfig) -> tuple[list, dict]:
  """What a model takes: positional and keyword arguments."""
  random = np.random.default_rng(0)
  tokens_BT = random.integers(0, cfg.vocab_size, SEGMENTS_BT.shape)
  arguments = [tokens_BT, POSITIONS_BT, SEGMENTS_BT]
  if cfg.family != "encoder_decoder":
    return arguments, {}
  source_BS = random.integers(0, cfg.vocab_size, SOURCE_SEGMENTS_BS.shape)
  source = models.Source(source_BS, SOURCE_POSITIONS_BS, SOURCE_SEGMENTS_BS)
  return arguments, {"source": source}


def expected(params: dict, cfg: ModelConfig, arguments: list, source=None) -> np.ndarray:
  """Logits in float64."""
  tokens_BT, positions_BT, segments_BT = arguments
  if cfg.family == "encoder_decoder":
    return references.encoder_decoder(
      params,
      cfg,
      source.tokens_BS,
      tokens_BT,
      source_segments_BS=source.segments_BS,
      segments_BT=segments_BT,
      source_positions_BS=source.positions_BS,
      positions_BT=positions_BT,
    )
  model = {"decoder": references.decoder, "encoder": references.encoder}[cfg.family]
  return model(params, cfg, tokens_BT, segments_BT, positions_BT)


# Between them they have nearly everything.
FAST = ("pattern", "experts_shared", "t5", "bert", "gated_gelu_biased", "rope_ntk")


@pytest.mark.parametrize("name", slow_but(FAST, VARIANTS))
def test_variant_equals_float64_reference(name):
  cfg = ModelConfig(**TINY | VARIANTS[name])
  model = models.build_model(cfg)
  arguments, keywords = inputs(cfg)
  params = random_params(model)
  logits_BTV = jax.jit(model.apply)({"params": params}, *arguments, **keywords)[0]
  expected_BTV = expected(params, cfg, arguments, **keywords)
  real = SEGMENTS_BT > 0
  assert np.std(expected_BTV[real]) > 0.1
  np.testing.assert_allclose(logits_BTV[real], expected_BTV[real], atol=2e-5, rtol=2e-5)
