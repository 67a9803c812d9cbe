# SPDX-License-Identifier: Apache-2.0
"""Gemma 3 12B (text only): a decoder of 11.8B parameters, five blocks local, one global.

What:       48 blocks, 3,840 wide, 16 query and 8 key/value heads of 256 dims, normalised;
            local blocks see 1,024 tokens; norms around each branch, GEGLU.
Cost:       12T tokens, 8.5e23 FLOPs (6ND), 6,144 TPU v4; float32 state with Adam: 188 GB.
Expected:   the original has 84.2% on HellaSwag, 10-shot (model card); not trained here.
Command:    flaxlm plan gemma3_12b --mesh fsdp=256 --device h200
            python train.py gemma3_12b --mesh fsdp=256
Source:     Gemma Team (2025), section 2 (shape), table 2 (chips); google/gemma-3-12b-pt.
            Rate, batch and warm-up are not published; distillation is left out.
Parameters: 11,766,034,176 (the published 12,187,325,040 without those that see pictures)
"""

from flaxlm.config import DataConfig, OptimizerConfig
from flaxlm.config.families import card, gemma3

config = card(
  model=gemma3(depth=48, width=3840, num_heads=16, ffn_width=15360),
  data=DataConfig(corpus="files:corpus", seq_len=32768, batch_size=512),  # your own text
  optimizer=OptimizerConfig(learning_rate=6e-4, warmup_steps=2000),
  num_steps=715_000,
)
