# SPDX-License-Identifier: Apache-2.0
"""Mixtral 8x7B: a decoder of 46.7B parameters, of which a token uses 12.9B.

What:       Mistral 7B with 8 experts in each block, 2 for each token, and without a window.
Cost:       not published; 1T tokens, 7.7e22 FLOPs (6ND); float32 state with Adam: 747 GB.
Expected:   the original answers 70.6% of MMLU (table 2); not trained here.
Command:    flaxlm plan mixtral_8x7b --mesh fsdp=32,expert=8 --device h200
            python train.py mixtral_8x7b --mesh fsdp=32,expert=8
Source:     Jiang et al. (2024), table 1; mistralai/Mixtral-8x7B-v0.1. Its training is not
            published: these are LLaMA 7B's values.
Parameters: 46,702,792,704 (12,879,925,248 for each token)
"""

from flaxlm.config import DataConfig, OptimizerConfig
from flaxlm.config.families import card, mixtral

config = card(
  model=mixtral(depth=32, width=4096, num_heads=32, expert_width=14336),
  data=DataConfig(corpus="files:corpus", seq_len=8192, batch_size=512),  # your own text
  optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2000),
  num_steps=238_400,
)
