# SPDX-License-Identifier: Apache-2.0
"""Llama 3.1 8B: a decoder of 8.0B parameters with a context of 128K.

What:       32 blocks, 4,096 wide, 32 query and 8 key/value heads; RoPE that is stretched by
            8 from 8K, RMSNorm, SwiGLU, no biases.
Cost:       15T tokens, 7.2e23 FLOPs (6 a parameter and token); 1.46M H100 hours in the
            model card. State in float32: 128 GB (weights, gradients, Adam's moments).
Expected:   the original answers 66.7% of MMLU, 5-shot (model card); the shape is what is
            tested here.
Command:    flaxlm plan llama3_8b --mesh fsdp=256 --device h200
            python train.py llama3_8b --mesh fsdp=256
Source:     Grattafiori et al. (2024), table 3 (shape, rate) and section 3.4.1 (the 405B's
            schedule); meta-llama/Llama-3.1-8B. Its batch is not published.
Parameters: 8,030,261,248
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
    depth=32,
    width=4096,
    num_heads=32,
    num_kv_heads=8,
    ffn_width=14336,
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
  ),
  tokenizer=TokenizerConfig(vocab_size=128256),
  # The original's text is not public: put your own into a folder `corpus`.
  data=DataConfig(corpus="files:corpus", seq_len=8192, batch_size=1024),
  optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=8000, final_fraction=0.01),
  training=TrainingConfig(
    num_steps=1_788_000,
    eval_every_steps=1000,
    eval_batches=20,
    dtype="bfloat16",
    remat="full",
    scanned=True,
  ),
)
