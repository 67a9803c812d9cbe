# SPDX-License-Identifier: Apache-2.0
"""Gemma 3 27B (text only): a decoder of 27.0B parameters, five blocks local, one global.

What:       62 blocks, 5,376 wide, 32 query and 16 key/value heads of 128 dims, normalised;
            local blocks see 1,024 tokens; norms around each branch, GEGLU.
Cost:       14T tokens, 2.3e24 FLOPs (6ND), 6,144 TPU v5p; float32 state with Adam: 432 GB.
Expected:   the original has 85.6% on HellaSwag, 10-shot (model card); not trained here.
Command:    flaxlm plan gemma3_27b --mesh fsdp=256 --device h200
            python train.py gemma3_27b --mesh fsdp=256
Source:     Gemma Team (2025), section 2 (shape), table 2 (chips); google/gemma-3-27b-pt.
            Rate, batch and warm-up are not published; distillation is left out.
Parameters: 27,009,346,304 (the published 27,432,406,640 without those that see pictures)
"""

from flaxlm.config import DataConfig, OptimizerConfig
from flaxlm.config.families import card, gemma3

config = card(
  model=gemma3(
    depth=62, width=5376, num_heads=32, ffn_width=21504, head_dim=128, scale_dim=168
  ),
  data=DataConfig(corpus="files:corpus", seq_len=32768, batch_size=512),  # your own text
  optimizer=OptimizerConfig(learning_rate=4e-4, warmup_steps=2000),
  num_steps=834_000,
)
