# SPDX-License-Identifier: Apache-2.0
"""The transformer's predecessor: an LSTM language model on Python's standard library.

What:     3 LSTM layers (Hochreiter & Schmidhuber, 1997), 128 wide, each with a norm and a
          residual connection; BPE of 4,096. --model.cell=gru for GRUs.
Cost:     about 3 minutes on 2 CPU cores; no account, no download.
Expected: 1.736 held-out bits per byte (gzip -9: 1.926), loss 4.151, after 500 steps.
Command:  python train.py rnn_lstm
"""

from flaxlm.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainingConfig

config = Config(
  model=ModelConfig(family="rnn", cell="lstm", depth=3, width=128, context=256),
  data=DataConfig(corpus="stdlib", seq_len=128, batch_size=16),
  optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=50),
  training=TrainingConfig(
    num_steps=500, eval_every_steps=250, sample_prompt="def __init__(self"
  ),
)
