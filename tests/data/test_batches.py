# SPDX-License-Identifier: Apache-2.0
"""Batches as an index: every row once, the same for any number of processes."""

import dataclasses
import itertools
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flaxlm.config import OBJECTIVES, DataConfig
from flaxlm.data.batches import Batches
from flaxlm.data.objectives import Batch
from flaxlm.data.stores import PairStore, Store, TokenStore, largest_id
from flaxlm.errors import DataError

BOS = 0
EVERY_OBJECTIVE = pytest.mark.parametrize("objective", sorted(set(OBJECTIVES.values())))


def make_text(num_tokens: int, every: int = 10) -> TokenStore:
  """Tokens that tell their place: token i is i, but for a bos at every 10th; a mask."""
  tokens = np.arange(num_tokens, dtype=np.uint32)
  tokens[::every] = BOS
  bounds = np.append(np.arange(0, num_tokens, every), num_tokens)
  special_ids = (BOS, num_tokens)
  return TokenStore(
    tokens, bounds, BOS, num_tokens + 1, num_tokens, None, num_tokens, special_ids
  )


def make_store(num_tokens: int, objective: str = "next_token") -> Store:
  if objective == "seq2seq":  # as many sources of 4 tokens as targets of 3
    num_pairs = -(-num_tokens // 4)
    return PairStore(make_text(num_pairs * 4, 4), make_text(num_pairs * 3, 3))
  return make_text(num_tokens)


def make_batches(num_tokens: int = 101, **arguments: Any) -> Batches:
  shape = {"seq_len": 4, "batch_size": 4, "objective": "next_token"}
  shape |= {name: arguments.pop(name) for name in list(arguments) if name in shape}
  store = make_store(num_tokens, str(shape["objective"]))
  defaults: dict[str, Any] = {"vocab_size": store.vocab_size}
  return Batches(store, DataConfig(**shape), **defaults | arguments)


def rows(batch: Batch) -> list[tuple[int, ...]]:
  """The text of each row that is not padding, masked or not; it identifies the row."""
  real = batch.weights_BT.sum(1) > 0
  originals_BT = np.where(batch.weights_BT == 1, batch.targets_BT, batch.tokens_BT)
  return [tuple(row) for row in originals_BT[real].tolist()]


def equal(a: Batch, b: Batch) -> bool:
  return all(map(np.array_equal, a, b))  # None equals None alone


@settings(max_examples=50)
@given(
  lengths=st.lists(st.integers(1, 9), min_size=2, max_size=6),
  seq_len=st.integers(1, 20),
  batch_size=st.integers(1, 3),
)
def test_every_text_but_the_last_has_its_end(lengths, seq_len, batch_size):
  """It need not be the token that begins the next text. After the last nothing follows."""
  end, texts = 99, [[BOS, *range(1, length)] for length in lengths]
  tokens = np.concatenate([np.array(text, np.uint32) for text in texts])
  bounds = np.cumsum([0, *lengths])
  store = TokenStore(tokens, bounds, end, end + 1, len(tokens), None, end, (BOS, end))
  cfg = DataConfig(seq_len=seq_len, batch_size=batch_size)
  batches = Batches(store, cfg, vocab_size=store.vocab_size)
  assert batches.num_batches is not None
  found = [batches[n] for n in range(batches.num_batches)]
  targets = np.concatenate([batch.targets_BT[batch.weights_BT == 1] for batch in found])
  expected = [token for text in texts for token in [*text[1:], end]]
  assert targets.tolist() == expected[:-1]


@settings(max_examples=50)
@given(
  num_tokens=st.integers(2, 100),
  seq_len=st.integers(1, 20),
  batch_size=st.integers(1, 5),
)
def test_in_order_every_token_is_a_target_once(num_tokens, seq_len, batch_size):
  batches = make_batches(num_tokens, seq_len=seq_len, batch_size=batch_size)
  assert batches.num_batches is not None
  inputs, targets = [], []
  for batch in map(batches.__getitem__, range(batches.num_batches)):
    assert all(array.shape == (batch_size, seq_len) for array in batch[:5])
    assert set(batch[5:]) == {None}
    inputs += batch.tokens_BT[batch.weights_BT == 1].tolist()
    targets += batch.targets_BT[batch.weights_BT == 1].tolist()
    assert (batch.segments_BT == 0).tolist() == (batch.weights_BT == 0).tolist()
  tokens = make_text(num_tokens).tokens.tolist()
  assert inputs == tokens[:-1]
  assert targets == tokens[1:]
  with pytest.raises(IndexError):
    batches[batches.num_batches]


@EVERY_OBJECTIVE
@settings(max_examples=12)
@given(
  seed=st.integers(0, 2**31 - 1),
  num_epochs=st.integers(1, 3),
  num_tokens=st.integers(60, 130),
)
def test_each_epoch_has_every_row_once(objective, seed, num_epochs, num_tokens):
  ordered = make_batches(num_tokens, objective=objective)
  every_row = sorted(
    row for n in range(ordered.num_batches or 0) for row in rows(ordered[n])
  )
  batches = make_batches(num_tokens, seed=seed, num_epochs=num_epochs, objective=objective)
  stream = [row for n in range(batches.num_batches or 0) for row in rows(batches[n])]
  epochs = [stream[n : n + len(every_row)] for n in range(0, len(stream), len(every_row))]
  assert [sorted(epoch) for epoch in epochs] == [every_row] * num_epochs


def test_epochs_and_seeds_differ_in_order():
  def epoch(seed: int, number: int) -> list[tuple[int, ...]]:
    batches = make_batches(401, seed=seed, num_epochs=None)  # 100 rows = 25 batches
    return [row for n in range(25 * number, 25 * number + 25) for row in rows(batches[n])]

  orders = [epoch(seed, number) for seed in (0, 1, 2) for number in (0, 1, 2)]
  assert all(a != b for a, b in itertools.combinations(orders, 2))
  assert epoch(1, 2) == orders[5]


@EVERY_OBJECTIVE
@pytest.mark.parametrize("num_processes", [2, 4, 12])
@pytest.mark.parametrize("seed", [None, 7])
def test_processes_share_out_each_batch(
  objective: str, num_processes: int, seed: int | None
):
  same: dict[str, Any] = {"batch_size": 12, "seed": seed, "objective": objective}
  whole = make_batches(**same)
  parts = [
    make_batches(**same, parts=[process], num_parts=num_processes)
    for process in range(num_processes)
  ]
  assert {part.num_batches for part in parts} == {whole.num_batches} == {3}
  for n in range(3):
    batches = [part[n] for part in parts]
    together = Batch(
      *(
        None if arrays[0] is None else np.concatenate(arrays)
        for arrays in zip(*batches, strict=True)
      )
    )
    assert equal(together, whole[n])


def test_a_process_may_have_parts_that_lie_apart():
  whole = make_batches(batch_size=12, seed=7, objective="masked")
  some = make_batches(
    batch_size=12, seed=7, objective="masked", parts=[0, 2, 3], num_parts=4
  )
  mine = [0, 1, 2, 6, 7, 8, 9, 10, 11]
  for n in range(3):
    assert np.array_equal(some[n].tokens_BT, whole[n].tokens_BT[mine])
    assert np.array_equal(some[n].weights_BT, whole[n].weights_BT[mine])


@EVERY_OBJECTIVE
@settings(max_examples=10)
@given(start=st.integers(0, 10**12), process=st.integers(0, 1))
def test_iterating_from_anywhere_is_indexing(objective: str, start: int, process: int):
  batches = make_batches(
    seed=3, num_epochs=None, parts=[process], num_parts=2, objective=objective
  )
  with batches.iterate(start) as iterator:
    for n, batch in enumerate(itertools.islice(iterator, 5)):
      assert equal(batch, batches[start + n])


@EVERY_OBJECTIVE
def test_a_batch_is_a_function_of_seed_and_number(objective: str):
  same: dict[str, Any] = {"num_epochs": None, "objective": objective}
  one, again, other = (make_batches(seed=seed, **same) for seed in (5, 5, 6))
  for n in (40, 3, 1000, 3):  # in whatever order they are asked for
    assert equal(one[n], again[n])
    assert not equal(one[n], other[n])


@EVERY_OBJECTIVE
def test_an_evaluation_fills_up_its_last_batch(objective: str):
  batches = make_batches(batch_size=7, objective=objective)
  last = batches[(batches.num_batches or 0) - 1]
  filled = last.weights_BT.sum(1) == 0
  assert 0 < filled.sum() < 7
  assert filled.tolist() == sorted(filled.tolist())  # at the end
  for array in last:
    assert array is None or not array[filled].any()


def test_what_is_masked_is_chosen_anew_in_each_epoch_but_not_in_evaluation():
  def masks(n: int, **arguments: Any) -> dict[tuple[int, ...], tuple[float, ...]]:
    # 24 rows = 6 batches; every epoch has the same rows
    batches = make_batches(97, objective="masked", **arguments)
    part = [batches[i] for i in range(6 * n, 6 * n + 6)]
    weights = [row for batch in part for row in batch.weights_BT.tolist()]
    texts = [row for batch in part for row in rows(batch)]
    return dict(zip(texts, map(tuple, weights), strict=True))

  epochs = [masks(n, seed=1, num_epochs=None) for n in range(4)]
  assert all(epoch.keys() == epochs[0].keys() for epoch in epochs)
  assert all(a != b for a, b in itertools.combinations(epochs, 2))
  assert masks(0) == masks(0)
  # In 24 rows of 3 or 4 tokens one is masked; over four epochs it is not always the same.
  assert all(sum(weights) == 1 for epoch in epochs for weights in epoch.values())
  changing = [text for text in epochs[0] if len({epoch[text] for epoch in epochs}) > 1]
  assert len(changing) >= 20


def test_iterating_ends_with_the_last_epoch():
  batches = make_batches(seed=3, num_epochs=2)
  with batches.iterate(3) as iterator:
    assert len(list(iterator)) == (batches.num_batches or 0) - 3
  with batches.iterate(10**6) as iterator:
    assert list(iterator) == []


def test_endless_batches_have_no_number():
  assert make_batches(seed=0, num_epochs=None).num_batches is None
  assert make_batches(seed=0, num_epochs=3).num_batches == 19  # 3 * 25 rows, 4 by 4


def test_a_closed_iterator_leaves_no_thread():
  before = set(threading.enumerate())
  with make_batches(seed=0, num_epochs=None).iterate() as iterator:
    next(iterator)
  deadline = time.monotonic() + 10
  while set(threading.enumerate()) - before and time.monotonic() < deadline:
    time.sleep(0.01)
  assert set(threading.enumerate()) <= before


def test_leaving_in_the_middle_prints_nothing():
  code = (
    "import numpy as np\n"
    "from flaxlm.config import DataConfig\n"
    "from flaxlm.data.batches import Batches\n"
    "from flaxlm.data.stores import TokenStore\n"
    "store = TokenStore(np.arange(999), np.array([0, 999]), 0, 999, 999, None)\n"
    "cfg = DataConfig(seq_len=4, batch_size=4)\n"
    "batches = Batches(store, cfg, vocab_size=999, seed=0, num_epochs=None)\n"
    "import sys\n"
    "assert not {'tensorflow', 'torch'} & set(sys.modules)\n"
    "with batches.iterate(5) as iterator:\n"
    "  next(iterator)\n"
    "  sys.exit(7)\n"
  )
  result = subprocess.run(
    [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60
  )
  assert (result.returncode, result.stdout, result.stderr) == (7, "", "")


def test_a_corpus_smaller_than_a_batch():
  with pytest.raises(DataError, match=r"25 rows .* data.batch_size=26") as error:
    make_batches(batch_size=26, seed=0)
  assert "--data.batch-size=25" in error.value.cure
  assert make_batches(batch_size=26).num_batches == 1  # evaluation fills the batch up


def test_a_model_with_too_few_ids():
  with pytest.raises(DataError, match="tokenizer has 102 ids, the model only 101"):
    make_batches(vocab_size=101)


@EVERY_OBJECTIVE
def test_a_model_that_may_lack_ids_of_the_tokenizer(objective: str):
  """Imported ones do: only a text that has such an id is refused."""
  store = make_store(101, objective)
  cfg = DataConfig(seq_len=4, batch_size=4, objective=objective)
  few = 1 + largest_id(store)
  more = lambda one: dataclasses.replace(one, vocab_size=few + 7)
  is_pair = isinstance(store, PairStore)
  larger = PairStore(more(store.source), more(store.target)) if is_pair else more(store)
  make = lambda size: Batches(larger, cfg, vocab_size=size, may_lack_ids=True)
  if objective == "masked":
    with pytest.raises(DataError, match=f"has {few + 7} ids, the model only {few}\n"):
      make(few)
  else:
    assert make(few)[0] is not None
    with pytest.raises(DataError, match=f"and the text has id {few - 1}\n"):
      make(few - 1)
  with pytest.raises(DataError, match="the model only"):
    Batches(larger, cfg, vocab_size=few)


@EVERY_OBJECTIVE
@pytest.mark.parametrize("threaded", [False, True])
def test_damaged_tokens(objective: str, threaded: bool):
  store = make_store(101, objective)
  text = store.target if isinstance(store, PairStore) else store
  text.tokens[49] = 999
  cfg = DataConfig(seq_len=4, batch_size=4, objective=objective)
  batches = Batches(store, cfg, vocab_size=102)
  with pytest.raises(DataError, match="999 is no id of the tokenizer"):
    if threaded:
      with batches.iterate() as iterator:
        list(iterator)
    else:
      for n in range(batches.num_batches or 0):
        batches[n]
