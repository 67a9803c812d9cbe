# SPDX-License-Identifier: Apache-2.0
"""PaLM: a decoder of 540B parameters.

What:       118 blocks, 18,432 wide, 48 query heads of 256 dims that share one key/value
            head; attention and SwiGLU side by side behind one LayerNorm; RoPE; no bias
            anywhere.
Cost:       780B tokens, 2.5e24 FLOPs (6 a parameter and token). State in float32: 4.3 TB
            (weights and gradients; Adafactor's moments are small).
Expected:   the original answers 69.3% of MMLU, 5-shot; the shape is what is tested here.
Command:    flaxlm plan palm_540b --mesh fsdp=512 --device h200
            python train.py palm_540b --mesh fsdp=512
Source:     Chowdhery et al. (2022), section 2 and table 1 (shape), section 5 (training).
Parameters: 540,350,000,000 (table 1, rounded to 0.01B)
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
    depth=118,
    width=18432,
    num_heads=48,
    num_kv_heads=1,
    head_dim=256,
    ffn_width=73728,
    vocab_size=256000,
    context=2048,
    norm="layernorm",
    norm_biased=False,
    parallel="one_norm",
    tied_embeddings=True,
    logit_scale=18432**-0.5,
  ),
  tokenizer=TokenizerConfig(vocab_size=256000),
  # The original's text is not public: put your own into a folder `corpus`. Its batch
  # grows from 512 rows to these, over 255,000 steps.
  data=DataConfig(corpus="files:corpus", seq_len=2048, batch_size=2048),
  # The original decays by the rate squared: 2.1e-5 a step on average, as here.
  optimizer=OptimizerConfig(
    kind="adafactor",
    learning_rate=1e-2,
    schedule="inverse_sqrt",
    warmup_steps=10_000,
    weight_decay=2.1e-3,
  ),
  training=TrainingConfig(
    num_steps=186_000,
    eval_every_steps=1000,
    eval_batches=20,
    dtype="bfloat16",
    remat="full",
    scanned=True,
  ),
)
