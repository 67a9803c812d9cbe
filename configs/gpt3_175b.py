# SPDX-License-Identifier: Apache-2.0
"""GPT-3: a decoder of 175B parameters.

What:       96 blocks, 12,288 wide, 96 heads; GPT-2's architecture. Attention is dense in
            every block: every second one of the original is banded, by a width that is not
            published.
Cost:       300B tokens, 3.1e23 FLOPs (6 a parameter and token). State in float32: 2.8 TB
            (weights, gradients, Adam's moments).
Expected:   the original completes 76.2% of LAMBADA, zero-shot (table 3.2); the shape is
            what is tested here.
Command:    flaxlm plan gpt3_175b --mesh fsdp=512 --device h200
            python train.py gpt3_175b --mesh fsdp=512
Source:     Brown et al. (2020), table 2.1 (shape, rate, batch), appendix B (the rest).
Parameters: 174,600,000,000 (table D.1, rounded to 0.1B)
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
    depth=96,
    width=12288,
    num_heads=96,
    ffn_width=49152,
    vocab_size=50257,
    context=2048,
    positions="learned",
    norm="layernorm",
    norm_epsilon=1e-5,
    activation="gelu_tanh",
    gated=False,
    biased=True,
    tied_embeddings=True,
  ),
  tokenizer=TokenizerConfig(vocab_size=50257),
  # The original's Common Crawl, filtered otherwise, was not published.
  data=DataConfig(corpus="tfds:c4/en", seq_len=2048, batch_size=1536),
  optimizer=OptimizerConfig(learning_rate=6e-5, warmup_steps=119),
  training=TrainingConfig(
    num_steps=95_400,
    eval_every_steps=1000,
    eval_batches=20,
    dtype="bfloat16",
    remat="full",
    scanned=True,
  ),
)
