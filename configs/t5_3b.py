# SPDX-License-Identifier: Apache-2.0
"""T5 3B: an encoder-decoder of 2.9B parameters.

What:       24 + 24 blocks, 1,024 wide, 32 heads of 128; bias by relative position, RMSNorm,
            ReLU, no biases in the layers; attention is not scaled, the tied head is.
Cost:       a million steps, 1T source tokens. State in float32: 23 GB (weights and
            gradients; Adafactor's moments are small).
Expected:   the original, fine-tuned, has 88.5 on GLUE (table 14); the shape is what is
            tested here.
Command:    flaxlm plan t5_3b --mesh fsdp=64 --device h200
            python train.py t5_3b --mesh fsdp=64
Source:     Raffel et al. (2020), sections 2.1 and 3.7; google-t5/t5-3b.
Parameters: 2,851,598,336
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
    family="encoder_decoder",
    depth=24,
    width=1024,
    num_heads=32,
    head_dim=128,
    ffn_width=16384,
    vocab_size=32128,
    context=512,
    positions="relative",
    relative_buckets=32,
    relative_distance=128,
    dropout=0.1,
    attention_scale=1.0,
    activation="relu",
    gated=False,
    tied_embeddings=True,
    logit_scale=1024**-0.5,
  ),
  tokenizer=TokenizerConfig(vocab_size=32128),
  # One of the original's tasks; the rest is mostly C4 with gaps to fill.
  data=DataConfig(
    corpus="tfds:wmt14_translate/de-en", objective="seq2seq", seq_len=512, batch_size=2048
  ),
  optimizer=OptimizerConfig(
    kind="adafactor",
    learning_rate=1e-2,
    schedule="inverse_sqrt",
    warmup_steps=10_000,
    weight_decay=0.0,
  ),
  training=TrainingConfig(
    num_steps=1_000_000,
    eval_every_steps=1000,
    eval_batches=20,
    dtype="bfloat16",
    remat="full",
    scanned=True,
  ),
)
