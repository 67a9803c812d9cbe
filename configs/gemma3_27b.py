# SPDX-License-Identifier: Apache-2.0
"""Gemma 3 27B (text only): a decoder of 27.0B parameters, five blocks local, one global.

What:       62 blocks, 5,376 wide, 32 query and 16 key/value heads of 128 dims, normalised;
            local blocks see 1,024 tokens; norms before and after each branch, GEGLU.
Cost:       14T tokens, 2.3e24 FLOPs (6 a parameter and token); 6,144 TPU v5p chips in the
            report (table 2). State in float32: 432 GB (weights, gradients, Adam's moments).
Expected:   the original completes 85.6% of HellaSwag, 10-shot (model card); the shape is
            what is tested here.
Command:    flaxlm plan gemma3_27b --mesh fsdp=256 --device h200
            python train.py gemma3_27b --mesh fsdp=256
Source:     Gemma Team (2025), section 2 (shape); google/gemma-3-27b-pt. Rate, batch and
            warm-up are not published, and the teacher that it learns from is not used here.
Parameters: 27,009,346,304: the 27,432,406,640 of google/gemma-3-27b-pt without those that
            see pictures.
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
    depth=62,
    width=5376,
    num_heads=32,
    num_kv_heads=16,
    head_dim=128,
    ffn_width=21504,
    vocab_size=262208,
    context=131072,
    rope=RopeConfig(theta=1_000_000, local_theta=10_000, scaling="linear", factor=8),
    norm_placement="both",
    embedding_scaled=True,
    window=1024,
    layer_pattern="LLLLLG",
    attention_scale=168**-0.5,
    qk_norm="head",
    activation="gelu_tanh",
    tied_embeddings=True,
  ),
  tokenizer=TokenizerConfig(vocab_size=262208),
  # The original's text is not public: put your own into a folder `corpus`.
  data=DataConfig(corpus="files:corpus", seq_len=32768, batch_size=512),
  optimizer=OptimizerConfig(learning_rate=4e-4, warmup_steps=2000),
  training=TrainingConfig(
    num_steps=834_000,
    eval_every_steps=1000,
    eval_batches=20,
    dtype="bfloat16",
    remat="full",
    scanned=True,
  ),
)
