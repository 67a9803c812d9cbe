# SPDX-License-Identifier: Apache-2.0
"""GPT-2 small: a decoder of 124M parameters.

What:       12 blocks, 768 wide, 12 heads; learned positions, LayerNorm, GELU, biases.
Cost:       300B tokens, 2.2e20 FLOPs (6ND); float32 state with Adam: 2.0 GB.
Expected:   the original has a perplexity of 35.13 on LAMBADA (table 3); not trained here.
Command:    flaxlm plan gpt2_124m --mesh data=8 --device h200
            python train.py gpt2_124m --mesh data=8
Source:     Radford et al. (2019), table 2; openai-community/gpt2. Rate, batch, warm-up and
            tokens are GPT-3 Small's (Brown et al., 2020, table 2.1): GPT-2's were not
            published.
Parameters: 124,439,808
"""

from flaxlm.config import DataConfig, OptimizerConfig
from flaxlm.config.families import card, gpt2

config = card(
  model=gpt2(depth=12, width=768, num_heads=12),
  # The pages of C4 that OpenWebText lists: WebText was not published.
  data=DataConfig(corpus="tfds:c4/webtextlike", seq_len=1024, batch_size=512),
  optimizer=OptimizerConfig(learning_rate=6e-4, warmup_steps=715),
  num_steps=572_200,
  remat="none",
)
