# SPDX-License-Identifier: Apache-2.0
"""Qwen3 14B: a decoder of 14.8B parameters.

What:       40 blocks, 5,120 wide, 40 query and 8 key/value heads of 128 dims, normalised;
            RoPE, RMSNorm, SwiGLU, no biases, a head of its own.
Cost:       36T tokens, 3.2e24 FLOPs (6ND); float32 state with Adam: 236 GB.
Expected:   the original base has 81.05% on MMLU, 5-shot (section 3.3); not trained here.
Command:    flaxlm plan qwen3_14b --mesh fsdp=256 --device h200
            python train.py qwen3_14b --mesh fsdp=256
Source:     Yang et al. (2025), table 1; Qwen/Qwen3-14B. Rate, batch and warm-up are not
            published.
Parameters: 14,768,307,200
"""

from flaxlm.config import DataConfig, OptimizerConfig
from flaxlm.config.families import card, qwen3

config = card(
  model=qwen3(depth=40, width=5120, num_heads=40, ffn_width=17408, tied_embeddings=False),
  data=DataConfig(corpus="files:corpus", seq_len=4096, batch_size=4096),  # your own text
  optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=2000),
  num_steps=2_146_000,
)
