# SPDX-License-Identifier: Apache-2.0
"""Qwen3 4B: a decoder of 4.0B parameters.

What:       36 blocks, 2,560 wide, 32 query and 8 key/value heads of 128 dims, normalised;
            RoPE, RMSNorm, SwiGLU, no biases, a tied head.
Cost:       36T tokens, 8.7e23 FLOPs (6ND); float32 state with Adam: 64 GB.
Expected:   the original base has 72.99% on MMLU, 5-shot (section 3.3); not trained here.
Command:    flaxlm plan qwen3_4b --mesh fsdp=256 --device h200
            python train.py qwen3_4b --mesh fsdp=256
Source:     Yang et al. (2025), table 1; Qwen/Qwen3-4B. Rate, batch and warm-up are not
            published.
Parameters: 4,022,468,096
"""

from flaxlm.config import DataConfig, OptimizerConfig
from flaxlm.config.families import card, qwen3

config = card(
  model=qwen3(depth=36, width=2560, num_heads=32, ffn_width=9728, tied_embeddings=True),
  data=DataConfig(corpus="files:corpus", seq_len=4096, batch_size=4096),  # your own text
  optimizer=OptimizerConfig(learning_rate=4e-4, warmup_steps=2000),
  num_steps=2_146_000,
)
