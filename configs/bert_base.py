# SPDX-License-Identifier: Apache-2.0
"""BERT base: a bidirectional encoder of 109M parameters.

What:       12 blocks, 768 wide, 12 heads; learned positions and segments, LayerNorm after
            each branch, GELU, biases; a pooler and a head for the masked words.
Cost:       131B tokens, 8.7e19 FLOPs (6 a parameter and token); 4 days on 16 TPU chips in
            the paper (appendix A.2). State in float32: 1.8 GB (weights, gradients, Adam's
            moments).
Expected:   the original, fine-tuned, has 79.6 on GLUE (table 1); the shape is what is
            tested here.
Command:    flaxlm plan bert_base --mesh data=8 --device h200
            python train.py bert_base --mesh data=8
Source:     Devlin et al. (2019), section 3 (shape) and appendix A.2 (training);
            google-bert/bert-base-uncased.
Parameters: 110,104,890: 109,482,240 of transformers' BertModel and the head.
            BertForPreTraining has 110,106,428, with 1,538 for the next sentence, which is
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
    depth=12,
    width=768,
    num_heads=12,
    ffn_width=3072,
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
