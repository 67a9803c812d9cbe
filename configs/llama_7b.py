# SPDX-License-Identifier: Apache-2.0
"""LLaMA 7B: a decoder of 6.7B parameters.

What:       32 blocks, 4,096 wide, 32 heads; RoPE, RMSNorm, SwiGLU, no biases.
Cost:       1T tokens, 4.0e22 FLOPs (6 a parameter and token); 82,432 A100 hours in the
            paper (table 15). State in float32: 108 GB (weights, gradients, Adam's moments).
Expected:   the original answers 35.1% of MMLU, 5-shot (table 9); the shape is what is
            tested here.
Command:    flaxlm plan llama_7b --mesh fsdp=256 --device h200
            python train.py llama_7b --mesh fsdp=256
Source:     Touvron et al. (2023), table 2 and section 2.3; params.json of the release.
Parameters: 6,738,415,616
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
    depth=32,
    width=4096,
    num_heads=32,
    ffn_width=11008,
    vocab_size=32000,
    context=2048,
    norm_epsilon=1e-6,
    tied_embeddings=False,
  ),
  tokenizer=TokenizerConfig(vocab_size=32000),
  # C4 is 15% of the original's mixture, most of which is not in TFDS.
  data=DataConfig(corpus="tfds:c4/en", seq_len=2048, batch_size=2048),
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
