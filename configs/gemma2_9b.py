# SPDX-License-Identifier: Apache-2.0
"""Gemma 2 9B: a decoder of 9.2B parameters, local and global in turn.

What:       42 blocks, 3,584 wide, 16 query and 8 key/value heads of 256; every second block
            sees 4,096 tokens; norms before and after each branch, GEGLU, capped scores and
            logits.
Cost:       8T tokens, 4.4e23 FLOPs (6 a parameter and token); 4,096 TPU v4 chips in the
            report (table 3). State in float32: 148 GB (weights, gradients, Adam's moments).
Expected:   the original answers 71.3% of MMLU, 5-shot (model card); the shape is what is
            tested here.
Command:    flaxlm plan gemma2_9b --mesh fsdp=256 --device h200
            python train.py gemma2_9b --mesh fsdp=256
Source:     Gemma Team (2024), table 1 (shape); google/gemma-2-9b. Rate, batch and warm-up
            are not published, and the teacher that it learns from is not used here.
Parameters: 9,241,705,984
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
    depth=42,
    width=3584,
    num_heads=16,
    num_kv_heads=8,
    head_dim=256,
    ffn_width=14336,
    vocab_size=256000,
    context=8192,
    norm_placement="both",
    embedding_scaled=True,
    window=4096,
    layer_pattern="LG",
    attention_scale=256**-0.5,
    attention_softcap=50.0,
    activation="gelu_tanh",
    tied_embeddings=True,
    logit_softcap=30.0,
  ),
  tokenizer=TokenizerConfig(vocab_size=256000),
  # The original's text is not public: put your own into a folder `corpus`.
  data=DataConfig(corpus="files:corpus", seq_len=8192, batch_size=1024),
  optimizer=OptimizerConfig(learning_rate=6e-4, warmup_steps=2000),
  training=TrainingConfig(
    num_steps=954_000,
    eval_every_steps=1000,
    eval_batches=20,
    dtype="bfloat16",
    remat="full",
    scanned=True,
  ),
)
