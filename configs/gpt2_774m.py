# SPDX-License-Identifier: Apache-2.0
"""GPT-2 large: a decoder of 774M parameters.

What:       36 blocks, 1,280 wide, 20 heads; learned positions, LayerNorm, GELU, biases.
Cost:       300B tokens, 1.4e21 FLOPs (6ND); float32 state with Adam: 12 GB.
Expected:   the original has a perplexity of 10.87 on LAMBADA (table 3); not trained here.
Command:    flaxlm plan gpt2_774m --mesh fsdp=8 --device h200
            python train.py gpt2_774m --mesh fsdp=8
Source:     Radford et al. (2019), table 2; openai-community/gpt2-large. Rate, batch,
            warm-up and tokens are GPT-3 Large's (Brown et al., 2020, table 2.1): GPT-2's
            were not published.
Parameters: 774,030,080
"""

from flaxlm.config import DataConfig, OptimizerConfig
from flaxlm.config.families import card, gpt2

config = card(
  model=gpt2(depth=36, width=1280, num_heads=20),
  # The pages of C4 that OpenWebText lists: WebText was not published.
  data=DataConfig(corpus="tfds:c4/webtextlike", seq_len=1024, batch_size=512),
  optimizer=OptimizerConfig(learning_rate=2.5e-4, warmup_steps=715),
  num_steps=572_200,
  remat="none",
)
