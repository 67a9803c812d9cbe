# SPDX-License-Identifier: Apache-2.0
"""FLAN-T5 large: an encoder-decoder of 783M parameters, tuned on instructions.

What:       T5 1.1's architecture: 24 + 24 blocks, 1,024 wide, 16 heads of 64; bias by
            relative position, RMSNorm, GEGLU, no biases in the layers, a head of its own.
Cost:       64,000 steps of tuning, after a million of T5's. State in float32: 6.3 GB
            (weights and gradients; Adafactor's moments are small).
Expected:   the original answers 45.1% of MMLU (table 5); the shape is what is tested here.
Command:    flaxlm plan flan_t5_large --mesh data=8 --device h200
            python train.py flan_t5_large --mesh data=8
Source:     Chung et al. (2022), appendix E (training); t5x's t5_1_1/large.gin;
            google/flan-t5-large.
Parameters: 783,150,080
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
    num_heads=16,
    head_dim=64,
    ffn_width=2816,
    vocab_size=32128,
    context=512,
    positions="relative",
    relative_buckets=32,
    relative_distance=128,
    dropout=0.05,
    attention_scale=1.0,
    activation="gelu_tanh",
    gated=True,
    tied_embeddings=False,
  ),
  tokenizer=TokenizerConfig(vocab_size=32128),
  # One task of pairs stands for the original's 1,836.
  data=DataConfig(
    corpus="tfds:wmt14_translate/de-en", objective="seq2seq", seq_len=512, batch_size=64
  ),
  optimizer=OptimizerConfig(
    kind="adafactor",
    learning_rate=5e-4,
    schedule="constant",
    warmup_steps=0,
    weight_decay=0.0,
  ),
  training=TrainingConfig(
    num_steps=64_000, eval_every_steps=1000, eval_batches=20, dtype="bfloat16"
  ),
)
