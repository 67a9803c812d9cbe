# SPDX-License-Identifier: Apache-2.0
"""Qwen3 0.6B: a decoder of 0.6B parameters.

What:       28 blocks, 1,024 wide, 16 query and 8 key/value heads of 128 dims, normalised;
            RoPE, RMSNorm, SwiGLU, no biases, a tied head.
Cost:       36T tokens, 1.3e23 FLOPs (6 a parameter and token). State in float32: 9.5 GB
            (weights, gradients, Adam's moments).
Expected:   the original base answers 52.81% of MMLU, 5-shot (section 3.3); the shape is
            what is tested here.
Command:    flaxlm plan qwen3_0_6b --mesh fsdp=64 --device h200
            python train.py qwen3_0_6b --mesh fsdp=64
Source:     Yang et al. (2025), table 1; Qwen/Qwen3-0.6B. Rate, batch and warm-up are not
            published.
Parameters: 596,049,920
"""

from flaxlm.config import (
  Config,
  DataConfig,
  ModelConfig,
  OptimizerConfig,
  RopeConfig,
  TokenizerConfig,
  TrainingConfig,
)

config = Config(
  model=ModelConfig(
    depth=28,
    width=1024,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    ffn_width=3072,
    vocab_size=151936,
    context=40960,
    rope=RopeConfig(theta=1_000_000),
    qk_norm="head",
    tied_embeddings=True,
  ),
  tokenizer=TokenizerConfig(vocab_size=151936),
  # The original's text is not public: put your own into a folder `corpus`.
  data=DataConfig(corpus="files:corpus", seq_len=4096, batch_size=4096),
  optimizer=OptimizerConfig(learning_rate=6e-4, warmup_steps=2000),
  training=TrainingConfig(
    num_steps=2_146_000,
    eval_every_steps=1000,
    eval_batches=20,
    dtype="bfloat16",
    remat="full",
    scanned=True,
  ),
)
