# SPDX-License-Identifier: Apache-2.0
"""config.json files as published, with the keys of their time: the model has as many
parameters as the published checkpoint, and every setting without a default is found."""

import math
from typing import Any

import jax
import pytest

from flaxlm.interop.families import FAMILIES
from flaxlm.interop.huggingface import read_config
from flaxlm.interop.values import Values
from flaxlm.nn.models import abstract_params, build_model
from flaxlm.sharding import make_mesh

# What each file says of the architecture (tokens, dropout and initialisation left out).
CONFIGS: dict[str, tuple[int, dict[str, Any]]] = {
  "gpt2": (
    124_439_808,
    dict(
      **dict(model_type="gpt2", activation_function="gelu_new", n_ctx=1024, n_embd=768),
      **dict(n_head=12, n_layer=12, n_positions=1024, vocab_size=50257),
      **dict(layer_norm_epsilon=1e-05),
    ),
  ),
  "pythia-160m": (
    162_322_944,
    dict(
      **dict(model_type="gpt_neox", hidden_act="gelu", hidden_size=768, rotary_pct=0.25),
      **dict(intermediate_size=3072, layer_norm_eps=1e-05, max_position_embeddings=2048),
      **dict(num_attention_heads=12, num_hidden_layers=12, rotary_emb_base=10000),
      **dict(tie_word_embeddings=False, use_parallel_residual=True, vocab_size=50304),
    ),
  ),
  "gpt-j-6b": (
    6_050_882_784,
    dict(
      **dict(model_type="gptj", activation_function="gelu_new", n_embd=4096, n_head=16),
      **dict(n_inner=None, n_layer=28, n_positions=2048, rotary=True, rotary_dim=64),
      **dict(scale_attn_weights=True, tie_word_embeddings=False, vocab_size=50400),
    ),
  ),
  "Llama-3.2-1B": (
    1_235_814_400,
    dict(
      **dict(model_type="llama", attention_bias=False, head_dim=64, hidden_act="silu"),
      **dict(hidden_size=2048, intermediate_size=8192, max_position_embeddings=131072),
      **dict(
        mlp_bias=False, num_attention_heads=32, num_hidden_layers=16, vocab_size=128256
      ),
      **dict(num_key_value_heads=8, rms_norm_eps=1e-05, rope_theta=500000.0),
      tie_word_embeddings=True,
      rope_scaling=dict(
        **dict(factor=32.0, high_freq_factor=4.0, low_freq_factor=1.0),
        **dict(original_max_position_embeddings=8192, rope_type="llama3"),
      ),
    ),
  ),
  "Mistral-7B-v0.1": (
    7_241_732_096,
    dict(
      **dict(model_type="mistral", hidden_act="silu", hidden_size=4096, vocab_size=32000),
      **dict(intermediate_size=14336, max_position_embeddings=32768, rope_theta=10000.0),
      **dict(num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=8),
      **dict(rms_norm_eps=1e-05, sliding_window=4096, tie_word_embeddings=False),
    ),
  ),
  "Mixtral-8x7B-v0.1": (
    46_702_792_704,
    dict(
      **dict(model_type="mixtral", hidden_act="silu", hidden_size=4096, vocab_size=32000),
      **dict(intermediate_size=14336, max_position_embeddings=32768, rope_theta=1e6),
      **dict(num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=8),
      **dict(num_experts_per_tok=2, num_local_experts=8, router_aux_loss_coef=0.02),
      **dict(rms_norm_eps=1e-05, sliding_window=None, tie_word_embeddings=False),
    ),
  ),
  "Qwen2.5-0.5B": (
    494_032_768,
    dict(
      **dict(model_type="qwen2", hidden_act="silu", hidden_size=896, vocab_size=151936),
      **dict(intermediate_size=4864, max_position_embeddings=32768, max_window_layers=24),
      **dict(num_attention_heads=14, num_hidden_layers=24, num_key_value_heads=2),
      **dict(rms_norm_eps=1e-06, rope_theta=1000000.0, sliding_window=32768),
      **dict(tie_word_embeddings=True, use_mrope=False, use_sliding_window=False),
    ),
  ),
  "Qwen1.5-MoE-A2.7B": (
    14_315_784_192,
    dict(
      **dict(model_type="qwen2_moe", decoder_sparse_step=1, hidden_act="silu"),
      **dict(hidden_size=2048, intermediate_size=5632, max_position_embeddings=8192),
      **dict(max_window_layers=21, moe_intermediate_size=1408, norm_topk_prob=False),
      **dict(num_attention_heads=16, num_experts=60, num_experts_per_tok=4),
      **dict(num_hidden_layers=24, num_key_value_heads=16, rms_norm_eps=1e-06),
      **dict(rope_theta=1000000.0, shared_expert_intermediate_size=5632),
      **dict(sliding_window=32768, tie_word_embeddings=False, vocab_size=151936),
    ),
  ),
  "Qwen3-0.6B": (
    596_049_920,
    dict(
      **dict(model_type="qwen3", attention_bias=False, head_dim=128, hidden_act="silu"),
      **dict(hidden_size=1024, intermediate_size=3072, max_position_embeddings=40960),
      **dict(max_window_layers=28, num_attention_heads=16, num_hidden_layers=28),
      **dict(num_key_value_heads=8, rms_norm_eps=1e-06, rope_scaling=None),
      **dict(rope_theta=1000000, sliding_window=None, tie_word_embeddings=True),
      **dict(use_sliding_window=False, vocab_size=151936),
    ),
  ),
  "Qwen3-30B-A3B": (
    30_532_122_624,
    dict(
      **dict(model_type="qwen3_moe", attention_bias=False, decoder_sparse_step=1),
      **dict(head_dim=128, hidden_act="silu", hidden_size=2048, intermediate_size=6144),
      **dict(max_position_embeddings=40960, mlp_only_layers=[], norm_topk_prob=True),
      **dict(moe_intermediate_size=768, num_attention_heads=32, num_experts=128),
      **dict(num_experts_per_tok=8, num_hidden_layers=48, num_key_value_heads=4),
      **dict(rms_norm_eps=1e-06, rope_theta=1000000.0, tie_word_embeddings=False),
      **dict(use_sliding_window=False, vocab_size=151936),
    ),
  ),
  "gemma-2b": (
    2_506_172_416,
    dict(
      **dict(model_type="gemma", attention_bias=False, head_dim=256, hidden_act="gelu"),
      **dict(hidden_size=2048, intermediate_size=16384, max_position_embeddings=8192),
      **dict(num_attention_heads=8, num_hidden_layers=18, num_key_value_heads=1),
      **dict(rms_norm_eps=1e-06, rope_scaling=None, rope_theta=10000.0, vocab_size=256000),
    ),
  ),
  "gemma-2-2b": (
    2_614_341_888,
    dict(
      **dict(model_type="gemma2", attn_logit_softcapping=50.0, head_dim=256),
      **dict(final_logit_softcapping=30.0, hidden_act="gelu_pytorch_tanh"),
      **dict(hidden_activation="gelu_pytorch_tanh", hidden_size=2304, vocab_size=256000),
      **dict(intermediate_size=9216, max_position_embeddings=8192, num_attention_heads=8),
      **dict(num_hidden_layers=26, num_key_value_heads=4, query_pre_attn_scalar=256),
      **dict(rms_norm_eps=1e-06, rope_theta=10000.0, sliding_window=4096),
    ),
  ),
  "gemma-3-1b-it": (
    999_885_952,
    dict(
      **dict(model_type="gemma3_text", attention_bias=False, attn_logit_softcapping=None),
      **dict(final_logit_softcapping=None, head_dim=256, hidden_size=1152),
      **dict(hidden_activation="gelu_pytorch_tanh", intermediate_size=6912),
      **dict(max_position_embeddings=32768, num_attention_heads=4, num_hidden_layers=26),
      **dict(num_key_value_heads=1, query_pre_attn_scalar=256, rms_norm_eps=1e-06),
      **dict(rope_local_base_freq=10000, rope_scaling=None, rope_theta=1000000),
      **dict(sliding_window=512, sliding_window_pattern=6, vocab_size=262144),
    ),
  ),
  "gemma-3-4b-it, its text": (
    3_880_263_168,
    dict(
      model_type="gemma3",
      text_config=dict(
        **dict(model_type="gemma3_text", hidden_size=2560, intermediate_size=10240),
        **dict(num_hidden_layers=34, sliding_window=1024),
        rope_scaling=dict(factor=8.0, rope_type="linear"),
      ),
    ),
  ),
  "Phi-3-mini-4k-instruct": (
    3_821_079_552,
    dict(
      **dict(model_type="phi3", hidden_act="silu", hidden_size=3072, vocab_size=32064),
      **dict(intermediate_size=8192, max_position_embeddings=4096, rope_scaling=None),
      **dict(num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=32),
      **dict(original_max_position_embeddings=4096, rms_norm_eps=1e-05),
      **dict(rope_theta=10000.0, sliding_window=2047, tie_word_embeddings=False),
    ),
  ),
  "OLMo-2-1124-7B": (
    7_298_617_344,
    dict(
      **dict(model_type="olmo2", attention_bias=False, hidden_act="silu"),
      **dict(hidden_size=4096, intermediate_size=11008, max_position_embeddings=4096),
      **dict(num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=32),
      **dict(rms_norm_eps=1e-06, rope_scaling=None, rope_theta=500000),
      **dict(tie_word_embeddings=False, vocab_size=100352),
    ),
  ),
  "bloom-560m": (
    559_214_592,
    dict(
      **dict(model_type="bloom", apply_residual_connection_post_layernorm=False),
      **dict(layer_norm_epsilon=1e-05, n_embed=1024, n_inner=None, n_layer=24),
      **dict(num_attention_heads=16, offset_alibi=100, vocab_size=250880),
    ),
  ),
  "opt-125m": (
    125_239_296,
    dict(
      **dict(model_type="opt", activation_function="relu", do_layer_norm_before=True),
      **dict(_remove_final_layer_norm=False, ffn_dim=3072, hidden_size=768),
      **dict(max_position_embeddings=2048, num_attention_heads=12, num_hidden_layers=12),
      **dict(vocab_size=50272, word_embed_proj_dim=768),
    ),
  ),
  "bert-base-uncased": (
    109_514_298,  # with the head for masked tokens, without the pooler
    dict(
      **dict(model_type="bert", hidden_act="gelu", hidden_size=768, layer_norm_eps=1e-12),
      **dict(intermediate_size=3072, max_position_embeddings=512, num_attention_heads=12),
      **dict(num_hidden_layers=12, pad_token_id=0, type_vocab_size=2, vocab_size=30522),
      position_embedding_type="absolute",
    ),
  ),
  "roberta-base": (
    124_697_433,
    dict(
      **dict(model_type="roberta", hidden_act="gelu", hidden_size=768, pad_token_id=1),
      **dict(intermediate_size=3072, layer_norm_eps=1e-05, max_position_embeddings=514),
      **dict(num_attention_heads=12, num_hidden_layers=12, type_vocab_size=1),
      vocab_size=50265,
    ),
  ),
  "t5-small": (
    60_506_624,
    dict(
      **dict(model_type="t5", d_ff=2048, d_kv=64, d_model=512, is_encoder_decoder=True),
      **dict(layer_norm_epsilon=1e-06, n_positions=512, num_heads=8, num_layers=6),
      **dict(relative_attention_num_buckets=32, vocab_size=32128),
    ),
  ),
  "flan-t5-small": (
    76_961_152,
    dict(
      **dict(model_type="t5", d_ff=1024, d_kv=64, d_model=512, is_encoder_decoder=True),
      **dict(feed_forward_proj="gated-gelu", layer_norm_epsilon=1e-06, n_positions=512),
      **dict(num_decoder_layers=8, num_heads=6, num_layers=8, vocab_size=32128),
      **dict(relative_attention_max_distance=128, relative_attention_num_buckets=32),
      tie_word_embeddings=False,
    ),
  ),
}
HEADS = ("cls.predictions.bias", "lm_head.layer_norm.weight")
# Rows of position tables that only padding reads, which are not ours to have.
UNUSED = {"opt-125m": 2 * 768, "roberta-base": 2 * 768}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_published_config_is_the_published_model(name: str):
  count, values = CONFIGS[name]
  family = FAMILIES[values["model_type"]]
  cfg = read_config(family, Values(values, name, HEADS))
  params = abstract_params(build_model(cfg), make_mesh({"data": -1}))
  found = sum(math.prod(x.shape) for x in jax.tree.leaves(params)) + UNUSED.get(name, 0)
  assert found == count
  assert "gemma" not in name or cfg.activation == "gelu_tanh"
