# SPDX-License-Identifier: Apache-2.0
"""FLAN-T5 XL: an encoder-decoder of 2.8B parameters, tuned on instructions.

What:       24 + 24 blocks, 2,048 wide, 32 heads of 64; T5 1.1's architecture: T5's with
            GEGLU and with a head of its own.
Cost:       38,000 steps of tuning, after a million of T5's; float32 state with Adafactor:
            23 GB.
Expected:   the original answers 52.4% of MMLU (table 5); not trained here.
Command:    flaxlm plan flan_t5_xl --mesh fsdp=64 --device h200
            python train.py flan_t5_xl --mesh fsdp=64
Source:     Chung et al. (2022), appendix E (training); t5x's t5_1_1/xl.gin;
            google/flan-t5-xl.
Parameters: 2,849,757,184
"""

from flaxlm.config.families import FLAN_T5_DATA, FLAN_T5_OPTIMIZER, card, flan_t5

config = card(
  model=flan_t5(depth=24, width=2048, num_heads=32, ffn_width=5120),
  data=FLAN_T5_DATA,
  optimizer=FLAN_T5_OPTIMIZER,
  num_steps=38_000,
)
