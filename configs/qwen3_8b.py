# SPDX-License-Identifier: Apache-2.0
"""Qwen3 8B: a decoder of 8.2B parameters.

What:       36 blocks, 4,096 wide, 32 query and 8 key/value heads of 128 dims, normalised;
            RoPE, RMSNorm, SwiGLU, no biases, a head of its own.
Cost:       36T tokens, 1.8e24 FLOPs (6ND); float32 state with Adam: 131 GB.
Expected:   the original base has 76.89% on MMLU, 5-shot (section 3.3); not trained here.
Command:    flaxlm plan qwen3_8b --mesh fsdp=256 --device h200
            python train.py qwen3_8b --mesh fsdp=256
Source:     Yang et al. (2025), table 1; Qwen/Qwen3-8B. Rate, batch and warm-up are not
            published.
Parameters: 8,190,735,360
"""

from flaxlm.config import DataConfig, OptimizerConfig
from flaxlm.config.families import card, qwen3

config = card(
  model=qwen3(depth=36, width=4096, num_heads=32, ffn_width=12288, tied_embeddings=False),
  data=DataConfig(corpus="files:corpus", seq_len=4096, batch_size=4096),  # your own text
  optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2000),
  num_steps=2_146_000,
)
