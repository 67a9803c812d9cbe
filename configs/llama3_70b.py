# SPDX-License-Identifier: Apache-2.0
"""Llama 3.1 70B: a decoder of 70.6B parameters with a context of 128K.

What:       80 blocks, 8,192 wide, 64 query and 8 key/value heads; RoPE that is stretched by
            8 from 8K, RMSNorm, SwiGLU, no biases.
Cost:       15T tokens, 6.3e24 FLOPs (6ND), 7.0M H100 hours (model card); float32 state with
            Adam: 1.1 TB.
Expected:   the original answers 79.3% of MMLU, 5-shot (model card); not trained here.
Command:    flaxlm plan llama3_70b --mesh fsdp=512 --device h200
            python train.py llama3_70b --mesh fsdp=512
Source:     Grattafiori et al. (2024), table 3 (shape, rate) and section 3.4.1 (the 405B's
            schedule); meta-llama/Llama-3.1-70B. Its batch is not published.
Parameters: 70,553,706,496
"""

from flaxlm.config import DataConfig, OptimizerConfig
from flaxlm.config.families import card, llama3

config = card(
  model=llama3(depth=80, width=8192, num_heads=64, ffn_width=28672),
  data=DataConfig(corpus="files:corpus", seq_len=8192, batch_size=1024),  # your own text
  optimizer=OptimizerConfig(learning_rate=1.5e-4, warmup_steps=8000, final_fraction=0.01),
  num_steps=1_788_000,
)
