# SPDX-License-Identifier: Apache-2.0
"""T5 large: an encoder-decoder of 738M parameters.

What:       24 + 24 blocks, 1,024 wide, 16 heads of 64; bias by relative position, RMSNorm,
            ReLU, no biases in the layers; unscaled attention, a scaled tied head.
Cost:       a million steps, 1T source tokens; float32 state with Adafactor: 5.9 GB.
Expected:   the original, fine-tuned, has 86.4 on GLUE (table 14); not trained here.
Command:    flaxlm plan t5_large --mesh fsdp=64 --device h200
            python train.py t5_large --mesh fsdp=64
Source:     Raffel et al. (2020), sections 2.1 and 3.7; google-t5/t5-large.
Parameters: 737,668,096
"""

from flaxlm.config.families import T5_DATA, T5_OPTIMIZER, card, t5

config = card(
  model=t5(depth=24, width=1024, num_heads=16, head_dim=64, ffn_width=4096),
  data=T5_DATA,
  optimizer=T5_OPTIMIZER,
  num_steps=1_000_000,
  remat="none",
)
