# SPDX-License-Identifier: Apache-2.0
"""The architectures behind the cards in configs/, one function for each family.

A card of a published model names its family, the sizes that differ, and how it is trained:
`card(model=llama3(depth=32, ...), data=..., optimizer=..., num_steps=...)`. A family's
function sets every field in which its architecture differs from `ModelConfig`'s defaults
(pre-norm with RMSNorm, RoPE, SwiGLU, no biases, a tied head); its `sizes` are those fields
of `ModelConfig` that a card gives. Standard library only.

What the cards have in common:
- `6ND`: FLOPs of training are 6 for each parameter (N) and token (D), forward and backward
  (Kaplan et al., 2020, section 2.1).
- `float32 state`: weights and gradients, and with Adam its two moments; Adafactor's moments
  are small.
- `not trained here`: tests compare the number of parameters with the published one; nobody
  has repeated the training with this package.
- `files:corpus`: the text of the original is not public, so put your own into a folder
  `corpus`.
"""

from typing import Any, Literal

from flaxlm.config.model import ModelConfig, MoEConfig, RopeConfig
from flaxlm.config.schema import (
  Config,
  DataConfig,
  OptimizerConfig,
  TokenizerConfig,
  TrainingConfig,
)
from flaxlm.errors import ConfigError


def card(
  *,
  model: ModelConfig,
  data: DataConfig,
  optimizer: OptimizerConfig,
  num_steps: int,
  remat: Literal["none", "full"] = "full",
) -> Config:
  """The experiment of a published model, which trains in bfloat16.

  `remat="full"` recomputes activations in the backward pass and compiles one block for all.
  A small model takes `remat="none"`: its activations fit in memory, and it runs faster.
  """
  if model.vocab_size is None:
    raise ConfigError("the card's model has no vocab_size", "set that of its tokenizer")
  return Config(
    model=model,
    tokenizer=TokenizerConfig(vocab_size=model.vocab_size),
    data=data,
    optimizer=optimizer,
    training=TrainingConfig(
      num_steps=num_steps,
      eval_every_steps=1000,
      eval_batches=20,
      dtype="bfloat16",
      remat=remat,
      scanned=remat == "full",
    ),
  )


# As in the first transformers; a feed-forward that is not gated has two matrices.
LAYERNORM_AND_BIASES: dict[str, Any] = dict(norm="layernorm", gated=False, biased=True)


# -- Encoder -------------------------------------------------------------------------------


def bert(*, width: int, **sizes: Any) -> ModelConfig:
  """BERT (Devlin et al., 2019, section 3), with its pooler and masked-word head.

  Learned positions and segments, LayerNorm after each branch, GELU, biases.
  """
  return ModelConfig(
    family="encoder",
    width=width,
    ffn_width=4 * width,
    vocab_size=30522,
    context=512,
    positions="learned",
    norm_placement="post",
    norm_epsilon=1e-12,
    embedding_norm=True,
    dropout=0.1,
    activation="gelu",
    head_biased=True,
    head_transform=True,
    num_token_types=2,
    pooler=True,
    **LAYERNORM_AND_BIASES,
    **sizes,
  )


# The original also read books, and had rows of 128 tokens for nine tenths of the steps.
BERT_DATA = DataConfig(
  corpus="tfds:wikipedia/20230601.en", objective="masked", seq_len=512, batch_size=256
)
BERT_OPTIMIZER = OptimizerConfig(  # appendix A.2
  learning_rate=1e-4,
  schedule="linear",
  warmup_steps=10_000,
  final_fraction=0.0,
  weight_decay=0.01,
  beta2=0.999,
  epsilon=1e-6,
)


# -- Encoder and decoder -------------------------------------------------------------------


T5_STACKS: dict[str, Any] = dict(
  family="encoder_decoder",
  vocab_size=32128,
  context=512,
  positions="relative",
  attention_scale=1.0,
)


def t5(*, width: int, **sizes: Any) -> ModelConfig:
  """T5 (Raffel et al., 2020, section 2.1): as many blocks in the encoder as in the decoder.

  Bias by relative position, RMSNorm, ReLU, no biases in the layers; attention is not
  scaled, but the tied head is.
  """
  return ModelConfig(
    width=width,
    dropout=0.1,
    activation="relu",
    gated=False,
    logit_scale=width**-0.5,
    **T5_STACKS,
    **sizes,
  )


# One of the original's tasks; the rest is mostly C4 with gaps to fill.
T5_DATA = DataConfig(
  corpus="tfds:wmt14_translate/de-en", objective="seq2seq", seq_len=512, batch_size=2048
)
T5_OPTIMIZER = OptimizerConfig(  # section 3.1.2
  kind="adafactor",
  learning_rate=1e-2,
  schedule="inverse_sqrt",
  warmup_steps=10_000,
  weight_decay=0.0,
)


def flan_t5(**sizes: Any) -> ModelConfig:
  """FLAN-T5 (Chung et al., 2022): T5 1.1's architecture, tuned on instructions.

  Version 1.1 has GEGLU (Shazeer, 2020) and a head of its own, which is not scaled.
  """
  return ModelConfig(
    head_dim=64,
    dropout=0.05,
    activation="gelu_tanh",
    tied_embeddings=False,
    **T5_STACKS,
    **sizes,
  )


# One task, translation, stands for the original's 1,836.
FLAN_T5_DATA = DataConfig(
  corpus="tfds:wmt14_translate/de-en", objective="seq2seq", seq_len=512, batch_size=64
)
FLAN_T5_OPTIMIZER = OptimizerConfig(  # appendix E
  kind="adafactor",
  learning_rate=5e-4,
  schedule="constant",
  warmup_steps=0,
  weight_decay=0.0,
)


# -- Decoders ------------------------------------------------------------------------------


def gpt2(*, width: int, context: int = 1024, **sizes: Any) -> ModelConfig:
  """GPT-2 (Radford et al., 2019, section 2.3) and GPT-3 (Brown et al., 2020, section 2.1).

  Learned positions, LayerNorm, GELU, biases.
  """
  return ModelConfig(
    width=width,
    ffn_width=4 * width,
    vocab_size=50257,
    context=context,
    positions="learned",
    norm_epsilon=1e-5,
    activation="gelu_tanh",
    **LAYERNORM_AND_BIASES,
    **sizes,
  )


def bloom(*, width: int, **sizes: Any) -> ModelConfig:
  """BLOOM (Le Scao et al., 2022, section 3.2).

  ALiBi, LayerNorm (one more after the embedding), GELU, biases.
  """
  return ModelConfig(
    width=width,
    ffn_width=4 * width,
    vocab_size=250880,
    context=2048,
    positions="alibi",
    norm_epsilon=1e-5,
    embedding_norm=True,
    activation="gelu_tanh",
    **LAYERNORM_AND_BIASES,
    **sizes,
  )


def palm(*, width: int, **sizes: Any) -> ModelConfig:
  """PaLM (Chowdhery et al., 2022, section 2).

  Attention, whose heads share one key/value head, and SwiGLU run in parallel after one
  LayerNorm; RoPE, no bias anywhere, a tied head that is scaled.
  """
  return ModelConfig(
    width=width,
    num_kv_heads=1,
    head_dim=256,
    ffn_width=4 * width,
    vocab_size=256000,
    context=2048,
    norm="layernorm",
    norm_biased=False,
    parallel="one_norm",
    logit_scale=width**-0.5,
    **sizes,
  )


# Section 5. The original decays by the rate squared: 2.1e-5 a step on average, as here.
PALM_OPTIMIZER = OptimizerConfig(
  kind="adafactor",
  learning_rate=1e-2,
  schedule="inverse_sqrt",
  warmup_steps=10_000,
  weight_decay=2.1e-3,
)


def llama(**sizes: Any) -> ModelConfig:
  """LLaMA (Touvron et al., 2023, section 2.2): RoPE, RMSNorm, SwiGLU, no biases."""
  return ModelConfig(vocab_size=32000, context=2048, tied_embeddings=False, **sizes)


def llama3(**sizes: Any) -> ModelConfig:
  """Llama 3.1 (Grattafiori et al., 2024, section 3.2).

  LLaMA with 8 key/value heads, and with RoPE stretched by 8 for a context of 128K instead
  of 8K, as in the released config.json.
  """
  return ModelConfig(
    num_kv_heads=8,
    vocab_size=128256,
    context=131072,
    rope=RopeConfig(
      theta=500_000,
      scaling="llama3",
      factor=8,
      original_context=8192,
      slow_turns=1,
      fast_turns=4,
    ),
    norm_epsilon=1e-5,
    tied_embeddings=False,
    **sizes,
  )


def mistral(**sizes: Any) -> ModelConfig:
  """Mistral (Jiang et al., 2023, section 2).

  LLaMA with 8 key/value heads, and with a window of 4,096 tokens in every block.
  """
  return ModelConfig(
    num_kv_heads=8,
    vocab_size=32000,
    context=8192,
    norm_epsilon=1e-5,
    window=4096,
    tied_embeddings=False,
    **sizes,
  )


def mixtral(*, expert_width: int, **sizes: Any) -> ModelConfig:
  """Mixtral (Jiang et al., 2024, section 2).

  Mistral with 8 experts in each block, 2 of them for each token, and without a window.
  """
  return ModelConfig(
    num_kv_heads=8,
    vocab_size=32000,
    context=32768,
    rope=RopeConfig(theta=1_000_000),
    norm_epsilon=1e-5,
    moe=MoEConfig(
      num_experts=8,
      experts_per_token=2,
      expert_width=expert_width,
      load_balance_weight=0.02,
    ),
    tied_embeddings=False,
    **sizes,
  )


def gemma(
  *, num_heads: int, head_dim: int = 256, scale_dim: int | None = None, **others: Any
) -> ModelConfig:
  """What Gemma 2 and 3 have in common.

  Two query heads share a key/value head; norms before and after each branch; GEGLU. Scores
  are divided by the square root of `scale_dim`: the head dim, except in the 27B models,
  where it is width / num_heads.
  """
  return ModelConfig(
    **dict(num_heads=num_heads, num_kv_heads=num_heads // 2, head_dim=head_dim) | others,
    norm_placement="both",
    embedding_scaled=True,
    attention_scale=(scale_dim or head_dim) ** -0.5,
    activation="gelu_tanh",
  )


def gemma2(**sizes: Any) -> ModelConfig:
  """Gemma 2 (Gemma Team, 2024, section 2); see `gemma`.

  Local and global blocks alternate; capped scores and logits.
  """
  return gemma(
    vocab_size=256000,
    context=8192,
    window=4096,
    layer_pattern="LG",
    attention_softcap=50.0,
    logit_softcap=30.0,
    **sizes,
  )


def gemma3(**sizes: Any) -> ModelConfig:
  """The decoder of the Gemma 3 models that also read images (Gemma Team, 2025, section 2).

  Gemma 2 with five local blocks to each global one, whose RoPE is stretched by 8 to 128K,
  and with normalised queries and keys instead of caps.
  """
  stretched = RopeConfig(theta=1_000_000, local_theta=10_000, scaling="linear", factor=8)
  fields: dict[str, Any] = dict(
    vocab_size=262208, context=131072, rope=stretched, window=1024
  )
  return gemma(layer_pattern="LLLLLG", qk_norm="head", **fields | sizes)


def gemma3_text(**sizes: Any) -> ModelConfig:
  """Gemma 3's model for text alone, the 1B (Gemma Team, 2025, section 2).

  As `gemma3`, but with a context of 32K that needs no stretching, with narrower windows,
  and without the 64 ids for images.
  """
  return gemma3(
    vocab_size=262144,
    context=32768,
    rope=RopeConfig(theta=1_000_000, local_theta=10_000),
    window=512,
    **sizes,
  )


QWEN3: dict[str, Any] = dict(
  head_dim=128,
  vocab_size=151936,
  context=40960,
  rope=RopeConfig(theta=1_000_000),
  qk_norm="head",
)


def qwen3(**sizes: Any) -> ModelConfig:
  """Qwen3, dense (Yang et al., 2025, section 2).

  LLaMA with 8 key/value heads, each of 128 dims whatever the width, and with normalised
  queries and keys. The small models use one matrix for embedding and head.
  """
  return ModelConfig(num_kv_heads=8, **QWEN3, **sizes)


def qwen3_moe(*, expert_width: int, **sizes: Any) -> ModelConfig:
  """Qwen3 with 128 experts, 8 of them for each token (Yang et al., 2025, section 2)."""
  moe = MoEConfig(
    num_experts=128,
    experts_per_token=8,
    expert_width=expert_width,
    load_balance_weight=0.001,
  )
  return ModelConfig(num_kv_heads=4, moe=moe, tied_embeddings=False, **QWEN3, **sizes)
