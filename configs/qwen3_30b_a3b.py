# SPDX-License-Identifier: Apache-2.0
"""Qwen3 30B-A3B: a decoder of 30.5B parameters, of which a token uses 3.3B.

What:       48 blocks, 2,048 wide, 32 query and 4 key/value heads of 128 dims, normalised;
            128 experts in each block, 8 of them for each token; RoPE, RMSNorm, SwiGLU, no
            biases.
Cost:       36T tokens, 7.2e23 FLOPs (6 a parameter and token). State in float32: 489 GB
            (weights, gradients, Adam's moments).
Expected:   the original base answers 81.38% of MMLU, 5-shot (section 3.3); the shape is
            what is tested here.
Command:    flaxlm plan qwen3_30b_a3b --mesh fsdp=32,expert=8 --device h200
            python train.py qwen3_30b_a3b --mesh fsdp=32,expert=8
Source:     Yang et al. (2025), table 2; Qwen/Qwen3-30B-A3B. Rate, batch and warm-up are not
            published.
Parameters: 30,532,122,624 (3,353,032,704 for each token)
"""

from flaxlm.config import (
  Config,
  DataConfig,
  ModelConfig,
  MoEConfig,
  OptimizerConfig,
  RopeConfig,
  TokenizerConfig,
  TrainingConfig,
)

config = Config(
  model=ModelConfig(
    depth=48,
    width=2048,
    num_heads=32,
    num_kv_heads=4,
    head_dim=128,
    vocab_size=151936,
    context=40960,
    rope=RopeConfig(theta=1_000_000),
    qk_norm="head",
    moe=MoEConfig(
      num_experts=128, experts_per_token=8, expert_width=768, load_balance_weight=0.001
    ),
    tied_embeddings=False,
  ),
  tokenizer=TokenizerConfig(vocab_size=151936),
  # The original's text is not public: put your own into a folder `corpus`.
  data=DataConfig(corpus="files:corpus", seq_len=4096, batch_size=4096),
  optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2000),
  training=TrainingConfig(
    num_steps=2_146_000,
    eval_every_steps=1000,
    eval_batches=20,
    dtype="bfloat16",
    remat="full",
    scanned=True,
  ),
)
