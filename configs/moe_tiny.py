# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts on Python's standard library: eight experts, two for each token.

What:     stdlib_tiny with 8 experts in each block, half as wide as its feed-forward, 2 for
          each token: the same work per token, three times the parameters.
Cost:     about 3 minutes on 2 CPU cores; no account, no download.
Expected: 1.690 held-out bits per byte after 440 steps; stdlib_tiny has 1.694 after 500,
          gzip -9 1.926.
Command:  python train.py moe_tiny
"""

from flaxlm.config import (
  Config,
  DataConfig,
  ModelConfig,
  MoEConfig,
  OptimizerConfig,
  TrainingConfig,
)

config = Config(
  model=ModelConfig(
    depth=4,
    width=128,
    num_heads=4,
    context=256,
    moe=MoEConfig(num_experts=8, experts_per_token=2, expert_width=176),
  ),
  data=DataConfig(corpus="stdlib", seq_len=256, batch_size=8),
  optimizer=OptimizerConfig(kind="muon", learning_rate=1e-2, warmup_steps=50),
  training=TrainingConfig(
    num_steps=440, eval_every_steps=220, sample_prompt="def __init__(self"
  ),
)
