# SPDX-License-Identifier: Apache-2.0
"""Gemma 3 1B: a decoder of 1.0B parameters, five blocks local, one global.

What:       26 blocks, 1,152 wide, 4 query and 1 key/value head of 256 dims, normalised;
            local blocks see 512 tokens; norms before and after each branch, GEGLU.
Cost:       2T tokens, 1.2e22 FLOPs (6 a parameter and token); 512 TPU v5e chips in the
            report (table 2). State in float32: 16 GB (weights, gradients, Adam's moments).
Expected:   the original completes 62.3% of HellaSwag, 10-shot (model card); the shape is
            what is tested here.
Command:    flaxlm plan gemma3_1b --mesh fsdp=64 --device h200
            python train.py gemma3_1b --mesh fsdp=64
Source:     Gemma Team (2025), section 2 (shape); google/gemma-3-1b-pt. Rate, batch and
            warm-up are not published, and the teacher that it learns from is not used here.
Parameters: 999,885,952
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
    depth=26,
    width=1152,
    num_heads=4,
    num_kv_heads=1,
    head_dim=256,
    ffn_width=6912,
    vocab_size=262144,
    context=32768,
    rope=RopeConfig(theta=1_000_000, local_theta=10_000),
    norm_placement="both",
    embedding_scaled=True,
    window=512,
    layer_pattern="LLLLLG",
    attention_scale=256**-0.5,
    qk_norm="head",
    activation="gelu_tanh",
    tied_embeddings=True,
  ),
  tokenizer=TokenizerConfig(vocab_size=262144),
  # The original's text is not public: put your own into a folder `corpus`.
  data=DataConfig(corpus="files:corpus", seq_len=32768, batch_size=128),
  optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=2000),
  training=TrainingConfig(
    num_steps=477_000,
    eval_every_steps=1000,
    eval_batches=20,
    dtype="bfloat16",
    remat="full",
    scanned=True,
  ),
)
