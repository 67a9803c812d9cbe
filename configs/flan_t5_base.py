# SPDX-License-Identifier: Apache-2.0
"""FLAN-T5 base: an encoder-decoder of 248M parameters, tuned on instructions.

What:       12 + 12 blocks, 768 wide, 12 heads of 64; T5 1.1's architecture: T5's with GEGLU
            and with a head of its own.
Cost:       84,000 steps of tuning, after a million of T5's; float32 state with Adafactor:
            2.0 GB.
Expected:   the original answers 35.9% of MMLU (table 5); not trained here.
Command:    flaxlm plan flan_t5_base --mesh data=8 --device h200
            python train.py flan_t5_base --mesh data=8
Source:     Chung et al. (2022), appendix E (training); t5x's t5_1_1/base.gin;
            google/flan-t5-base.
Parameters: 247,577,856
"""

from flaxlm.config.families import FLAN_T5_DATA, FLAN_T5_OPTIMIZER, card, flan_t5

config = card(
  model=flan_t5(depth=12, width=768, num_heads=12, ffn_width=2048),
  data=FLAN_T5_DATA,
  optimizer=FLAN_T5_OPTIMIZER,
  num_steps=84_000,
  remat="none",
)
