# SPDX-License-Identifier: Apache-2.0
"""Gemma 3 12B (text only): a decoder of 11.8B parameters, five blocks local, one global.

What:       48 blocks, 3,840 wide, 16 query and 8 key/value heads of 256 dims, normalised;
            local blocks see 1,024 tokens; norms before and after each branch, GEGLU.
Cost:       12T tokens, 8.5e23 FLOPs (6 a parameter and token); 6,144 TPU v4 chips in the
            report (table 2). State in float32: 188 GB (weights, gradients, Adam's moments).
Expected:   the original completes 84.2% of HellaSwag, 10-shot (model card); the shape is
            what is tested here.
Command:    flaxlm plan gemma3_12b --mesh fsdp=256 --device h200
            python train.py gemma3_12b --mesh fsdp=256
Source:     Gemma Team (2025), section 2 (shape); google/gemma-3-12b-pt. Rate, batch and
            warm-up are not published, and the teacher that it learns from is not used here.
Parameters: 11,766,034,176: the 12,187,325,040 of google/gemma-3-12b-pt without those that
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
    depth=48,
    width=3840,
    num_heads=16,
    num_kv_heads=8,
    head_dim=256,
    ffn_width=15360,
    vocab_size=262208,
    context=131072,
    rope=RopeConfig(theta=1_000_000, local_theta=10_000, scaling="linear", factor=8),
    norm_placement="both",
    embedding_scaled=True,
    window=1024,
    layer_pattern="LLLLLG",
    attention_scale=256**-0.5,
    qk_norm="head",
    activation="gelu_tanh",
    tied_embeddings=True,
  ),
  tokenizer=TokenizerConfig(vocab_size=262208),
  # The original's text is not public: put your own into a folder `corpus`.
  data=DataConfig(corpus="files:corpus", seq_len=32768, batch_size=512),
  optimizer=OptimizerConfig(learning_rate=6e-4, warmup_steps=2000),
  training=TrainingConfig(
    num_steps=715_000,
    eval_every_steps=1000,
    eval_batches=20,
    dtype="bfloat16",
    remat="full",
    scanned=True,
  ),
)
