# SPDX-License-Identifier: Apache-2.0
"""LLaMA 33B: a decoder of 32.5B parameters.

What:       60 blocks, 6,656 wide, 52 heads; RoPE, RMSNorm, SwiGLU, no biases.
Cost:       1.4T tokens, 2.7e23 FLOPs (6 a parameter and token); 530,432 A100 hours in the
            paper (table 15). State in float32: 520 GB (weights, gradients, Adam's moments).
Expected:   the original answers 57.8% of MMLU, 5-shot (table 9); the shape is what is
            tested here.
Command:    flaxlm plan llama_33b --mesh fsdp=256 --device h200
            python train.py llama_33b --mesh fsdp=256
Source:     Touvron et al. (2023), table 2 and section 2.3; params.json of the release.
Parameters: 32,528,943,616
"""

from flaxlm.config import (
  Config,
  DataConfig,
  ModelConfig,
  OptimizerConfig,
  TokenizerConfig,
  TrainingConfig,
)

config = Config(
  model=ModelConfig(
    depth=60,
    width=6656,
    num_heads=52,
    ffn_width=17920,
    vocab_size=32000,
    context=2048,
    norm_epsilon=1e-6,
    tied_embeddings=False,
  ),
  tokenizer=TokenizerConfig(vocab_size=32000),
  # C4 is 15% of the original's mixture, most of which is not in TFDS.
  data=DataConfig(corpus="tfds:c4/en", seq_len=2048, batch_size=2048),
  optimizer=OptimizerConfig(learning_rate=1.5e-4, warmup_steps=2000),
  training=TrainingConfig(
    num_steps=333_800,
    eval_every_steps=1000,
    eval_batches=20,
    dtype="bfloat16",
    remat="full",
    scanned=True,
  ),
)
