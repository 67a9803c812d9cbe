# SPDX-License-Identifier: Apache-2.0
"""LLaMA 13B: a decoder of 13.0B parameters.

What:       40 blocks, 5,120 wide, 40 heads; RoPE, RMSNorm, SwiGLU, no biases.
Cost:       1T tokens, 7.8e22 FLOPs (6ND), 135,168 A100 hours (table 15); float32 state with
            Adam: 208 GB.
Expected:   the original answers 46.9% of MMLU, 5-shot (table 9); not trained here.
Command:    flaxlm plan llama_13b --mesh fsdp=256 --device h200
            python train.py llama_13b --mesh fsdp=256
Source:     Touvron et al. (2023), table 2 and section 2.3; params.json of the release.
Parameters: 13,015,864,320
"""

from flaxlm.config import DataConfig, OptimizerConfig
from flaxlm.config.families import card, llama

config = card(
  model=llama(depth=40, width=5120, num_heads=40, ffn_width=13824),
  # C4 is 15% of the original's mixture, most of which is not in TFDS.
  data=DataConfig(corpus="tfds:c4/en", seq_len=2048, batch_size=2048),
  optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2000),
  num_steps=238_400,
)
