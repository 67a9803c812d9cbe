# SPDX-License-Identifier: Apache-2.0
"""Qwen3 32B: a decoder of 32.8B parameters.

What:       64 blocks, 5,120 wide, 64 query and 8 key/value heads of 128 dims, normalised;
            RoPE, RMSNorm, SwiGLU, no biases, a head of its own.
Cost:       36T tokens, 7.1e24 FLOPs (6ND); float32 state with Adam: 524 GB.
Expected:   the original base has 83.61% on MMLU, 5-shot (section 3.3); not trained here.
Command:    flaxlm plan qwen3_32b --mesh fsdp=512 --device h200
            python train.py qwen3_32b --mesh fsdp=512
Source:     Yang et al. (2025), table 1; Qwen/Qwen3-32B. Rate, batch and warm-up are not
            published.
Parameters: 32,762,123,264
"""

from flaxlm.config import DataConfig, OptimizerConfig
from flaxlm.config.families import card, qwen3

config = card(
  model=qwen3(depth=64, width=5120, num_heads=64, ffn_width=25600, tied_embeddings=False),
  data=DataConfig(corpus="files:corpus", seq_len=4096, batch_size=4096),  # your own text
  optimizer=OptimizerConfig(learning_rate=1.5e-4, warmup_steps=2000),
  num_steps=2_146_000,
)
