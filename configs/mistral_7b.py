# SPDX-License-Identifier: Apache-2.0
"""Mistral 7B v0.1: a decoder of 7.2B parameters with a sliding window.

What:       32 blocks, 4,096 wide, 32 query and 8 key/value heads; every block sees 4,096
            tokens back; RoPE, RMSNorm, SwiGLU, no biases.
Cost:       not published; 1T tokens, 4.3e22 FLOPs (6 a parameter and token). State in
            float32: 116 GB (weights, gradients, Adam's moments).
Expected:   the original answers 60.1% of MMLU (table 2); the shape is what is tested here.
Command:    flaxlm plan mistral_7b --mesh fsdp=256 --device h200
            python train.py mistral_7b --mesh fsdp=256
Source:     Jiang et al. (2023), table 1; mistralai/Mistral-7B-v0.1. Its training is not
            published: these are LLaMA 7B's values.
Parameters: 7,241,732,096
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
    num_kv_heads=8,
    ffn_width=14336,
    vocab_size=32000,
    context=8192,
    norm_epsilon=1e-5,
    window=4096,
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
