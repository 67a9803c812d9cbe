# SPDX-License-Identifier: Apache-2.0
"""Gemma 2 2B: a decoder of 2.6B parameters, local and global in turn.

What:       26 blocks, 2,304 wide, 8 query and 4 key/value heads of 256; every second sees
            4,096 tokens; norms around each branch, GEGLU, capped scores and logits.
Cost:       2T tokens, 3.1e22 FLOPs (6ND), 512 TPU v5e; float32 state with Adam: 42 GB.
Expected:   the original answers 51.3% of MMLU, 5-shot (model card); not trained here.
Command:    flaxlm plan gemma2_2b --mesh fsdp=64 --device h200
            python train.py gemma2_2b --mesh fsdp=64
Source:     Gemma Team (2024), tables 1 (shape) and 3 (chips); google/gemma-2-2b. Rate,
            batch and warm-up are not published; distillation is left out.
Parameters: 2,614,341,888
"""

from flaxlm.config import DataConfig, OptimizerConfig
from flaxlm.config.families import card, gemma2

config = card(
  model=gemma2(depth=26, width=2304, num_heads=8, ffn_width=9216),
  data=DataConfig(corpus="files:corpus", seq_len=8192, batch_size=512),  # your own text
  optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=2000),
  num_steps=477_000,
)
