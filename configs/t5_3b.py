# SPDX-License-Identifier: Apache-2.0
"""T5 3B: an encoder-decoder of 2.9B parameters.

What:       24 + 24 blocks, 1,024 wide, 32 heads of 128; bias by relative position, RMSNorm,
            ReLU, no biases in the layers; unscaled attention, a scaled tied head.
Cost:       a million steps, 1T source tokens; float32 state with Adafactor: 23 GB.
Expected:   the original, fine-tuned, has 88.5 on GLUE (table 14); not trained here.
Command:    flaxlm plan t5_3b --mesh fsdp=64 --device h200
            python train.py t5_3b --mesh fsdp=64
Source:     Raffel et al. (2020), sections 2.1 and 3.7; google-t5/t5-3b.
Parameters: 2,851,598,336
"""

from flaxlm.config.families import T5_DATA, T5_OPTIMIZER, card, t5

config = card(
  model=t5(depth=24, width=1024, num_heads=32, head_dim=128, ffn_width=16384),
  data=T5_DATA,
  optimizer=T5_OPTIMIZER,
  num_steps=1_000_000,
)
