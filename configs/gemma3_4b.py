# SPDX-License-Identifier: Apache-2.0
"""Gemma 3 4B (text only): a decoder of 3.9B parameters, five blocks local, one global.

What:       34 blocks, 2,560 wide, 8 query and 4 key/value heads of 256 dims, normalised;
            local blocks see 1,024 tokens; norms before and after each branch, GEGLU.
Cost:       4T tokens, 9.3e22 FLOPs (6 a parameter and token); 2,048 TPU v5e chips in the
            report (table 2). State in float32: 62 GB (weights, gradients, Adam's moments).
Expected:   the original completes 77.2% of HellaSwag, 10-shot (model card); the shape is
            what is tested here.
Command:    flaxlm plan gemma3_4b --mesh fsdp=64 --device h200
            python train.py gemma3_4b --mesh fsdp=64
Source:     Gemma Team (2025), section 2 (shape); google/gemma-3-4b-pt. Rate, batch and
            warm-up are not published, and the teacher that it learns from is not used here.
Parameters: 3,880,263,168: the 4,300,079,472 of google/gemma-3-4b-pt without those that see
            pictures.
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
    depth=34,
    width=2560,
    num_heads=8,
    num_kv_heads=4,
    head_dim=256,
    ffn_width=10240,
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
  data=DataConfig(corpus="files:corpus", seq_len=32768, batch_size=256),
  optimizer=OptimizerConfig(learning_rate=8e-4, warmup_steps=2000),
  training=TrainingConfig(
    num_steps=477_000,
    eval_every_steps=1000,
    eval_batches=20,
    dtype="bfloat16",
    remat="full",
    scanned=True,
  ),
)
