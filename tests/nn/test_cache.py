# SPDX-License-Identifier: Apache-2.0
"""Rings: a local layer's cache of its window alone gives the results of a full cache. And
how entries are written into a cache."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parameters import random_params

from flaxlm.config import ModelConfig
from flaxlm.config import model as model_config
from flaxlm.nn import cache
from flaxlm.nn.cache import (
  MOST_WRITES,
  empty_cache,
  slot_in_ring,
  tokens_in_ring,
  write_slots,
)
from flaxlm.nn.models import build_model, init_cache

SIZES = dict(depth=3, width=16, num_heads=2, vocab_size=32, context=128, window=5)
KINDS = {
  "local": {},
  "alternating": {"layer_pattern": "LLG"},
  "sinks": {"layer_pattern": "LG", "sink_tokens": 2, "positions": "learned"},
}


@pytest.fixture
def small_rings(monkeypatch):
  """Rings small enough that a short text goes round them several times."""
  for module in (cache, model_config):
    monkeypatch.setattr(module, "MAX_NEW_IN_RING", 4)
  monkeypatch.setattr(model_config, "MAX_TAKEN_BACK", 3)
  monkeypatch.setattr(model_config, "RING_MULTIPLE", 1)


def model_of(name: str) -> tuple[Any, Any]:
  model = build_model(ModelConfig(**SIZES | KINDS[name]))
  return model, random_params(model, spread=0.4)


@pytest.mark.parametrize("name", KINDS)
def test_a_ring_answers_as_the_whole_text(small_rings, name):
  """Ragged chunks, padding that is written and never seen, then token by token."""
  model, params = model_of(name)
  tokens_BT = np.random.default_rng(0).integers(0, 32, (2, 60))
  full = np.asarray(model.apply({"params": params}, tokens_BT).value)
  apply = jax.jit(
    lambda tokens, cache, num_new: model.apply(
      {"params": params}, tokens, cache=cache, num_new_B=num_new
    )[:2]
  )
  state, done_B = init_cache(model, 2, 64), np.zeros(2, int)
  sizes = [kv[0].shape[2] for kv in state.layers]
  ring = KINDS[name].get("sink_tokens", 0) + 5 + 4 + 3 - 1
  assert sizes == [ring if kind == "L" else 64 for kind in model.cfg.layer_kinds()]
  rng = np.random.default_rng(1)
  while done_B.max() < 50:
    new_B = rng.integers(0, 5, 2)
    if rng.random() < 0.3:
      new_B = np.ones(2, int)
    width = 1 if new_B.max() == 1 and new_B.min() == 1 else 4
    chunk = np.full((2, width), 31)
    for row in range(2):
      chunk[row, : new_B[row]] = tokens_BT[row, done_B[row] : done_B[row] + new_B[row]]
    logits, state = apply(chunk, state, new_B)
    for row in range(2):
      expected = full[row, done_B[row] : done_B[row] + new_B[row]]
      np.testing.assert_allclose(logits[row, : new_B[row]], expected, atol=2e-5)
    done_B += new_B
    if rng.random() < 0.3:  # some of it is taken back
      back = rng.integers(0, 4, 2) * (done_B > 3)
      done_B -= back
      state = state._replace(lengths_B=jnp.asarray(done_B, jnp.int32))


def test_the_memory_of_a_local_layer_does_not_grow_with_the_text():
  cfg = ModelConfig(**SIZES | {"layer_pattern": "LG", "context": 10**6}).resolve()
  short, long = (
    jax.eval_shape(lambda slots=slots: empty_cache(cfg, 1, slots))
    for slots in (2000, 10**6)
  )
  assert [
    a[0].shape == b[0].shape for a, b in zip(short.layers, long.layers, strict=True)
  ] == [
    True,
    False,
    True,
  ]
  biased = dataclasses.replace(cfg, positions="alibi")
  assert biased.ring_slots is None


@pytest.mark.parametrize(("size", "sinks"), [(2, 0), (7, 0), (7, 3)])
def test_which_token_lies_where(size: int, sinks: int):
  """Against writing them one by one."""
  num_slots, held = size + sinks, {}
  slots = np.asarray(slot_in_ring(jnp.arange(40), num_slots, sinks))
  found = np.asarray(tokens_in_ring(jnp.arange(41), num_slots, sinks))
  for end in range(41):
    for slot in range(num_slots):
      if slot in held:
        assert found[end, slot] == held[slot]
      else:
        assert found[end, slot] >= end, "not seen yet"
    if end < 40:
      held[slots[end]] = end


@pytest.mark.parametrize("rows", [1, 3, MOST_WRITES + 1])
@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_rows_are_written_where_each_begins(dtype: str, new: int, rows: int):
  rng = np.random.default_rng(0)
  old, entries = (
    jnp.asarray(rng.normal(0, 9, (rows, 2, length, 4)), dtype) for length in (16, new)
  )
  first = jnp.asarray(rng.integers(0, 17 - new, rows), jnp.int32)
  expected = np.array(old)
  for row in range(rows):
    expected[row, :, first[row] : first[row] + new] = entries[row]
  np.testing.assert_array_equal(jax.jit(write_slots)(old, entries, first), expected)


@pytest.mark.parametrize("new", [1, 3])
def test_a_narrow_cache_is_not_widened_for_each_row(new: int):
  """XLA's CPU compiler did so once more for each row that it wrote."""
  old, entries = (jnp.ones((8, 2, length, 4), jnp.bfloat16) for length in (16, new))
  compiled = jax.jit(write_slots).lower(old, entries, jnp.zeros(8, jnp.int32)).compile()
  writes = re.findall(r"= (\w+)\S* dynamic-update-slice", compiled.as_text())
  assert writes == ["u16"] * (0 if new == 1 else 8)
