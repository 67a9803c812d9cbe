# SPDX-License-Identifier: Apache-2.0
"""GPT-2 XL: a decoder of 1,558M parameters.

What:       48 blocks, 1,600 wide, 25 heads; learned positions, LayerNorm, GELU, biases.
Cost:       300B tokens, 2.8e21 FLOPs (6ND); float32 state with Adam: 25 GB.
Expected:   the original has a perplexity of 8.63 on LAMBADA (table 3); not trained here.
Command:    flaxlm plan gpt2_1558m --mesh fsdp=8 --device h200
            python train.py gpt2_1558m --mesh fsdp=8
Source:     Radford et al. (2019), table 2; openai-community/gpt2-xl. Rate, batch, warm-up
            and tokens are GPT-3 XL's (Brown et al., 2020, table 2.1): GPT-2's were not
            published.
Parameters: 1,557,611,200
"""

from flaxlm.config import DataConfig, OptimizerConfig
from flaxlm.config.families import card, gpt2

config = card(
  model=gpt2(depth=48, width=1600, num_heads=25),
  # The pages of C4 that OpenWebText lists: WebText was not published.
  data=DataConfig(corpus="tfds:c4/webtextlike", seq_len=1024, batch_size=1024),
  optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=358),
  num_steps=286_100,
)
