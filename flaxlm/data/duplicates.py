# SPDX-License-Identifier: Apache-2.0
"""Which texts of a corpus are there already: the same text, or nearly the same.

The first of several stays, and what is held out counts as first: what is learnt is then not
in it. Near duplicates are found by MinHash (Broder, 1997) over five words in a row, with
the settings of datatrove's FineWeb: two texts meet if all 8 values in one of 14 bands are
equal, which has a chance of 0.92 where 80 % of what is in either is in both, of 0.56 at
70 %, and of 0.05 at 50 %.
"""

import functools
import hashlib
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from flaxlm.data.corpus import Texts

NUM_BANDS, BAND_SIZE = 14, 8
NUM_WORDS = 5
SHINGLES_AT_A_TIME = 2**13  # times 112 values of 8 bytes
_FACTORS_J = np.array([0x9E3779B97F4A7C15**j % 2**64 for j in range(NUM_WORDS)], np.uint64)


class Chosen(Texts):
  """Some of many texts."""

  def __init__(self, texts: Sequence[str], numbers: np.ndarray):
    self._texts, self._numbers = texts, numbers

  def __len__(self) -> int:
    return len(self._numbers)

  def read(self, number: int) -> str:
    return self._texts[int(self._numbers[number])]


def kept_texts(splits: Mapping[str, Iterable[str]], near: bool) -> dict[str, np.ndarray]:
  """The numbers of the texts of each split that are no duplicates, exact or also near."""
  seen, kept = set[bytes](), dict[str, np.ndarray]()
  for split in sorted(splits, key=lambda name: name != "validation"):
    numbers = []
    for number, text in enumerate(splits[split]):
      keys = [_digest(text.encode("utf-8", "replace"))]
      if near and keys[0] not in seen:
        keys += _bands(text)
      if seen.isdisjoint(keys):
        numbers.append(number)
        seen.update(keys)
    kept[split] = np.array(numbers, np.int64)
  return kept


def _digest(raw: bytes) -> bytes:
  return hashlib.sha256(raw).digest()[:16]


def _bands(text: str) -> Iterator[bytes]:
  """A key of each band of a text's signature."""
  signature = min_hashes(text)
  for band in range(NUM_BANDS):
    values = signature[band * BAND_SIZE : (band + 1) * BAND_SIZE]
    yield _digest(bytes([band]) + values.tobytes())


def min_hashes(text: str) -> np.ndarray:
  """(112,) uint32: the smallest of each hash of the text's shingles. The share of values
  that two texts have in common estimates that of their shingles."""
  words = re.findall(r"\w+", text.lower()) or [text]
  hashes = np.array([zlib.crc32(word.encode("utf-8", "replace")) for word in words])
  # The words of a shingle, in their order; a shorter text is one shingle.
  missing = max(0, NUM_WORDS - len(words))
  rows_SJ = np.lib.stride_tricks.sliding_window_view(
    np.pad(hashes.astype(np.uint64) + 1, (0, missing)), NUM_WORDS
  )
  factors_K, terms_K = _hash_family()
  smallest_K = np.full(NUM_BANDS * BAND_SIZE, 2**32 - 1, np.uint32)
  for start in range(0, len(rows_SJ), SHINGLES_AT_A_TIME):
    shingles_S = rows_SJ[start : start + SHINGLES_AT_A_TIME] @ _FACTORS_J
    shingles_S ^= shingles_S >> np.uint64(31)  # products alone keep the order of low bits
    values_SK = (shingles_S[:, None] * factors_K + terms_K) >> np.uint64(32)
    smallest_K = np.minimum(smallest_K, values_SK.min(0).astype(np.uint32))
  return smallest_K


@functools.cache
def _hash_family() -> tuple[np.ndarray, np.ndarray]:
  """Multiply-shift hashing (Dietzfelbinger et al., 1997): odd factors, and terms."""
  random = np.random.default_rng(0)
  factors_K, terms_K = random.integers(0, 2**64, (2, NUM_BANDS * BAND_SIZE), np.uint64)
  return factors_K | np.uint64(1), terms_K
