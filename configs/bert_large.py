# SPDX-License-Identifier: Apache-2.0
"""BERT large: a bidirectional encoder of 335M parameters.

What:       24 blocks, 1,024 wide, 16 heads; learned positions and segments, LayerNorm after
            each branch, GELU, biases; a pooler and a head for the masked words.
Cost:       131B tokens, 2.6e20 FLOPs (6 a parameter and token); 4 days on 64 TPU chips in
            the paper (appendix A.2). State in float32: 5.4 GB (weights, gradients, Adam's
            moments).
Expected:   the original, fine-tuned, has 82.1 on GLUE (table 1); the shape is what is
            tested here.
Command:    flaxlm plan bert_large --mesh data=8 --device h200
            python train.py bert_large --mesh data=8
Source:     Devlin et al. (2019), section 3 (shape) and appendix A.2 (training);
            google-bert/bert-large-uncased.
Parameters: 336,224,058: 335,141,888 of transformers' BertModel and the head.
            BertForPreTraining has 336,226,108, with 2,050 for the next sentence, which is
            not predicted here.
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
    family="encoder",
    depth=24,
    width=1024,
    num_heads=16,
    ffn_width=4096,
    vocab_size=30522,
    context=512,
    positions="learned",
    norm="layernorm",
    norm_placement="post",
    norm_epsilon=1e-12,
    embedding_norm=True,
    dropout=0.1,
    activation="gelu",
    gated=False,
    biased=True,
    tied_embeddings=True,
    head_biased=True,
    head_transform=True,
    num_token_types=2,
    pooler=True,
  ),
  tokenizer=TokenizerConfig(vocab_size=30522),
  # The original also read books, and rows of 128 for nine tenths of the steps.
  data=DataConfig(
    corpus="tfds:wikipedia/20230601.en", objective="masked", seq_len=512, batch_size=256
  ),
  optimizer=OptimizerConfig(
    learning_rate=1e-4,
    schedule="linear",
    warmup_steps=10_000,
    final_fraction=0.0,
    weight_decay=0.01,
    beta2=0.999,
    epsilon=1e-6,
  ),
  training=TrainingConfig(
    num_steps=1_000_000, eval_every_steps=1000, eval_batches=20, dtype="bfloat16"
  ),
)
