# SPDX-License-Identifier: Apache-2.0
"""Llama 3.1 405B: a decoder of 405.9B parameters with a context of 128K.

What:       126 blocks, 16,384 wide, 128 query and 8 key/value heads; RoPE that is stretched
            by 8 from 8K, RMSNorm, SwiGLU, no biases.
Cost:       15.6T tokens, 3.8e25 FLOPs (6ND), 30.84M H100 hours (model card); float32 state
            with Adam: 6.5 TB.
Expected:   the original answers 85.2% of MMLU, 5-shot (model card); not trained here.
Command:    flaxlm plan llama3_405b --mesh fsdp=512,tensor=8 --device h200
            python train.py llama3_405b --mesh fsdp=512,tensor=8
Source:     Grattafiori et al. (2024), table 3 (shape, rate) and section 3.4.1 (the 405B's
            schedule); meta-llama/Llama-3.1-405B.
Parameters: 405,853,388,800
"""

from flaxlm.config import DataConfig, OptimizerConfig
from flaxlm.config.families import card, llama3

config = card(
  model=llama3(depth=126, width=16384, num_heads=128, ffn_width=53248),
  data=DataConfig(corpus="files:corpus", seq_len=8192, batch_size=2048),  # your own text
  optimizer=OptimizerConfig(learning_rate=8e-5, warmup_steps=8000, final_fraction=0.01),
  num_steps=930_000,
)
