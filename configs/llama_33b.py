# SPDX-License-Identifier: Apache-2.0
"""LLaMA 33B: a decoder of 32.5B parameters.

What:       60 blocks, 6,656 wide, 52 heads; RoPE, RMSNorm, SwiGLU, no biases.
Cost:       1.4T tokens, 2.7e23 FLOPs (6ND), 530,432 A100 hours (table 15); float32 state
            with Adam: 520 GB.
Expected:   the original answers 57.8% of MMLU, 5-shot (table 9); not trained here.
Command:    flaxlm plan llama_33b --mesh fsdp=256 --device h200
            python train.py llama_33b --mesh fsdp=256
Source:     Touvron et al. (2023), table 2 and section 2.3; params.json of the release.
Parameters: 32,528,943,616
"""

from flaxlm.config import DataConfig, OptimizerConfig
from flaxlm.config.families import card, llama

config = card(
  model=llama(depth=60, width=6656, num_heads=52, ffn_width=17920),
  # C4 is 15% of the original's mixture, most of which is not in TFDS.
  data=DataConfig(corpus="tfds:c4/en", seq_len=2048, batch_size=2048),
  optimizer=OptimizerConfig(learning_rate=1.5e-4, warmup_steps=2000),
  num_steps=333_800,
)
