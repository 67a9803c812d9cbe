# SPDX-License-Identifier: Apache-2.0
"""Mistral 7B v0.1: a decoder of 7.2B parameters with a sliding window.

What:       32 blocks, 4,096 wide, 32 query and 8 key/value heads; every block sees 4,096
            tokens back; RoPE, RMSNorm, SwiGLU, no biases.
Cost:       not published; 1T tokens, 4.3e22 FLOPs (6ND); float32 state with Adam: 116 GB.
Expected:   the original answers 60.1% of MMLU (table 2); not trained here.
Command:    flaxlm plan mistral_7b --mesh fsdp=256 --device h200
            python train.py mistral_7b --mesh fsdp=256
Source:     Jiang et al. (2023), table 1; mistralai/Mistral-7B-v0.1. Its training is not
            published: these are LLaMA 7B's values.
Parameters: 7,241,732,096
"""

from flaxlm.config import DataConfig, OptimizerConfig
from flaxlm.config.families import card, mistral

config = card(
  model=mistral(depth=32, width=4096, num_heads=32, ffn_width=14336),
  data=DataConfig(corpus="files:corpus", seq_len=8192, batch_size=512),  # your own text
  optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2000),
  num_steps=238_400,
)
