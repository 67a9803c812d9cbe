# SPDX-License-Identifier: Apache-2.0
"""BERT base: a bidirectional encoder of 109M parameters.

What:       12 blocks, 768 wide, 12 heads; learned positions and segments, LayerNorm after
            each branch, GELU, biases; a pooler and a head for the masked words.
Cost:       131B tokens, 8.7e19 FLOPs (6ND), 4 days on 16 TPU chips (appendix A.2); float32
            state with Adam: 1.8 GB.
Expected:   the original, fine-tuned, has 79.6 on GLUE (table 1); not trained here.
Command:    flaxlm plan bert_base --mesh data=8 --device h200
            python train.py bert_base --mesh data=8
Source:     Devlin et al. (2019), section 3 (shape) and appendix A.2 (training);
            google-bert/bert-base-uncased.
Parameters: 110,104,890 (BertForPreTraining has 110,106,428, with 1,538 for the next
            sentence, which is not predicted here)
"""

from flaxlm.config.families import BERT_DATA, BERT_OPTIMIZER, bert, card

config = card(
  model=bert(depth=12, width=768, num_heads=12),
  data=BERT_DATA,
  optimizer=BERT_OPTIMIZER,
  num_steps=1_000_000,
  remat="none",
)
