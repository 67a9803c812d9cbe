# SPDX-License-Identifier: Apache-2.0
"""BLOOM: a multilingual decoder of 176B parameters.

What:       70 blocks, 14,336 wide, 112 heads; ALiBi, LayerNorm, also after the embedding,
            GELU, biases.
Cost:       366B tokens, 3.9e23 FLOPs (6ND), 1.08M A100 hours (Luccioni et al., 2022);
            float32 state with Adam: 2.8 TB.
Expected:   the original ends at a training loss of 1.939 (model card); not trained here.
Command:    flaxlm plan bloom_176b --mesh fsdp=512 --device h200
            python train.py bloom_176b --mesh fsdp=512
Source:     Le Scao et al. (2022), table 3; bigscience/bloom.
Parameters: 176,247,271,424
"""

from flaxlm.config import DataConfig, OptimizerConfig
from flaxlm.config.families import bloom, card

config = card(
  model=bloom(depth=70, width=14336, num_heads=112),
  # Its corpus, ROOTS, is not in TFDS: put text into a folder `corpus`.
  data=DataConfig(corpus="files:corpus", seq_len=2048, batch_size=2048),
  optimizer=OptimizerConfig(learning_rate=6e-5, warmup_steps=89),
  num_steps=87_300,
)
