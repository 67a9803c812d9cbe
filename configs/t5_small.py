# SPDX-License-Identifier: Apache-2.0
"""T5 small: an encoder-decoder of 61M parameters.

What:       6 + 6 blocks, 512 wide, 8 heads of 64; bias by relative position, RMSNorm, ReLU,
            no biases in the layers; unscaled attention, a scaled tied head.
Cost:       a million steps, 1T source tokens; float32 state with Adafactor: 0.5 GB.
Expected:   the original, fine-tuned, has 77.4 on GLUE (table 14); not trained here.
Command:    flaxlm plan t5_small --mesh data=8 --device h200
            python train.py t5_small --mesh data=8
Source:     Raffel et al. (2020), sections 2.1 and 3.7; google-t5/t5-small.
Parameters: 60,506,624
"""

from flaxlm.config.families import T5_DATA, T5_OPTIMIZER, card, t5

config = card(
  model=t5(depth=6, width=512, num_heads=8, head_dim=64, ffn_width=2048),
  data=T5_DATA,
  optimizer=T5_OPTIMIZER,
  num_steps=1_000_000,
  remat="none",
)
