# SPDX-License-Identifier: Apache-2.0
"""Mixtral 8x7B: a decoder of 46.7B parameters, of which a token uses 12.9B.

What:       Mistral 7B with 8 experts in each block, 2 of them for each token, and no
            window.
Cost:       not published; 1T tokens, 7.7e22 FLOPs (6 a parameter and token). State in
            float32: 747 GB (weights, gradients, Adam's moments).
Expected:   the original answers 70.6% of MMLU (table 2); the shape is what is tested here.
Command:    flaxlm plan mixtral_8x7b --mesh fsdp=32,expert=8 --device h200
            python train.py mixtral_8x7b --mesh fsdp=32,expert=8
Source:     Jiang et al. (2024), table 1; mistralai/Mixtral-8x7B-v0.1. Its training is not
            published: these are LLaMA 7B's values.
Parameters: 46,702,792,704 (12,879,925,248 for each token)
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
    depth=32,
    width=4096,
    num_heads=32,
    num_kv_heads=8,
    vocab_size=32000,
    context=32768,
    rope=RopeConfig(theta=1_000_000),
    norm_epsilon=1e-5,
    moe=MoEConfig(
      num_experts=8, experts_per_token=2, expert_width=14336, load_balance_weight=0.02
    ),
    tied_embeddings=False,
  ),
  tokenizer=TokenizerConfig(vocab_size=32000),
  # The original's text is not public: put your own into a folder `corpus`.
  data=DataConfig(corpus="files:corpus", seq_len=8192, batch_size=512),
  optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2000),
  training=TrainingConfig(
    num_steps=238_400,
    eval_every_steps=1000,
    eval_batches=20,
    dtype="bfloat16",
    remat="full",
    scanned=True,
  ),
)
