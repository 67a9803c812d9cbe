# SPDX-License-Identifier: Apache-2.0
"""Mixtures: shares of tokens, each source in its own epochs, for any processes."""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st

from flaxlm.config import DataConfig, TokenizerConfig
from flaxlm.data import tokenizer_of
from flaxlm.data.batches import FEW_ROWS, Batches
from flaxlm.data.mixtures import MOST_ROWS, Mixture, parse_mixture
from flaxlm.data.objectives import Batch
from flaxlm.data.prepare import prepare, prepare_whole
from flaxlm.data.schedule import Schedule
from flaxlm.data.sources import find_corpus
from flaxlm.data.stores import MixedStore, PairStore, TokenStore
from flaxlm.errors import ConfigError

PLACE = 10**5  # token n of source k is k * PLACE + n + 1, and its documents begin with 0


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    ("0.7 stdlib + 0.3 files:notes/*.md", (("stdlib", "files:notes/*.md"), (7, 3))),
    (" 2  a b +\t.5 files:c+d + 1.50 e ", (("a b", "files:c+d", "e"), (4, 1, 3))),
    ("+99999 a + 1 b", (("a", "b"), (99999, 1))),
    ("stdlib", None),
    ("files:0.5 a", None),
    ("files:a + b", None),
  ],
)
def test_what_a_mixture_says(name: str, expected: Any):
  found = parse_mixture(name)
  assert found == (None if expected is None else Mixture(*expected))


@pytest.mark.parametrize(
  ("name", "cause"),
  [
    *((f"{w} a + 1 b", f"'{w} a' has no positive") for w in ("0", "-1", "nan", "-inf")),
    *((f"1 a + {w} b", f"'{w} b' has no positive") for w in ("0.0", "1e99", "0x1", "1/2")),
    ("1 a + b", "'b' has no positive weight"),
    ("0.7a + 0.3 b", "'0.7a' has no positive weight"),
    ("1 a + 2", "'2' is a weight of nothing"),
    ("1 a + 2 b + 3 a", "names 'a' twice"),
    ("0.5 a", "is no mixture"),
    (f"1 a + {MOST_ROWS} b", "weights in the ratio 1:100000"),
    ("1 a + 1e-6 b", "weights in the ratio 1000000:1"),
  ],
)
def test_a_mixture_that_is_none_is_refused_in_one_line(name: str, cause: str):
  with pytest.raises(ConfigError) as error:
    parse_mixture(name)
  assert cause in error.value.cause and "\n" not in error.value.cause and error.value.cure


def check_schedule(weights: list[int]) -> None:
  """All rows of all sources in their order, each source within one row of its share."""
  schedule, counts, total = Schedule(weights), [0] * len(weights), sum(weights)
  for n in range(2 * total + 1):
    source, j = schedule[n]
    assert j == counts[source] and schedule.place_of(source, j) == n
    counts[source] += 1
    for count, weight in zip(counts, weights, strict=True):
      assert abs(count * total - (n + 1) * weight) < total
  far = 10**15 * total + 1
  assert schedule[far] == (
    schedule[1][0],
    schedule[1][1] + 10**15 * weights[schedule[1][0]],
  )


WEIGHTS = st.lists(st.one_of(st.integers(1, 3), st.integers(1, 40)), min_size=2, max_size=7)


@settings(max_examples=25)
@given(weights=WEIGHTS)
def test_each_source_keeps_its_share(weights: list[int]):
  check_schedule(weights)


def make_source(number: int, num_tokens: int) -> TokenStore:
  tokens = number * PLACE + 1 + np.arange(num_tokens)
  tokens[::10] = 0
  bounds = np.append(np.arange(0, num_tokens, 10), num_tokens)
  return TokenStore(tokens, bounds, 0, 10 * PLACE, num_tokens, None, 10 * PLACE - 1, (0,))


def make_batches(sizes: list[int], weights: list[int], **arguments: Any) -> Batches:
  """Of sources with so many rows of three tokens each."""
  sources = {str(k): make_source(k, 3 * size + 1) for k, size in enumerate(sizes)}
  store = MixedStore(sources, tuple(weights))
  cfg = DataConfig(seq_len=3, batch_size=arguments.pop("batch_size"))
  return Batches(store, cfg, vocab_size=10 * PLACE, **arguments)


def rows_of(batch: Batch) -> list[tuple[int, int]]:
  """(source, row) of each row that is not padding."""
  tokens = [
    max(row) - 1
    for row, real in zip(*batch[:1], batch.weights_BT, strict=True)
    if real.any()
  ]
  return [(token // PLACE, token % PLACE // 3) for token in tokens]


def check_mixture(
  sizes: list[int], weights: list[int], seed: int, epochs: int, processes: int
) -> None:
  """Each row once per epoch of its source, in the shares, and the same by any processes."""
  shape = {"batch_size": 12, "seed": seed}
  if sum(sizes) < shape["batch_size"]:  # refused, as a corpus that is too small is
    return
  whole = make_batches(sizes, weights, num_epochs=epochs, **shape)
  assert whole.num_batches is not None
  stream = [row for n in range(whole.num_batches) for row in rows_of(whole[n])]
  total, counts = sum(weights), Counter[int]()
  of_source: dict[int, list[int]] = {k: [] for k in range(len(sizes))}
  for n, (source, row) in enumerate(stream, 1):
    counts[source] += 1
    of_source[source].append(row)
    assert all(abs(counts[k] * total - n * w) < total for k, w in enumerate(weights))
  for source, size in enumerate(sizes):
    rows = of_source[source]
    assert len(rows) <= epochs * size
    for start in range(0, len(rows), size):
      epoch = rows[start : start + size]
      assert len(set(epoch)) == len(epoch)
      assert len(epoch) == size or start + size > len(rows)
  # It ends only where a source would begin an epoch more.
  following, _ = Schedule(weights)[len(stream)]
  assert len(of_source[following]) == epochs * sizes[following]
  endless = make_batches(sizes, weights, num_epochs=None, **shape)
  parts = [
    make_batches(sizes, weights, num_epochs=None, parts=[p], num_parts=processes, **shape)
    for p in range(processes)
  ]
  for n in {0, len(stream) // shape["batch_size"], 10**9}:
    together = [row for part in parts for row in rows_of(part[n])]
    assert together == rows_of(endless[n])
    assert n == 10**9 or together[0] == (stream + together)[n * shape["batch_size"]]


def draw_mixture(random: np.random.Generator) -> dict[str, Any]:
  number = random.integers(2, 5)
  return {
    "sizes": random.integers(1, random.choice([8, 60]), number).tolist(),
    "weights": random.integers(1, random.choice([3, 30]), number).tolist(),
    "seed": int(random.integers(2**31)),
    "epochs": int(random.integers(1, 4)),
    "processes": int(random.choice([1, 2, 3])),
  }


@pytest.mark.parametrize("seed", range(8))
def test_mixtures_epochs_and_processes(seed: int):
  check_mixture(**draw_mixture(np.random.default_rng(seed)))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_thousand_mixtures_epochs_and_processes():
  for seed in range(1000):
    check_mixture(**draw_mixture(np.random.default_rng((1, seed))))


def test_a_mixture_is_a_function_of_seed_and_number():
  same: dict[str, Any] = {"sizes": [30, 30], "weights": [1, 1], "batch_size": 4}
  a, b, other = (make_batches(**same, seed=s, num_epochs=None) for s in (5, 5, 6))
  for n in (40, 3, 3):
    assert rows_of(a[n]) == rows_of(b[n]) != rows_of(other[n])
  with a.iterate(40) as iterator:
    for n, batch in enumerate(itertools.islice(iterator, 3)):
      assert rows_of(batch) == rows_of(a[40 + n])
  rows = [row for n in range(15) for row in rows_of(a[n])]
  orders = [[row for source, row in rows if source == k] for k in (0, 1)]
  assert sorted(orders[0]) == sorted(orders[1]) == [*range(30)]
  assert orders[0] != orders[1], "each source has an order of its own"
  later = [row for n in range(15, 30) for row in rows_of(a[n])]
  assert [row for source, row in later if source == 0] != orders[0], "and in each epoch"


@pytest.mark.parametrize("size", [FEW_ROWS - 1, FEW_ROWS])
def test_large_and_small_sources_are_read_once_an_epoch(size: int):
  batches = make_batches([size, 3], [1, 1], batch_size=size, seed=1, num_epochs=None)
  rows = [row for n in range(4) for source, row in rows_of(batches[n]) if source == 0]
  epochs = [rows[:size], rows[size:]]
  assert [sorted(epoch) for epoch in epochs] == [[*range(size)]] * 2
  assert epochs[0] != epochs[1] != sorted(epochs[1])


def test_pairs_and_masks_are_mixed_too():
  pairs = {
    str(k): PairStore(make_source(k, 40 + k), make_source(k + 3, 40 + k)) for k in (0, 1)
  }
  cfg = DataConfig(seq_len=20, batch_size=4, objective="seq2seq")
  batches = Batches(MixedStore(pairs, (3, 1)), cfg, vocab_size=10 * PLACE, seed=1)
  batch = batches[0]
  assert batch.source_BS is not None
  for read, written in zip(batch.source_BS, batch.tokens_BT, strict=True):
    assert {max(read) // PLACE + 3} == {max(written) // PLACE} or not written.any()
  texts = {str(k): make_source(k, 61) for k in (0, 1)}
  cfg = DataConfig(seq_len=20, batch_size=4, objective="masked")
  batch = Batches(MixedStore(texts, (3, 1)), cfg, vocab_size=10 * PLACE, seed=1)[0]
  assert (batch.weights_BT.sum(1) == 3).all()
  sources = [
    int(np.median(row)) // PLACE
    for row in np.where(batch.weights_BT == 1, batch.targets_BT, batch.tokens_BT)
  ]
  assert sorted(sources) == [0, 0, 0, 1]


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
  monkeypatch.setenv("FLAXLM_DATA_DIR", str(tmp_path / "data"))
  for name, text in {"a": "the quick fox\n", "b": "Zwölf Boxkämpfer\n"}.items():
    (tmp_path / name).mkdir()
    for n in range(30):
      (tmp_path / name / f"{n}.txt").write_text(text * (9 + n))
  return [f"files:{tmp_path / name}" for name in "ab"]


def test_sources_share_a_tokenizer_and_are_stored_by_themselves(
  folders: list[str], tmp_path: Path
):
  a, b = folders
  cfg, lines = TokenizerConfig(vocab_size=300), list[str]()
  mixed = prepare(f"3 {a} + 1 {b}", cfg, lines.append)
  assert isinstance(mixed.train, MixedStore)
  assert list(mixed.train.sources) == folders and mixed.train.weights == (3, 1)
  encode = mixed.tokenizer.encode
  assert max(len(encode(" quick")), len(encode(" Box"))) <= 3, "it knows both"
  assert sum("tokenizer: " in line for line in lines) == 1
  lines.clear()
  again = prepare(f"0.75 {a} + .25 {b}", cfg, lines.append)
  assert again.fingerprint == mixed.fingerprint and lines == []
  (path,) = (tmp_path / "data" / "tokenizers").iterdir()
  alone = prepare(a, TokenizerConfig(path=str(path)), lines.append)
  assert lines == [], "found again"
  for split in ("train", "validation"):
    parts, store = getattr(mixed, split), getattr(alone, split)
    assert np.array_equal(parts.sources[a].tokens, store.tokens)
    assert parts.num_tokens == sum(s.num_tokens for s in parts.sources.values())
    assert (parts.vocab_size, parts.end_id) == (store.vocab_size, store.end_id)
  other = prepare(f"1 {a} + 1 {b}", TokenizerConfig(path=str(path)))
  assert other.fingerprint != mixed.fingerprint, "weights count"
  path.write_text("?")
  assert prepare(f"3 {a} + 1 {b}", cfg).fingerprint == mixed.fingerprint
  whole = prepare_whole(f"3 {a} + 1 {b}", path)
  assert isinstance(whole, MixedStore)
  assert [s.num_documents for s in whole.sources.values()] == [30, 30]  # type: ignore[union-attr]


def test_a_tokenizer_is_trained_in_the_mixtures_shares(
  folders: list[str], monkeypatch: pytest.MonkeyPatch
):
  """The sample has as many characters of each source as its weight says."""
  monkeypatch.setattr(tokenizer_of, "SAMPLE_PIECE", 10)
  sampled = Counter[str]()
  train = tokenizer_of.train_tokenizer

  def spy(kind: str, texts: Any, *rest: Any) -> Any:
    texts = list(texts)
    for text in texts:
      sampled["a" if set("thqui") & set(text) else "b"] += len(text)
    return train(kind, texts, *rest)

  monkeypatch.setattr(tokenizer_of, "train_tokenizer", spy)
  monkeypatch.setattr(tokenizer_of, "SAMPLE_CHARACTERS_PER_ID", 10)
  a, b = folders
  prepare(f"3 {a} + 1 {b}", TokenizerConfig(vocab_size=300))
  assert sampled["b"] / sampled.total() == pytest.approx(0.25, abs=0.06)


class MixedLetters(tfds.core.GeneratorBasedBuilder):
  """Somebody's TFDS dataset."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self) -> tfds.core.DatasetInfo:
    features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
    return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

  def _split_generators(self, dl_manager: object) -> dict[str, Any]:
    return {"train": ((n, {"text": f"letter {n}"}) for n in range(100))}

  def _generate_examples(self) -> None:
    """The splits are generators already."""


def test_a_public_dataset_may_be_one_of_several(folders: list[str], tmp_path: Path):
  folder = str(tmp_path / "data" / "tfds")
  MixedLetters(data_dir=folder, file_format="array_record").download_and_prepare()
  corpus = f"1 {folders[0]} + 2 tfds:mixed_letters"
  mixed = prepare(corpus, TokenizerConfig(kind="byte"), objective="masked")
  assert isinstance(mixed.validation, MixedStore)
  letters = mixed.validation.sources["tfds:mixed_letters"]
  assert isinstance(letters, TokenStore) and letters.num_documents == 5
  assert letters.mask_id == mixed.tokenizer.mask_id is not None


def test_one_corpus_is_asked_for_where_a_mixture_is_no_use(folders: list[str]):
  with pytest.raises(ConfigError, match="is a mixture"):
    find_corpus("0.5 {} + 0.5 {}".format(*folders))
