# SPDX-License-Identifier: Apache-2.0
"""BERT large: a bidirectional encoder of 335M parameters.

What:       24 blocks, 1,024 wide, 16 heads; learned positions and segments, LayerNorm after
            each branch, GELU, biases; a pooler and a head for the masked words.
Cost:       131B tokens, 2.6e20 FLOPs (6ND), 4 days on 64 TPU chips (appendix A.2); float32
            state with Adam: 5.4 GB.
Expected:   the original, fine-tuned, has 82.1 on GLUE (table 1); not trained here.
Command:    flaxlm plan bert_large --mesh data=8 --device h200
            python train.py bert_large --mesh data=8
Source:     Devlin et al. (2019), section 3 (shape) and appendix A.2 (training);
            google-bert/bert-large-uncased.
Parameters: 336,224,058 (BertForPreTraining has 336,226,108, with 2,050 for the next
            sentence, which is not predicted here)
"""

from flaxlm.config.families import BERT_DATA, BERT_OPTIMIZER, bert, card

config = card(
  model=bert(depth=24, width=1024, num_heads=16),
  data=BERT_DATA,
  optimizer=BERT_OPTIMIZER,
  num_steps=1_000_000,
  remat="none",
)
