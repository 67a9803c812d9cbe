# SPDX-License-Identifier: Apache-2.0
"""Qwen3 1.7B: a decoder of 1.7B parameters.

What:       28 blocks, 2,048 wide, 16 query and 8 key/value heads of 128 dims, normalised;
            RoPE, RMSNorm, SwiGLU, no biases, a tied head.
Cost:       36T tokens, 3.7e23 FLOPs (6ND); float32 state with Adam: 28 GB.
Expected:   the original base has 62.63% on MMLU, 5-shot (section 3.3); not trained here.
Command:    flaxlm plan qwen3_1_7b --mesh fsdp=64 --device h200
            python train.py qwen3_1_7b --mesh fsdp=64
Source:     Yang et al. (2025), table 1; Qwen/Qwen3-1.7B. Rate, batch and warm-up are not
            published.
Parameters: 1,720,574,976
"""

from flaxlm.config import DataConfig, OptimizerConfig
from flaxlm.config.families import card, qwen3

config = card(
  model=qwen3(depth=28, width=2048, num_heads=16, ffn_width=6144, tied_embeddings=True),
  data=DataConfig(corpus="files:corpus", seq_len=4096, batch_size=4096),  # your own text
  optimizer=OptimizerConfig(learning_rate=6e-4, warmup_steps=2000),
  num_steps=2_146_000,
)
