# SPDX-License-Identifier: Apache-2.0
"""BLOOM: a multilingual decoder of 176B parameters.

What:       70 blocks, 14,336 wide, 112 heads; ALiBi, LayerNorm, also after the embedding,
            GELU, biases.
Cost:       366B tokens, 3.9e23 FLOPs (6 a parameter and token); 1.08M A100 hours (Luccioni
            et al., 2022). State in float32: 2.8 TB (weights, gradients, Adam's moments).
Expected:   the original ends at a training loss of 1.939 (model card); the shape is what is
            tested here.
Command:    flaxlm plan bloom_176b --mesh fsdp=512 --device h200
            python train.py bloom_176b --mesh fsdp=512
Source:     Le Scao et al. (2022), table 3; bigscience/bloom.
Parameters: 176,247,271,424
"""

from flaxlm.config import (
  Config,
  DataConfig,
  ModelConfig,
  OptimizerConfig,
  TokenizerConfig,
  TrainingConfig,
)

config = Config(
  model=ModelConfig(
    depth=70,
    width=14336,
    num_heads=112,
    ffn_width=57344,
    vocab_size=250880,
    context=2048,
    positions="alibi",
    norm="layernorm",
    norm_epsilon=1e-5,
    embedding_norm=True,
    activation="gelu_tanh",
    gated=False,
    biased=True,
    tied_embeddings=True,
  ),
  tokenizer=TokenizerConfig(vocab_size=250880),
  # Its corpus, ROOTS, is not in TFDS: put text into a folder `corpus`.
  data=DataConfig(corpus="files:corpus", seq_len=2048, batch_size=2048),
  optimizer=OptimizerConfig(learning_rate=6e-5, warmup_steps=89),
  training=TrainingConfig(
    num_steps=87_300,
    eval_every_steps=1000,
    eval_batches=20,
    dtype="bfloat16",
    remat="full",
    scanned=True,
  ),
)
