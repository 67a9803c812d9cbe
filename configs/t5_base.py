# SPDX-License-Identifier: Apache-2.0
"""T5 base: an encoder-decoder of 223M parameters.

What:       12 + 12 blocks, 768 wide, 12 heads of 64; bias by relative position, RMSNorm,
            ReLU, no biases in the layers; unscaled attention, a scaled tied head.
Cost:       a million steps, 1T source tokens; float32 state with Adafactor: 1.8 GB.
Expected:   the original, fine-tuned, has 82.7 on GLUE (table 14); not trained here.
Command:    flaxlm plan t5_base --mesh data=8 --device h200
            python train.py t5_base --mesh data=8
Source:     Raffel et al. (2020), sections 2.1 and 3.7; google-t5/t5-base.
Parameters: 222,903,552
"""

from flaxlm.config.families import T5_DATA, T5_OPTIMIZER, card, t5

config = card(
  model=t5(depth=12, width=768, num_heads=12, head_dim=64, ffn_width=3072),
  data=T5_DATA,
  optimizer=T5_OPTIMIZER,
  num_steps=1_000_000,
  remat="none",
)
