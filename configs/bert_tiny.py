# SPDX-License-Identifier: Apache-2.0
"""A small encoder on Python's standard library: predicts masked tokens from both sides.

What:     BERT (Devlin et al., 2019), which predicts 15% of the tokens, in the form of
          ModernBERT (Warner et al., 2024): pre-norm, rotary positions; 4 blocks, 128 wide.
          With learned positions and post-norm, as in bert_base, it only learns in three
          minutes to guess common tokens (12% of the masks filled correctly).
Cost:     about 3 minutes on 2 CPU cores; no account, no download.
Expected: 33% of the held-out masks filled correctly, loss 4.06 (750 steps; after 900, in
          another minute, 35% and 3.87).
Command:  python train.py bert_tiny
          python infer.py runs/bert_tiny --fill "import [MASK]"
          flaxlm embed runs/bert_tiny --text "def open(path):"
"""

from flaxlm.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainingConfig

config = Config(
  model=ModelConfig(
    family="encoder",
    depth=4,
    width=128,
    num_heads=4,
    context=128,
    norm="layernorm",
    norm_epsilon=1e-12,
    embedding_norm=True,
    activation="gelu",
    gated=False,
    biased=True,
    head_transform=True,
    head_biased=True,
    num_token_types=2,
    pooler=True,
  ),
  data=DataConfig(corpus="stdlib", objective="masked", seq_len=128, batch_size=16),
  optimizer=OptimizerConfig(kind="muon", learning_rate=5e-3, warmup_steps=100),
  training=TrainingConfig(
    num_steps=750, eval_every_steps=250, sample_prompt="import [MASK]"
  ),
)
