# SPDX-License-Identifier: Apache-2.0
"""Llama 3.1 8B: a decoder of 8.0B parameters with a context of 128K.

What:       32 blocks, 4,096 wide, 32 query and 8 key/value heads; RoPE that is stretched by
            8 from 8K, RMSNorm, SwiGLU, no biases.
Cost:       15T tokens, 7.2e23 FLOPs (6ND), 1.46M H100 hours (model card); float32 state
            with Adam: 128 GB.
Expected:   the original answers 66.7% of MMLU, 5-shot (model card); not trained here.
Command:    flaxlm plan llama3_8b --mesh fsdp=256 --device h200
            python train.py llama3_8b --mesh fsdp=256
Source:     Grattafiori et al. (2024), table 3 (shape, rate) and section 3.4.1 (the 405B's
            schedule); meta-llama/Llama-3.1-8B. Its batch is not published.
Parameters: 8,030,261,248
"""

from flaxlm.config import DataConfig, OptimizerConfig
from flaxlm.config.families import card, llama3

config = card(
  model=llama3(depth=32, width=4096, num_heads=32, ffn_width=14336),
  data=DataConfig(corpus="files:corpus", seq_len=8192, batch_size=1024),  # your own text
  optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=8000, final_fraction=0.01),
  num_steps=1_788_000,
)
