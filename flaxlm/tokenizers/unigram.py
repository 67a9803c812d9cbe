# SPDX-License-Identifier: Apache-2.0
"""Trains a unigram language model over pieces of words (Kudo, 2018, section 3.2).

A word is cut into the pieces whose probabilities have the largest product. Learning them
begins with many pieces, the frequent substrings. Expectation maximisation finds their
probabilities, and the pieces that would be missed least are taken away, again and again,
until as many are left as are wanted. The same words give the same pieces on every machine:
the trainer of the `tokenizers` library depends on the order of a hash table.

All words are computed at once. Their bytes are the edges of one graph, the lattice: N nodes
are places between bytes, and each of E edges is a piece at a place.
"""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

MOST_PIECE_BYTES = 16
MOST_WORD_BYTES = 32  # longer words are cut; so no probability is too small for float64
MOST_WORDS = 2**17  # the most frequent ones; the others are typing errors and numbers
SEEDS_PER_PIECE = 3  # with many more, pruning is left with worse pieces (docs/LOG.md)
KEPT_AT_A_TIME = 0.75
EM_STEPS = 2
LEAST_PROBABILITY = 1e-9
DIGITS = 6  # of a score: NumPy's last bits differ between processors


class Edges(NamedTuple):
  """The pieces of a lattice, in an order in which sums over paths can be taken."""

  source_E: np.ndarray
  target_E: np.ndarray
  piece_E: np.ndarray
  depth_E: np.ndarray  # bytes between the target and where all paths begin

  def only(self, keeps_E: np.ndarray) -> "Edges":
    return Edges(*(values[keeps_E] for values in self))

  def sweep(self, first_N: np.ndarray, values_E: np.ndarray, add: Any, times: Any) -> None:
    """Fills in, for each node, the sum over paths to it of the product of their values,
    where `add` and `times` are the two operations; `first_N` is given where paths begin."""
    targets = np.flatnonzero(np.diff(self.target_E, prepend=-1))
    depths = self.depth_E[targets]
    bounds = np.searchsorted(depths, np.arange(1, depths.max(initial=0) + 2))
    for first, last in itertools.pairwise(bounds):
      begins = targets[first:last]
      end = targets[last] if last < len(targets) else len(self.target_E)
      if len(begins):
        edges = slice(begins[0], end)
        paths_E = times(first_N[self.source_E[edges]], values_E[edges])
        first_N[self.target_E[begins]] = add.reduceat(paths_E, begins - begins[0])


class Lattice(NamedTuple):
  """All ways to cut W words into pieces."""

  forward: Edges
  backward: Edges
  begin_W: np.ndarray  # nodes
  end_W: np.ndarray
  word_N: np.ndarray  # the word of each node

  def only(self, keeps_P: np.ndarray) -> "Lattice":
    """Without some pieces; the others get the numbers that are left."""
    number_P = np.cumsum(keeps_P) - 1
    kept = [edges.only(keeps_P[edges.piece_E]) for edges in (self.forward, self.backward)]
    forward, backward = (e._replace(piece_E=number_P[e.piece_E]) for e in kept)
    return self._replace(forward=forward, backward=backward)


def train_unigram(words: Mapping[bytes, int], num_pieces: int) -> list[tuple[bytes, float]]:
  """The pieces, the most probable first, and the natural logarithm of their probabilities.

  `words` says how often each occurs. All 256 bytes are pieces; `num_pieces`, 256 or more,
  counts them. There are fewer if the words do not have as many.
  """
  counts = _cut(words)
  seeds = _seeds(counts, SEEDS_PER_PIECE * num_pieces)
  pieces = [*(bytes([byte]) for byte in range(256)), *seeds]
  texts, count_W = list(counts), np.array(list(counts.values()), np.float64)
  numbers = {piece: number for number, piece in enumerate(pieces)}
  lattice = make_lattice(texts, numbers, whole=True)
  others = make_lattice(pieces, numbers, whole=False)  # each piece, made of others
  weights_P = np.array([max(1, seeds.get(piece, 1)) for piece in pieces], np.float64)
  weights_P[:256] = np.bincount(
    np.frombuffer(b"".join(texts), np.uint8), count_W.repeat([*map(len, texts)]), 256
  )
  alive_P = np.arange(len(pieces))
  while True:
    for _ in range(EM_STEPS):
      weights_P = expected_counts(lattice, _probabilities(weights_P), count_W)
    if len(alive_P) <= num_pieces:
      break
    keeps_P = _keep(others, weights_P, alive_P, num_pieces)
    lattice, others = lattice.only(keeps_P), others.only(keeps_P)
    alive_P, weights_P = alive_P[keeps_P], weights_P[keeps_P]
  scores_P = np.round(np.log(_probabilities(weights_P)), DIGITS)
  order = np.argsort(-scores_P, kind="stable")
  return [(pieces[alive_P[n]], float(scores_P[n])) for n in order]


def make_lattice(
  words: Sequence[bytes], numbers: Mapping[bytes, int], whole: bool
) -> Lattice:
  """The lattice of words; without `whole`, no word of several bytes is one piece."""
  sources, targets, pieces, begins = list[int](), list[int](), list[int](), list[int]()
  node = 0
  for word in words:
    length = len(word)
    begins.append(node)
    for start in range(length):
      for end in range(start + 1, min(start + MOST_PIECE_BYTES, length) + 1):
        number = numbers.get(word[start:end])
        if number is not None and (whole or length == 1 or end - start < length):
          sources.append(node + start)
          targets.append(node + end)
          pieces.append(number)
    node += length + 1
  begin_W = np.array(begins, np.int64)
  length_W = np.array([len(word) for word in words], np.int64)
  source_E, target_E = np.array(sources, np.int64), np.array(targets, np.int64)
  piece_E = np.array(pieces, np.int64)
  word_N = np.arange(len(words)).repeat(length_W + 1)
  end_W = begin_W + length_W
  after_E = target_E - begin_W[word_N[target_E]]
  before_E = end_W[word_N[source_E]] - source_E
  ahead, back = np.lexsort((target_E, after_E)), np.lexsort((source_E, before_E))
  forward = Edges(source_E, target_E, piece_E, after_E).only(ahead)
  backward = Edges(target_E, source_E, piece_E, before_E).only(back)
  return Lattice(forward, backward, begin_W, end_W, word_N)


def expected_counts(
  lattice: Lattice, probability_P: np.ndarray, count_W: np.ndarray
) -> np.ndarray:
  """How often each piece is expected in words that occur `count_W` times, (P,): the sum
  over all ways to cut, weighted by their probabilities (forward-backward)."""
  forward, backward = lattice.forward, lattice.backward
  before_N, after_N = np.zeros((2, len(lattice.word_N)))
  before_N[lattice.begin_W] = 1
  after_N[lattice.end_W] = 1
  probability_E = probability_P[forward.piece_E]
  forward.sweep(before_N, probability_E, np.add, np.multiply)
  backward.sweep(after_N, probability_P[backward.piece_E], np.add, np.multiply)
  share_W = count_W / before_N[lattice.end_W]
  share_E = before_N[forward.source_E] * probability_E * after_N[forward.target_E]
  share_E *= share_W[lattice.word_N[forward.source_E]]
  return np.bincount(forward.piece_E, share_E, len(probability_P))


def _keep(
  others: Lattice, count_P: np.ndarray, alive_P: np.ndarray, num_pieces: int
) -> np.ndarray:
  """Which pieces stay, (P,) bool: the bytes, and those without which the text would lose
  most of its likelihood, if the best others took their places."""
  log_P = np.log(_probabilities(count_P))
  best_N = np.full(len(others.word_N), -np.inf)
  best_N[others.begin_W] = 0
  edges = others.forward
  edges.sweep(best_N, log_P[edges.piece_E], np.maximum, np.add)
  loss_P = count_P * (log_P - best_N[others.end_W[alive_P]])
  loss_P[:256] = np.inf
  number = max(num_pieces, int(KEPT_AT_A_TIME * len(alive_P)))
  keeps_P = np.zeros(len(alive_P), bool)
  keeps_P[np.argsort(-loss_P, kind="stable")[:number]] = True
  return keeps_P


def _probabilities(count_P: np.ndarray) -> np.ndarray:
  return np.maximum(count_P / count_P.sum(), LEAST_PROBABILITY)


def _cut(words: Mapping[bytes, int]) -> dict[bytes, int]:
  """The most frequent words, in an order of their own; those too long are in parts."""
  counts = Counter[bytes]()
  for word, number in words.items():
    for start in range(0, len(word), MOST_WORD_BYTES):
      counts[word[start : start + MOST_WORD_BYTES]] += number
  order = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
  return dict(order[:MOST_WORDS])


def _seeds(words: Mapping[bytes, int], number: int) -> dict[bytes, int]:
  """The substrings that cover most of the text, and how often they occur. One that always
  stands inside of the same longer one is left out."""
  counts = Counter[bytes]()
  for word, times in words.items():
    for start in range(len(word) - 1):
      for end in range(start + 2, min(start + MOST_PIECE_BYTES, len(word)) + 1):
        counts[word[start:end]] += times
  found = {piece: times for piece, times in counts.items() if times > 1}
  inside = {
    part
    for piece, times in found.items()
    for part in (piece[1:], piece[:-1])
    if found.get(part) == times
  }
  seeds = [(piece, times) for piece, times in found.items() if piece not in inside]
  seeds.sort(key=lambda item: (-item[1] * len(item[0]), item[0]))
  return dict(seeds[:number])
