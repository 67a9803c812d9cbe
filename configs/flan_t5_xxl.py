# SPDX-License-Identifier: Apache-2.0
"""FLAN-T5 XXL: an encoder-decoder of 11.1B parameters, tuned on instructions.

What:       24 + 24 blocks, 4,096 wide, 64 heads of 64; T5 1.1's architecture: T5's with
            GEGLU and with a head of its own.
Cost:       14,000 steps of tuning, after a million of T5's; float32 state with Adafactor:
            89 GB.
Expected:   the original answers 55.1% of MMLU (table 5); not trained here.
Command:    flaxlm plan flan_t5_xxl --mesh fsdp=64 --device h200
            python train.py flan_t5_xxl --mesh fsdp=64
Source:     Chung et al. (2022), appendix E (training); t5x's t5_1_1/xxl.gin;
            google/flan-t5-xxl.
Parameters: 11,135,332,352
"""

from flaxlm.config.families import FLAN_T5_DATA, FLAN_T5_OPTIMIZER, card, flan_t5

config = card(
  model=flan_t5(depth=24, width=4096, num_heads=64, ffn_width=10240),
  data=FLAN_T5_DATA,
  optimizer=FLAN_T5_OPTIMIZER,
  num_steps=14_000,
)
