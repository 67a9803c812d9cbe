# SPDX-License-Identifier: Apache-2.0
"""GPT-3: a decoder of 175B parameters.

What:       96 blocks, 12,288 wide, 96 heads; GPT-2's architecture. Attention is dense in
            every block: every second one of the original is banded, by a width that is not
            published.
Cost:       300B tokens, 3.1e23 FLOPs (6ND); float32 state with Adam: 2.8 TB.
Expected:   the original completes 76.2% of LAMBADA, zero-shot (table 3.2); not trained
            here.
Command:    flaxlm plan gpt3_175b --mesh fsdp=512 --device h200
            python train.py gpt3_175b --mesh fsdp=512
Source:     Brown et al. (2020), table 2.1 (shape, rate, batch), appendix B (the rest).
Parameters: 174,600,000,000 (table D.1, rounded to 0.1B)
"""

from flaxlm.config import DataConfig, OptimizerConfig
from flaxlm.config.families import card, gpt2

config = card(
  model=gpt2(depth=96, width=12288, num_heads=96, context=2048),
  # The original's Common Crawl, filtered otherwise, was not published.
  data=DataConfig(corpus="tfds:c4/en", seq_len=2048, batch_size=1536),
  optimizer=OptimizerConfig(learning_rate=6e-5, warmup_steps=119),
  num_steps=95_400,
)
