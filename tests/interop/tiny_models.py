# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of `transformers`, for comparison: each family in several shapes.

Norms and biases are random too: at their initial ones and zeros, swapping two of them would
go unnoticed.
"""

import functools
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

LLAMA: dict[str, Any] = dict(
  vocab_size=67,
  hidden_size=32,
  intermediate_size=48,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=128,
)
LLG = ["sliding_attention", "sliding_attention", "full_attention"]
MHA, MQA = dict(num_key_value_heads=4), dict(num_key_value_heads=1)
TIED, UNTIED = dict(tie_word_embeddings=True), dict(tie_word_embeddings=False)
HEAD_12 = dict(head_dim=12)
GPT: dict[str, Any] = dict(vocab_size=67, n_embd=32, n_layer=2, n_head=4, n_positions=128)
NEOX: dict[str, Any] = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
BLOOM: dict[str, Any] = dict(vocab_size=67, hidden_size=48, n_layer=2, seq_length=128)
OPT = {k: v for k, v in NEOX.items() if k != "intermediate_size"} | dict(ffn_dim=48)
OPT |= dict(word_embed_proj_dim=32)
BERT = NEOX
T5: dict[str, Any] = dict(vocab_size=67, d_model=32, d_kv=12, d_ff=48, num_heads=4)
T5 |= dict(num_layers=2, num_decoder_layers=3)
MOE: dict[str, Any] = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)


def scaled(**rope: Any) -> dict[str, Any]:
  return {"rope_parameters": {"rope_theta": 10_000.0, **rope}}


LINEAR = scaled(rope_type="linear", factor=2.5)
YARN = scaled(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)
YARN_OWN = scaled(
  **dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32),
  **dict(beta_fast=16.0, beta_slow=2.0, attention_factor=1.3),
)
LLAMA3 = scaled(
  **dict(rope_type="llama3", factor=4.0, original_max_position_embeddings=32),
  **dict(low_freq_factor=1.0, high_freq_factor=4.0),
)
GEMMA3_SCALED = {
  "rope_parameters": {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 20_000.0},
  }
}


def partial(share: float) -> dict[str, Any]:
  return scaled(rope_type="default", partial_rotary_factor=share)


class Variant(NamedTuple):
  """A class of transformers with a head, and the values of its config."""

  name: str
  values: dict[str, Any]
  head: str = "ForCausalLM"
  greedy: bool = False  # this one of its family is compared token by token, too


VARIANTS: dict[str, Variant] = {
  "gpt2": Variant("GPT2", GPT, "LMHeadModel", True),
  "gpt2_untied_relu": Variant(
    "GPT2", {**GPT, **UNTIED, "n_inner": 40, "activation_function": "relu"}, "LMHeadModel"
  ),
  "neox": Variant("GPTNeoX", NEOX, greedy=True),
  "neox_serial_tied": Variant(
    "GPTNeoX",
    NEOX | TIED | partial(1.0) | dict(use_parallel_residual=False, attention_bias=False),
  ),
  "gptj": Variant("GPTJ", GPT | dict(rotary_dim=4), greedy=True),
  "gptj_whole_head": Variant("GPTJ", GPT | dict(rotary_dim=8, n_inner=40)),
  "llama_3": Variant("Llama", LLAMA | LLAMA3, greedy=True),
  "llama_tied_biased": Variant(
    "Llama", LLAMA | MHA | TIED | YARN | dict(attention_bias=True, mlp_bias=True)
  ),
  "llama_linear": Variant("Llama", LLAMA | LINEAR | HEAD_12),
  "llama_yarn": Variant("Llama", LLAMA | YARN_OWN | MQA),
  "mistral_window": Variant("Mistral", LLAMA | dict(sliding_window=7), greedy=True),
  "mistral_whole": Variant("Mistral", LLAMA | MHA | TIED | dict(sliding_window=None)),
  "mixtral": Variant(
    "Mixtral", LLAMA | dict(num_local_experts=4, sliding_window=7), greedy=True
  ),
  "mixtral_top_1": Variant(
    "Mixtral", LLAMA | MHA | TIED | dict(num_local_experts=3, num_experts_per_tok=1)
  ),
  "qwen2": Variant("Qwen2", LLAMA | TIED, greedy=True),
  "qwen2_window": Variant(
    "Qwen2",
    LLAMA | MHA | YARN
    | dict(use_sliding_window=True, sliding_window=7, max_window_layers=1),
  ),
  "qwen2_moe": Variant(
    "Qwen2Moe", LLAMA | MOE | dict(shared_expert_intermediate_size=48), greedy=True
  ),
  "qwen2_moe_normed": Variant(
    "Qwen2Moe",
    LLAMA | MOE | MHA | TIED
    | dict(shared_expert_intermediate_size=24, norm_topk_prob=True),
  ),
  "qwen2_moe_window": Variant(
    "Qwen2Moe",
    LLAMA | MOE
    | dict(shared_expert_intermediate_size=24, num_hidden_layers=3, sliding_window=7)
    | dict(use_sliding_window=True, max_window_layers=2),
  ),
  "qwen3": Variant("Qwen3", LLAMA | HEAD_12, greedy=True),
  "qwen3_tied_window": Variant(
    "Qwen3",
    LLAMA | MHA | TIED | HEAD_12
    | dict(use_sliding_window=True, sliding_window=7, max_window_layers=0)
    | dict(attention_bias=True),
  ),
  "qwen3_moe": Variant(
    "Qwen3Moe", LLAMA | MOE | HEAD_12 | dict(norm_topk_prob=True), greedy=True
  ),
  "qwen3_moe_raw": Variant("Qwen3Moe", LLAMA | MOE | HEAD_12 | MHA | TIED),
  "gemma": Variant("Gemma", LLAMA | HEAD_12 | MQA, greedy=True),
  "gemma_untied": Variant("Gemma", LLAMA | HEAD_12 | MHA | UNTIED),
  "gemma2": Variant(
    "Gemma2", LLAMA | HEAD_12 | dict(sliding_window=7, num_hidden_layers=3), greedy=True
  ),
  "gemma2_other": Variant(
    "Gemma2",
    LLAMA | HEAD_12 | MHA | dict(sliding_window=5, query_pre_attn_scalar=20)
    | dict(attn_logit_softcapping=2.0, final_logit_softcapping=None),
  ),
  "gemma3": Variant(
    "Gemma3",
    LLAMA | HEAD_12 | dict(sliding_window=7, num_hidden_layers=3, layer_types=LLG),
    greedy=True,
  ),
  "gemma3_scaled": Variant(
    "Gemma3",
    LLAMA | HEAD_12 | MHA | GEMMA3_SCALED
    | dict(sliding_window=5, layer_types=["full_attention", "sliding_attention"]),
  ),
  "phi3": Variant("Phi3", LLAMA | dict(sliding_window=7, pad_token_id=0), greedy=True),
  "phi3_partial": Variant(
    "Phi3",
    LLAMA | MHA | TIED | dict(pad_token_id=0, hidden_size=64) | partial(0.75),
  ),
  "olmo2": Variant("Olmo2", LLAMA, greedy=True),
  "olmo2_tied": Variant("Olmo2", LLAMA | MHA | TIED | dict(rms_norm_eps=1e-4)),
  "bloom": Variant("Bloom", BLOOM | dict(n_head=4), greedy=True),
  "bloom_6_heads": Variant("Bloom", BLOOM | UNTIED | dict(n_head=6)),
  "opt": Variant("OPT", OPT, greedy=True),
  "opt_post_norm": Variant("OPT", OPT | UNTIED | dict(do_layer_norm_before=False)),
  "bert": Variant("Bert", BERT, "ForMaskedLM"),
  "bert_untied": Variant(
    "Bert", BERT | UNTIED | dict(type_vocab_size=3, hidden_act="gelu_new"), "ForMaskedLM"
  ),
  "bert_pretraining": Variant("Bert", BERT, "ForPreTraining"),
  "roberta": Variant("Roberta", BERT | dict(pad_token_id=1), "ForMaskedLM"),
  "roberta_one_type": Variant(
    "Roberta",
    BERT | UNTIED | dict(pad_token_id=1, type_vocab_size=1, num_attention_heads=2),
    "ForMaskedLM",
  ),
  "t5": Variant("T5", T5, "ForConditionalGeneration", True),
  "t5_gated_untied": Variant(
    "T5",
    T5 | UNTIED | dict(feed_forward_proj="gated-gelu", relative_attention_num_buckets=8)
    | dict(relative_attention_max_distance=16),
    "ForConditionalGeneration",
  ),
}  # fmt: skip


class Tiny(NamedTuple):
  """A model of transformers, and where it is saved."""

  model: Any
  folder: Path


@functools.cache
def _root() -> tempfile.TemporaryDirectory:
  return tempfile.TemporaryDirectory(prefix="tiny-models-")


@functools.cache
def tiny(name: str) -> Tiny:
  """The random model of a variant, made once per process."""
  import torch
  import transformers

  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  variant = VARIANTS[name]
  config_name = {"Gemma3": "Gemma3Text"}.get(variant.name, variant.name)
  values = {"bos_token_id": 2, "eos_token_id": 3, **variant.values}
  config = getattr(transformers, f"{config_name}Config")(**values)
  config._attn_implementation = "eager"
  torch.manual_seed(sum(map(ord, name)))
  model = getattr(transformers, variant.name + variant.head)(config).eval()
  if name == "t5_gated_untied":  # version 5 ties all of them, until they are found apart
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
  with torch.no_grad():
    for parameter in model.parameters():
      noise = torch.randn(parameter.shape)
      if parameter.dim() == 1:
        parameter += 0.3 * noise
      else:
        parameter.copy_(noise * parameter.shape[-1] ** -0.5)
  folder = Path(_root().name) / name
  model.save_pretrained(folder)
  return Tiny(model, folder)
