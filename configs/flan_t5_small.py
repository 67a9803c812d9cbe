# SPDX-License-Identifier: Apache-2.0
"""FLAN-T5 small: an encoder-decoder of 77M parameters, tuned on instructions.

What:       8 + 8 blocks, 512 wide, 6 heads of 64; T5 1.1's architecture: T5's with GEGLU
            and with a head of its own.
Cost:       98,000 steps of tuning, after a million of T5's; float32 state with Adafactor:
            0.6 GB.
Expected:   the original answers 28.7% of MMLU (table 5); not trained here.
Command:    flaxlm plan flan_t5_small --mesh data=8 --device h200
            python train.py flan_t5_small --mesh data=8
Source:     Chung et al. (2022), appendix E (training); t5x's t5_1_1/small.gin;
            google/flan-t5-small.
Parameters: 76,961,152
"""

from flaxlm.config.families import FLAN_T5_DATA, FLAN_T5_OPTIMIZER, card, flan_t5

config = card(
  model=flan_t5(depth=8, width=512, num_heads=6, ffn_width=1024),
  data=FLAN_T5_DATA,
  optimizer=FLAN_T5_OPTIMIZER,
  num_steps=98_000,
  remat="none",
)
