# SPDX-License-Identifier: Apache-2.0
"""Prefill: in chunks, and once for equal prompts."""

import gc
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_generate import model_of

from flaxlm.decoding import prefill
from flaxlm.decoding.generate import decode_block, generate
from flaxlm.decoding.prefill import CHUNK, Request, bucket, padded_length, prefill_prompts
from flaxlm.decoding.sampling import SamplingSettings, make_sampling, stack_settings
from flaxlm.decoding.weights import prepare_params

NUM_NEW = 20


def tokens_of(*arguments: Any, **options: Any) -> list[list[int]]:
  blocks = [block.tokens_BT for block in generate(*arguments, **options)]
  return np.concatenate(blocks, 1).tolist()


def read_count(monkeypatch: pytest.MonkeyPatch) -> list[int]:
  """Grows by the number of tokens that each pass of the prefill reads."""
  counts: list[int] = []
  prefill_chunk = prefill.prefill_chunk

  def counting(model, params, tokens_BT, num_new_B, cache, last_BD):
    counts.append(int(num_new_B.sum()))
    return prefill_chunk(model, params, tokens_BT, num_new_B, cache, last_BD)

  monkeypatch.setattr(prefill, "prefill_chunk", counting)
  return counts


def test_chunks_read_what_one_pass_reads(monkeypatch):
  """Rows end in different chunks; one of them where a chunk ends."""
  model, params = model_of("window, mqa, untied")
  rng = np.random.default_rng(0)
  prompts = [rng.integers(0, 64, length).tolist() for length in (3, 32, 41, 16)]
  request, greedy = Request(prompts, 9, 64), make_sampling(4, 0.0)
  whole = tokens_of(model, params, request, greedy)
  monkeypatch.setattr(prefill, "CHUNK", 16)
  counts = read_count(monkeypatch)
  assert tokens_of(model, params, request, greedy) == whole
  assert counts == [3 + 16 + 16 + 16, 16 + 16, 9]


@given(st.integers(1, 3000), st.integers(1, 300))
def test_what_is_written_fits(length: int, new: int):
  """The padding of the last chunk too."""
  slots = Request([[1] * length], new, 2).slots
  assert slots >= max(length + new - 1, padded_length(length))
  assert padded_length(length) >= length
  assert padded_length(length) - length < CHUNK
  assert slots == bucket(slots, fine=True), "few sizes"
  assert slots <= 3 * (length + new + 32)


def test_samples_of_a_prompt_are_read_once(monkeypatch):
  """And each draws what it would have drawn alone."""
  model, params = model_of("gqa")
  counts = read_count(monkeypatch)
  prompts = [[1, 2, 3], [4, 5], [1, 2, 3], [1, 2, 3]]
  sampling = make_sampling(4, 1.0, seed=3)
  together = tokens_of(model, params, Request(prompts, NUM_NEW, 64), sampling)
  assert counts == [3 + 2]
  for row, prompt in enumerate(prompts):
    one = stack_settings([SamplingSettings(seed=3, row=row)])
    assert tokens_of(model, params, Request([prompt], NUM_NEW, 64), one) == [together[row]]


@pytest.mark.slow
def test_rules_that_ask_what_was_seen_hold_over_blocks():
  """A huge frequency penalty: no token twice, until all were there."""
  model, params = model_of("gqa")
  sampling = make_sampling(2, 0.0, frequency_penalty=100.0)
  rows = tokens_of(model, params, Request([[1, 2], [3]], 40, 64), sampling)
  assert all(len(set(row)) == 40 for row in rows)
  never = make_sampling(2, 0.0, repetition_penalty=1000.0)
  rows = tokens_of(model, params, Request([[1, 2], [3]], 20, 64), never)
  assert not {1, 2} & set(rows[0])
  banned = make_sampling(1, 1.0, banned_tokens=range(60))
  assert min(tokens_of(model, params, Request([[1]], 20, 64), banned)[0]) >= 60


def test_the_likeliest_tokens_come_with_each_step():
  model, params = model_of("gqa")
  request = Request([[1, 2], [3]], 20, 64, num_top=3)
  blocks = [*generate(model, params, request, make_sampling(2, 0.0))]
  for block in blocks:
    assert block.top_tokens_BTX.shape == (*block.tokens_BT.shape, 3)
    np.testing.assert_array_equal(block.top_tokens_BTX[:, :, 0], block.tokens_BT)
    np.testing.assert_allclose(
      block.top_logprobs_BTX[:, :, 0], block.logprobs_BT, atol=1e-6
    )


def random_request(rng: np.random.Generator, number: int) -> Request:
  rows, length = int(rng.choice([1, 4])), int(rng.integers(1, 30))
  prompts = [rng.integers(0, 64, rng.integers(1, length + 1)).tolist() for _ in range(rows)]
  prompts = [[number % 60, row, *prompt] for row, prompt in enumerate(prompts)]
  return Request(prompts, int(rng.integers(1, 64 - max(map(len, prompts)))), 64)


def memory_in_use() -> tuple[int, int]:
  """Resident bytes of this process, and how many arrays JAX holds."""
  gc.collect()
  pages = int(Path("/proc/self/statm").read_text().split()[1])
  return pages * os.sysconf("SC_PAGESIZE"), len(jax.live_arrays())


@pytest.mark.slow
@pytest.mark.parametrize(
  "count",
  [100, pytest.param(10_000, marks=[pytest.mark.fuzz, pytest.mark.timeout(1200)])],
)
def test_random_requests_compile_once_a_bucket(count: int):
  """Random lengths, rows and settings: the programs are known by their buckets, and
  nothing of a request stays."""
  model, params = model_of("gqa")
  params = prepare_params(params, model.cfg)
  rng, functions = np.random.default_rng(0), (prefill.prefill_chunk, decode_block)
  before, buckets = [f._cache_size() for f in functions], (set(), set())
  used = []
  for number in range(count):
    request = random_request(rng, number)
    rows = len(request.prompts)
    sampling = make_sampling(rows, float(rng.uniform(0, 2)), seed=number)
    next(blocks := generate(model, params, request, sampling))
    next(blocks, None)
    key = (bucket(rows, smallest=1), request.slots)
    buckets[0].add((*key, padded_length(max(map(len, request.prompts)))))
    if request.num_blocks:
      buckets[1].add(key)
    if number in (count // 5, count - 1):
      used.append(memory_in_use())
  for f, size, of_function in zip(functions, before, buckets, strict=True):
    assert f._cache_size() - size <= len(of_function)
  assert len(buckets[1]) < 12
  (bytes_before, arrays_before), (bytes_after, arrays_after) = used
  assert arrays_after <= arrays_before
  if count > 1000:  # before, the programs themselves are being added
    assert bytes_after - bytes_before < 2**24


def test_beams_of_a_long_prompt():
  """Search reads through the same prefill: rows of one program whatever they share."""
  model, params = model_of("gqa")
  request = Request([[1, 2, 3], [1, 2, 3]], 4, 64)
  logits_BV, cache = prefill_prompts(
    model, prepare_params(params, model.cfg), request, None
  )
  assert logits_BV.shape[0] == cache.lengths_B.shape[0] == 2
  assert stack_settings([]).keys_B2.shape == (0, 2)
