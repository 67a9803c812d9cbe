# SPDX-License-Identifier: Apache-2.0
"""Gemma 3 1B: a decoder of 1.0B parameters, five blocks local, one global.

What:       26 blocks, 1,152 wide, 4 query and 1 key/value head of 256 dims, normalised;
            local blocks see 512 tokens; norms around each branch, GEGLU.
Cost:       2T tokens, 1.2e22 FLOPs (6ND), 512 TPU v5e; float32 state with Adam: 16 GB.
Expected:   the original has 62.3% on HellaSwag, 10-shot (model card); not trained here.
Command:    flaxlm plan gemma3_1b --mesh fsdp=64 --device h200
            python train.py gemma3_1b --mesh fsdp=64
Source:     Gemma Team (2025), section 2 (shape), table 2 (chips); google/gemma-3-1b-pt.
            Rate, batch and warm-up are not published; distillation is left out.
Parameters: 999,885,952
"""

from flaxlm.config import DataConfig, OptimizerConfig
from flaxlm.config.families import card, gemma3_text

config = card(
  model=gemma3_text(depth=26, width=1152, num_heads=4, num_kv_heads=1, ffn_width=6912),
  data=DataConfig(corpus="files:corpus", seq_len=32768, batch_size=128),  # your own text
  optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=2000),
  num_steps=477_000,
)
