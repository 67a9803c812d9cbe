# SPDX-License-Identifier: Apache-2.0
"""GPT-2 medium: a decoder of 355M parameters.

What:       24 blocks, 1,024 wide, 16 heads; learned positions, LayerNorm, GELU, biases.
Cost:       300B tokens, 6.4e20 FLOPs (6ND); float32 state with Adam: 5.7 GB.
Expected:   the original has a perplexity of 15.60 on LAMBADA (table 3); not trained here.
Command:    flaxlm plan gpt2_355m --mesh data=8 --device h200
            python train.py gpt2_355m --mesh data=8
Source:     Radford et al. (2019), table 2; openai-community/gpt2-medium. Rate, batch,
            warm-up and tokens are GPT-3 Medium's (Brown et al., 2020, table 2.1): GPT-2's
            were not published.
Parameters: 354,823,168
"""

from flaxlm.config import DataConfig, OptimizerConfig
from flaxlm.config.families import card, gpt2

config = card(
  model=gpt2(depth=24, width=1024, num_heads=16),
  # The pages of C4 that OpenWebText lists: WebText was not published.
  data=DataConfig(corpus="tfds:c4/webtextlike", seq_len=1024, batch_size=512),
  optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=715),
  num_steps=572_200,
  remat="none",
)
