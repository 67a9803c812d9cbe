# SPDX-License-Identifier: Apache-2.0
"""PaLM: a decoder of 540B parameters.

What:       118 blocks, 18,432 wide, 48 query heads of 256 dims that share one key/value
            head; attention and SwiGLU side by side behind one LayerNorm; RoPE; no bias
            anywhere.
Cost:       780B tokens, 2.5e24 FLOPs (6ND); float32 state with Adafactor: 4.3 TB.
Expected:   the original answers 69.3% of MMLU, 5-shot; not trained here.
Command:    flaxlm plan palm_540b --mesh fsdp=512 --device h200
            python train.py palm_540b --mesh fsdp=512
Source:     Chowdhery et al. (2022), section 2 and table 1 (shape), section 5 (training).
Parameters: 540,350,000,000 (table 1, rounded to 0.01B)
"""

from flaxlm.config import DataConfig
from flaxlm.config.families import PALM_OPTIMIZER, card, palm

config = card(
  model=palm(depth=118, width=18432, num_heads=48),
  # Your own text. The original's batch grew from 512 rows to these, over 255,000 steps.
  data=DataConfig(corpus="files:corpus", seq_len=2048, batch_size=2048),
  optimizer=PALM_OPTIMIZER,
  num_steps=186_000,
)
