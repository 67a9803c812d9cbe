# SPDX-License-Identifier: Apache-2.0
"""Text to ids and back: tokenizers trained here (`own`), and `imported` ones."""

from flaxlm.tokenizers.imported import (
  AnyTokenizer,
  ImportedTokenizer,
  Specials,
  expected_vocab_size,
  load_tokenizer,
)
from flaxlm.tokenizers.own import (
  END_OF_TEXT,
  MASK,
  Role,
  TextStream,
  Tokenizer,
  Vocabulary,
)
from flaxlm.tokenizers.train import train_tokenizer
