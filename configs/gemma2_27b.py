# SPDX-License-Identifier: Apache-2.0
"""Gemma 2 27B: a decoder of 27.2B parameters, local and global in turn.

What:       46 blocks, 4,608 wide, 32 query and 16 key/value heads of 128; every second sees
            4,096 tokens; norms around each branch, GEGLU, capped scores and logits.
Cost:       13T tokens, 2.1e24 FLOPs (6ND), 6,144 TPU v5p; float32 state with Adam: 436 GB.
Expected:   the original answers 75.2% of MMLU, 5-shot (model card); not trained here.
Command:    flaxlm plan gemma2_27b --mesh fsdp=256 --device h200
            python train.py gemma2_27b --mesh fsdp=256
Source:     Gemma Team (2024), tables 1 (shape) and 3 (chips); google/gemma-2-27b. Rate,
            batch and warm-up are not published.
Parameters: 27,227,128,320
"""

from flaxlm.config import DataConfig, OptimizerConfig
from flaxlm.config.families import card, gemma2

config = card(
  model=gemma2(
    depth=46, width=4608, num_heads=32, ffn_width=36864, head_dim=128, scale_dim=144
  ),
  data=DataConfig(corpus="files:corpus", seq_len=8192, batch_size=2048),  # your own text
  optimizer=OptimizerConfig(learning_rate=4e-4, warmup_steps=2000),
  num_steps=775_000,
)
