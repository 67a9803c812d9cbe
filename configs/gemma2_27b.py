# SPDX-License-Identifier: Apache-2.0
"""Gemma 2 27B: a decoder of 27.2B parameters, local and global in turn.

What:       46 blocks, 4,608 wide, 32 query and 16 key/value heads of 128; every second
            block sees 4,096 tokens; norms before and after each branch, GEGLU, capped
            scores and logits.
Cost:       13T tokens, 2.1e24 FLOPs (6 a parameter and token); 6,144 TPU v5p chips in the
            report (table 3). State in float32: 436 GB (weights, gradients, Adam's moments).
Expected:   the original answers 75.2% of MMLU, 5-shot (model card); the shape is what is
            tested here.
Command:    flaxlm plan gemma2_27b --mesh fsdp=256 --device h200
            python train.py gemma2_27b --mesh fsdp=256
Source:     Gemma Team (2024), table 1 (shape); google/gemma-2-27b. Rate, batch and warm-up
            are not published.
Parameters: 27,227,128,320
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
    depth=46,
    width=4608,
    num_heads=32,
    num_kv_heads=16,
    head_dim=128,
    ffn_width=36864,
    vocab_size=256000,
    context=8192,
    norm_placement="both",
    embedding_scaled=True,
    window=4096,
    layer_pattern="LG",
    attention_scale=144**-0.5,
    attention_softcap=50.0,
    activation="gelu_tanh",
    tied_embeddings=True,
    logit_softcap=30.0,
  ),
  tokenizer=TokenizerConfig(vocab_size=256000),
  # The original's text is not public: put your own into a folder `corpus`.
  data=DataConfig(corpus="files:corpus", seq_len=8192, batch_size=2048),
  optimizer=OptimizerConfig(learning_rate=4e-4, warmup_steps=2000),
  training=TrainingConfig(
    num_steps=775_000,
    eval_every_steps=1000,
    eval_batches=20,
    dtype="bfloat16",
    remat="full",
    scanned=True,
  ),
)
