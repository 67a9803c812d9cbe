# SPDX-License-Identifier: Apache-2.0
"""What a prepared split is: tokens of documents, of pairs, or of several sources."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np


@dataclass(frozen=True)
class TokenStore:
  """The tokens of a split: one array, mapped from disk; each document begins with bos, but
  a conversation as its template has it."""

  tokens: np.ndarray
  bounds: np.ndarray  # where each document begins and, at last, where the last one ends
  end_id: int  # what the last token of a document predicts
  vocab_size: int  # every token is below it
  num_bytes: int  # of text
  gzip_bits_per_byte: float | None  # of the text under `gzip -9`; validation only
  mask_id: int | None = None  # of tokenizers for masked models
  special_ids: tuple[int, ...] = ()  # ids that are never text, such as bos and mask
  weights: np.ndarray | None = None  # of conversations: what each token counts in the loss

  @property
  def num_tokens(self) -> int:
    return len(self.tokens)

  @property
  def num_documents(self) -> int:
    return len(self.bounds) - 1


@dataclass(frozen=True)
class PairStore:
  """The tokens of a split of pairs: document n of `target` belongs to n of `source`."""

  source: TokenStore
  target: TokenStore
  gzip_bits_per_byte: ClassVar[None] = None

  @property
  def end_id(self) -> int:
    return self.target.end_id

  @property
  def vocab_size(self) -> int:
    return self.target.vocab_size

  @property
  def num_tokens(self) -> int:
    """Tokens of both sides."""
    return self.source.num_tokens + self.target.num_tokens


@dataclass(frozen=True)
class MixedStore:
  """A split of each source of a mixture, with the tokenizer that they share."""

  sources: Mapping[str, TokenStore | PairStore]  # by the name of the corpus
  weights: tuple[int, ...]  # rows of each source in a period of their sum
  gzip_bits_per_byte: ClassVar[None] = None

  @property
  def _first(self) -> TokenStore | PairStore:
    return next(iter(self.sources.values()))

  @property
  def end_id(self) -> int:
    return self._first.end_id

  @property
  def vocab_size(self) -> int:
    return self._first.vocab_size

  @property
  def num_tokens(self) -> int:
    """Tokens of all sources."""
    return sum(store.num_tokens for store in self.sources.values())


Store = TokenStore | PairStore | MixedStore


def largest_id(store: Store) -> int:
  """The largest id that a split has, the end of its texts among them."""
  if isinstance(store, MixedStore):
    return max(map(largest_id, store.sources.values()))
  if isinstance(store, PairStore):
    return max(largest_id(store.source), largest_id(store.target))
  return max(int(store.tokens.max(initial=0)), store.end_id)
