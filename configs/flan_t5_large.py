# SPDX-License-Identifier: Apache-2.0
"""FLAN-T5 large: an encoder-decoder of 783M parameters, tuned on instructions.

What:       24 + 24 blocks, 1,024 wide, 16 heads of 64; T5 1.1's architecture: T5's with
            GEGLU and with a head of its own.
Cost:       64,000 steps of tuning, after a million of T5's; float32 state with Adafactor:
            6.3 GB.
Expected:   the original answers 45.1% of MMLU (table 5); not trained here.
Command:    flaxlm plan flan_t5_large --mesh data=8 --device h200
            python train.py flan_t5_large --mesh data=8
Source:     Chung et al. (2022), appendix E (training); t5x's t5_1_1/large.gin;
            google/flan-t5-large.
Parameters: 783,150,080
"""

from flaxlm.config.families import FLAN_T5_DATA, FLAN_T5_OPTIMIZER, card, flan_t5

config = card(
  model=flan_t5(depth=24, width=1024, num_heads=16, ffn_width=2816),
  data=FLAN_T5_DATA,
  optimizer=FLAN_T5_OPTIMIZER,
  num_steps=64_000,
  remat="none",
)
