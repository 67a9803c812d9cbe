# SPDX-License-Identifier: Apache-2.0
"""LLaMA 7B: a decoder of 6.7B parameters.

What:       32 blocks, 4,096 wide, 32 heads; RoPE, RMSNorm, SwiGLU, no biases.
Cost:       1T tokens, 4.0e22 FLOPs (6ND), 82,432 A100 hours (table 15); float32 state with
            Adam: 108 GB.
Expected:   the original answers 35.1% of MMLU, 5-shot (table 9); not trained here.
Command:    flaxlm plan llama_7b --mesh fsdp=256 --device h200
            python train.py llama_7b --mesh fsdp=256
Source:     Touvron et al. (2023), table 2 and section 2.3; params.json of the release.
Parameters: 6,738,415,616
"""

from flaxlm.config import DataConfig, OptimizerConfig
from flaxlm.config.families import card, llama

config = card(
  model=llama(depth=32, width=4096, num_heads=32, ffn_width=11008),
  # C4 is 15% of the original's mixture, most of which is not in TFDS.
  data=DataConfig(corpus="tfds:c4/en", seq_len=2048, batch_size=2048),
  optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2000),
  num_steps=238_400,
)
