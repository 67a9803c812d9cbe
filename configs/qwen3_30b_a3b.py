# SPDX-License-Identifier: Apache-2.0
"""Qwen3 30B-A3B: a decoder of 30.5B parameters, of which a token uses 3.3B.

What:       48 blocks, 2,048 wide, 32 query and 4 key/value heads of 128 dims, normalised;
            128 experts in each block, 8 of them for each token; RoPE, RMSNorm, SwiGLU, no
            biases.
Cost:       36T tokens, 7.2e23 FLOPs (6ND); float32 state with Adam: 489 GB.
Expected:   the original base has 81.38% on MMLU, 5-shot (section 3.3); not trained here.
Command:    flaxlm plan qwen3_30b_a3b --mesh fsdp=32,expert=8 --device h200
            python train.py qwen3_30b_a3b --mesh fsdp=32,expert=8
Source:     Yang et al. (2025), table 2; Qwen/Qwen3-30B-A3B. Rate, batch and warm-up are not
            published.
Parameters: 30,532,122,624 (3,353,032,704 for each token)
"""

from flaxlm.config import DataConfig, OptimizerConfig
from flaxlm.config.families import card, qwen3_moe

config = card(
  model=qwen3_moe(depth=48, width=2048, num_heads=32, expert_width=768),
  data=DataConfig(corpus="files:corpus", seq_len=4096, batch_size=4096),  # your own text
  optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2000),
  num_steps=2_146_000,
)
