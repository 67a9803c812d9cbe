# SPDX-License-Identifier: Apache-2.0
"""Gemma 2 9B: a decoder of 9.2B parameters, local and global in turn.

What:       42 blocks, 3,584 wide, 16 query and 8 key/value heads of 256; every second sees
            4,096 tokens; norms around each branch, GEGLU, capped scores and logits.
Cost:       8T tokens, 4.4e23 FLOPs (6ND), 4,096 TPU v4; float32 state with Adam: 148 GB.
Expected:   the original answers 71.3% of MMLU, 5-shot (model card); not trained here.
Command:    flaxlm plan gemma2_9b --mesh fsdp=256 --device h200
            python train.py gemma2_9b --mesh fsdp=256
Source:     Gemma Team (2024), tables 1 (shape) and 3 (chips); google/gemma-2-9b. Rate,
            batch and warm-up are not published; distillation is left out.
Parameters: 9,241,705,984
"""

from flaxlm.config import DataConfig, OptimizerConfig
from flaxlm.config.families import card, gemma2

config = card(
  model=gemma2(depth=42, width=3584, num_heads=16, ffn_width=14336),
  data=DataConfig(corpus="files:corpus", seq_len=8192, batch_size=1024),  # your own text
  optimizer=OptimizerConfig(learning_rate=6e-4, warmup_steps=2000),
  num_steps=954_000,
)
