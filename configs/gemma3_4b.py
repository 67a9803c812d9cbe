# SPDX-License-Identifier: Apache-2.0
"""Gemma 3 4B (text only): a decoder of 3.9B parameters, five blocks local, one global.

What:       34 blocks, 2,560 wide, 8 query and 4 key/value heads of 256 dims, normalised;
            local blocks see 1,024 tokens; norms around each branch, GEGLU.
Cost:       4T tokens, 9.3e22 FLOPs (6ND), 2,048 TPU v5e; float32 state with Adam: 62 GB.
Expected:   the original has 77.2% on HellaSwag, 10-shot (model card); not trained here.
Command:    flaxlm plan gemma3_4b --mesh fsdp=64 --device h200
            python train.py gemma3_4b --mesh fsdp=64
Source:     Gemma Team (2025), section 2 (shape), table 2 (chips); google/gemma-3-4b-pt.
            Rate, batch and warm-up are not published; distillation is left out.
Parameters: 3,880,263,168 (the published 4,300,079,472 without those that see pictures)
"""

from flaxlm.config import DataConfig, OptimizerConfig
from flaxlm.config.families import card, gemma3

config = card(
  model=gemma3(depth=34, width=2560, num_heads=8, ffn_width=10240),
  data=DataConfig(corpus="files:corpus", seq_len=32768, batch_size=256),  # your own text
  optimizer=OptimizerConfig(learning_rate=8e-4, warmup_steps=2000),
  num_steps=477_000,
)
