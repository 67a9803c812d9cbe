# SPDX-License-Identifier: Apache-2.0
"""Llama 3.1 70B: a decoder of 70.6B parameters with a context of 128K.

What:       80 blocks, 8,192 wide, 64 query and 8 key/value heads; RoPE that is stretched by
            8 from 8K, RMSNorm, SwiGLU, no biases.
Cost:       15T tokens, 6.3e24 FLOPs (6 a parameter and token); 7.0M H100 hours in the model
            card. State in float32: 1.1 TB (weights, gradients, Adam's moments).
Expected:   the original answers 79.3% of MMLU, 5-shot (model card); the shape is what is
            tested here.
Command:    flaxlm plan llama3_70b --mesh fsdp=512 --device h200
            python train.py llama3_70b --mesh fsdp=512
Source:     Grattafiori et al. (2024), table 3 (shape, rate) and section 3.4.1 (the 405B's
            schedule); meta-llama/Llama-3.1-70B. Its batch is not published.
Parameters: 70,553,706,496
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
    depth=80,
    width=8192,
    num_heads=64,
    num_kv_heads=8,
    ffn_width=28672,
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
  optimizer=OptimizerConfig(learning_rate=1.5e-4, warmup_steps=8000, final_fraction=0.01),
  training=TrainingConfig(
    num_steps=1_788_000,
    eval_every_steps=1000,
    eval_batches=20,
    dtype="bfloat16",
    remat="full",
    scanned=True,
  ),
)
