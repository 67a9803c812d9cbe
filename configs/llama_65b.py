# SPDX-License-Identifier: Apache-2.0
"""LLaMA 65B: a decoder of 65.3B parameters.

What:       80 blocks, 8,192 wide, 64 heads; RoPE, RMSNorm, SwiGLU, no biases.
Cost:       1.4T tokens, 5.5e23 FLOPs (6ND), 1,022,362 A100 hours (table 15); float32 state
            with Adam: 1.0 TB.
Expected:   the original answers 63.4% of MMLU, 5-shot (table 9); not trained here.
Command:    flaxlm plan llama_65b --mesh fsdp=512 --device h200
            python train.py llama_65b --mesh fsdp=512
Source:     Touvron et al. (2023), table 2 and section 2.3; params.json of the release.
Parameters: 65,285,660,672
"""

from flaxlm.config import DataConfig, OptimizerConfig
from flaxlm.config.families import card, llama

config = card(
  model=llama(depth=80, width=8192, num_heads=64, ffn_width=22016, norm_epsilon=1e-5),
  # C4 is 15% of the original's mixture, most of which is not in TFDS.
  data=DataConfig(corpus="tfds:c4/en", seq_len=2048, batch_size=2048),
  optimizer=OptimizerConfig(learning_rate=1.5e-4, warmup_steps=2000),
  num_steps=333_800,
)
