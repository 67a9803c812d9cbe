# SPDX-License-Identifier: Apache-2.0
"""Decoding: caches, other rows, padding, devices and buckets change no result."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from conftest import slow_but
from jax.sharding import Mesh

from flaxlm.config import ModelConfig
from flaxlm.decoding.generate import (
  DecodeState,
  StaticSampling,
  decode_block,
  generate,
  sample_step,
)
from flaxlm.decoding.prefill import (
  BLOCK_STEPS,
  SMALLEST_BUCKET,
  Request,
  bucket,
  prefill_chunk,
)
from flaxlm.decoding.sampling import Sampling, make_sampling
from flaxlm.errors import ConfigError, NonFiniteError
from flaxlm.nn.base import LanguageModel
from flaxlm.nn.models import abstract_params, build_model, init_cache
from flaxlm.sharding import make_mesh, mesh_for

SIZES = dict(depth=2, width=16, num_heads=4, vocab_size=64, context=64)
ARCHITECTURES = {
  "gqa": ModelConfig(num_kv_heads=2, **SIZES),
  "window, mqa, untied": ModelConfig(
    num_kv_heads=1, window=5, tied_embeddings=False, **SIZES
  ),
  "gpt2": ModelConfig(
    **(SIZES | dict(context=40)),  # less than the bucket of its cache
    positions="learned",
    norm="layernorm",
    activation="gelu_tanh",
    gated=False,
    biased=True,
  ),
  "2017": ModelConfig(
    positions="sinusoidal", norm="layernorm", norm_placement="post", gated=False, **SIZES
  ),
}
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [12, 13]]
NUM_NEW = 1 + BLOCK_STEPS + 3  # the prefill's token, a block, and a part of the next


@functools.cache
def model_of(name: str) -> tuple[LanguageModel, Any]:
  """A model, and parameters so large that its choices vary and are never close."""
  model = build_model(ARCHITECTURES[name])
  rng = np.random.default_rng(0)
  abstract = abstract_params(
    model, jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
  )

  def random(path: tuple, x: jax.ShapeDtypeStruct) -> np.ndarray:
    # A large bias of the last norm would make one token win always.
    mean, spread = {"scale": (1, 0.2), "bias": (0, 0.05)}.get(path[-1].key, (0, 0.4))
    return (mean + spread * rng.normal(size=x.shape)).astype(np.float32)

  return model, jax.tree_util.tree_map_with_path(random, abstract)


@functools.cache
def forward(model: LanguageModel) -> Any:
  return jax.jit(lambda params, tokens_BT: model.apply({"params": params}, tokens_BT)[0])


def full_logits(
  model: LanguageModel, params: Any, rows: Sequence[Sequence[int]]
) -> list[np.ndarray]:
  """Logits (T, V) of each row from one pass over its whole text, without any cache."""
  tokens_BT = np.zeros((4, model.cfg.context), np.int32)
  for row, tokens in enumerate(rows):
    tokens_BT[row, : len(tokens)] = tokens
  logits_BTV = np.asarray(forward(model)(params, tokens_BT), float)
  return [logits_BTV[row, : len(tokens)] for row, tokens in enumerate(rows)]


def run(
  model: LanguageModel,
  params: Any,
  prompts: Sequence[Sequence[int]],
  sampling: Sampling,
  num_new: int = NUM_NEW,
  num_ids: int = 64,
  mesh: Mesh | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """All tokens and log-probabilities, (B, T) each."""
  request = Request(prompts, num_new, num_ids)
  blocks = list(generate(model, params, request, sampling, mesh))
  tokens_BT = np.concatenate([block.tokens_BT for block in blocks], 1)
  logprobs_BT = np.concatenate([block.logprobs_BT for block in blocks], 1)
  assert tokens_BT.shape == logprobs_BT.shape == (len(prompts), num_new)
  return tokens_BT, logprobs_BT


def greedy(rows: int) -> Sampling:
  return make_sampling(rows, 0.0)


def take(sampling: Sampling, rows: Sequence[int]) -> Sampling:
  return sampling.map_rows(lambda rule: np.asarray(rule)[np.asarray(rows)])


# -- The cache changes nothing -------------------------------------------------------------


@pytest.mark.parametrize("name", slow_but(["gqa", "window, mqa, untied"], ARCHITECTURES))
def test_cached_decoding_is_the_full_forward_pass(name: str):
  """At every step of a ragged batch: greedy = its argmax, and all scores are its scores."""
  model, params = model_of(name)
  for sampling in (greedy(4), make_sampling(4, 1.0)):
    tokens_BT, logprobs_BT = run(model, params, PROMPTS, sampling)
    assert len({tuple(row) for row in tokens_BT}) == 4  # the rows do differ
    texts = [[*p, *row] for p, row in zip(PROMPTS, tokens_BT.tolist(), strict=True)]
    for row, logits_TV in enumerate(full_logits(model, params, texts)):
      logits_TV = logits_TV[-1 - NUM_NEW : -1]
      if sampling.temperature_B[row] == 0:
        assert tokens_BT[row].tolist() == logits_TV.argmax(-1).tolist()
      p_TV = np.stack([references.softmax(logits_V) for logits_V in logits_TV])
      p_T = np.take_along_axis(p_TV, tokens_BT[row][:, None], -1)[:, 0]
      np.testing.assert_allclose(logprobs_BT[row], np.log(p_T), atol=1e-4)


def test_decoding_agrees_with_the_papers():
  """One row against the float64 numpy reference, which has no cache at all."""
  model, params = model_of("gqa")
  (tokens_T,), (logprobs_T,) = run(model, params, [PROMPTS[2]], greedy(1))
  whole = [*PROMPTS[2], *tokens_T]
  logits_BTV = references.decoder(params, model.cfg, [whole])
  for step, token in enumerate(tokens_T):
    logits_V = logits_BTV[0, len(PROMPTS[2]) - 1 + step]
    assert token == np.argmax(logits_V)
    log_p = np.log(references.softmax(logits_V)[token])
    np.testing.assert_allclose(logprobs_T[step], log_p, atol=1e-4)


def test_scores_do_not_depend_on_how_much_is_asked_for():
  """A longer answer, with a larger cache, begins with the shorter one."""
  model, params = model_of("gqa")
  sampling = make_sampling(4, 1.0, seed=3)
  long_BT, _ = run(model, params, PROMPTS, sampling, 57)
  short_BT, _ = run(model, params, PROMPTS, sampling, NUM_NEW)
  assert long_BT[:, :NUM_NEW].tolist() == short_BT.tolist()
  one_BT, _ = run(model, params, PROMPTS, sampling, 1)
  assert one_BT.tolist() == short_BT[:, :1].tolist()


def test_going_on_from_an_answer_gives_the_same_answer():
  """The last tokens of the prompt may as well have been generated."""
  model, params = model_of("gqa")
  sampling = make_sampling(4, 1.0, seed=5)
  tokens_BT, _ = run(model, params, PROMPTS, sampling)
  longer = [[*p, *row[:6].tolist()] for p, row in zip(PROMPTS, tokens_BT, strict=True)]
  rest_BT, _ = run(model, params, longer, sampling, NUM_NEW - 6)
  assert rest_BT.tolist() == tokens_BT[:, 6:].tolist()


# -- A row is its own ----------------------------------------------------------------------


def test_a_row_alone_is_the_row_in_a_batch_in_any_order():
  model, params = model_of("gqa")
  sampling = make_sampling(4, 1.0, seed=17)
  together_BT, logprobs_BT = run(model, params, PROMPTS, sampling)
  assert len({tuple(row) for row in together_BT}) == 4
  order = [2, 0, 3, 1]
  shuffled_BT, _ = run(
    model, params, [PROMPTS[row] for row in order], take(sampling, order)
  )
  assert shuffled_BT.tolist() == together_BT[order].tolist()
  for row, prompt in enumerate(PROMPTS):
    alone_BT, alone_logprobs_BT = run(model, params, [prompt], take(sampling, [row]))
    assert alone_BT[0].tolist() == together_BT[row].tolist()
    np.testing.assert_allclose(alone_logprobs_BT[0], logprobs_BT[row], atol=1e-4)


def test_rows_that_fill_up_a_batch_are_not_seen():
  """Three prompts run as four rows; the fourth belongs to no prompt."""
  model, params = model_of("gqa")
  sampling = make_sampling(4, 1.0, seed=1)
  four_BT, _ = run(model, params, PROMPTS, sampling)
  three_BT, _ = run(model, params, PROMPTS[:3], take(sampling, [0, 1, 2]))
  assert three_BT.tolist() == four_BT[:3].tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
  ("rules", "sizes"),
  [
    ({"temperature": 0.0}, dict(data=2, fsdp=2, tensor=2)),
    ({"temperature": 1.0, "seed": 9}, dict(fsdp=2, tensor=4)),  # more than kv heads
  ],
)
def test_on_a_mesh_as_on_one_device(rules: dict[str, Any], sizes: dict[str, int]):
  model, params = model_of("gqa")
  mesh = mesh_for(make_mesh(sizes), model.cfg)
  shardings = jax.tree.map(lambda x: x.sharding, abstract_params(model, mesh))
  sharded = jax.device_put(params, shardings)
  sampling = make_sampling(3, **rules)
  one_BT, logprobs_BT = run(model, params, PROMPTS[:3], sampling)
  all_BT, all_logprobs_BT = run(model, sharded, PROMPTS[:3], sampling, mesh=mesh)
  assert all_BT.tolist() == one_BT.tolist()
  np.testing.assert_allclose(all_logprobs_BT, logprobs_BT, atol=1e-4)
  assert jax.sharding.get_abstract_mesh().empty  # nothing leaks out of the generator


# -- Ids -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", [{"temperature": 0.0}, {"temperature": 5.0, "top_k": 60}])
def test_ids_that_only_pad_the_vocabulary_are_never_drawn(rules: dict[str, Any]):
  """Nor do they take part of the probability."""
  model, params = model_of("gqa")
  sampling = make_sampling(4, **rules)
  every_BT, _ = run(model, params, PROMPTS, sampling)
  assert (every_BT >= 13).any()  # or this test would say nothing
  tokens_BT, logprobs_BT = run(model, params, PROMPTS, sampling, num_ids=13)
  assert tokens_BT.max() < 13
  (logits_TV,) = full_logits(model, params, [PROMPTS[2]])
  p_V = references.softmax(logits_TV[-1, :13])
  np.testing.assert_allclose(logprobs_BT[2, 0], np.log(p_V[tokens_BT[2, 0]]), atol=1e-4)


# -- What is compiled ----------------------------------------------------------------------


def test_requests_of_many_lengths_share_the_compiled_programs():
  model, params = model_of("gqa")
  run(model, params, PROMPTS, make_sampling(4, 0.7), SMALLEST_BUCKET - 8)
  before = prefill_chunk._cache_size(), decode_block._cache_size()
  for length in (1, 5, 8):
    for rules in ({"temperature": 0.0}, {"temperature": 1.3, "seed": length}):
      prompts = [[token] * length for token in (1, 2, 3, 4)]
      run(model, params, prompts, make_sampling(4, **rules), SMALLEST_BUCKET - 8)
  assert (prefill_chunk._cache_size(), decode_block._cache_size()) == before


@pytest.mark.parametrize("size", [1, 2, 31, 32, 33, 64, 65, 1000])
def test_a_bucket_is_the_next_power_of_two(size: int):
  assert bucket(size) >= max(size, SMALLEST_BUCKET)
  assert bucket(size).bit_count() == 1
  assert bucket(size) == SMALLEST_BUCKET or bucket(size) < 2 * size
  assert bucket(size, smallest=1) < 2 * size


def test_the_cache_is_donated():
  """An old cache would double the memory of a long conversation."""
  model, params = model_of("gqa")
  sampling, ids = greedy(4), jnp.int32(64)
  tokens_BT = np.zeros((4, SMALLEST_BUCKET), np.int32)
  cache = init_cache(model, 4, SMALLEST_BUCKET)
  num_new_B, last_BD = np.ones(4, np.int32), np.zeros((4, 16), np.float32)
  _, read = prefill_chunk(model, params, tokens_BT, num_new_B, cache, last_BD)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(cache))
  state = DecodeState(read, jnp.zeros(4, jnp.int32), None)
  state, _ = sample_step(jnp.zeros((4, 64)), state, sampling, ids, StaticSampling())
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(read))
  again, _ = decode_block(model, params, state, sampling, ids, StaticSampling())
  assert isinstance(again, DecodeState)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(again))
  assert again.cache.lengths_B.tolist() == [1 + BLOCK_STEPS] * 4


def test_the_caller_who_stops_asking_pays_for_no_more():
  """Blocks are computed when they are asked for: the first needs one pass alone."""
  model, params = model_of("gqa")
  blocks = generate(model, params, Request(PROMPTS, 40, 64), greedy(4))
  assert next(blocks).tokens_BT.shape == (4, 1)
  assert next(blocks).tokens_BT.shape == (4, BLOCK_STEPS)
  blocks.close()
  assert list(blocks) == []


# -- Mistakes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("prompts", "num_new", "complaint"),
  [
    ([[1] * 60], 5, "prompt of 60 tokens + 5 new > model.context=64"),
    ([[1], [1] * 65], 1, "prompt of 65 tokens"),
    ([[1]], 64, "prompt of 1 tokens + 64 new"),
    ([[]], 4, "a prompt has no tokens"),
    ([[1], []], 4, "a prompt has no tokens"),
    ([], 4, "a prompt has no tokens"),
    ([[1]], 0, "max-new-tokens is 0"),
    ([[1]], -3, "max-new-tokens is -3"),
    ([[1, 64]], 4, "64"),
    ([[1], [2, -1]], 4, "-1"),
  ],
)
def test_what_does_not_fit_is_refused(prompts: list, num_new: int, complaint: str):
  model, params = model_of("gqa")
  with pytest.raises(ConfigError) as caught:
    next(generate(model, params, Request(prompts, num_new, 64), greedy(len(prompts))))
  assert complaint in caught.value.cause


@pytest.mark.parametrize("name", ["gqa", "gpt2"])
def test_the_context_can_be_used_to_its_last_token(name: str):
  """Though a cache of blocks and buckets is larger than the context."""
  model, params = model_of(name)
  prompts = [[token] for token in (1, 2, 3, 4)]
  tokens_BT, _ = run(model, params, prompts, greedy(4), model.cfg.context - 1)
  texts = [[*p, *row] for p, row in zip(prompts, tokens_BT.tolist(), strict=True)]
  for row, logits_TV in enumerate(full_logits(model, params, texts)):
    assert logits_TV[:-1].argmax(-1).tolist() == tokens_BT[row].tolist()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("rules", [{"temperature": 0.0}, {"temperature": 1.0}])
def test_damaged_parameters_stop_the_decoding(value: float, rules: dict[str, Any]):
  model, params = model_of("gqa")
  broken = jax.tree.map(np.copy, params)
  broken["final_norm"]["scale"][3] = value
  with pytest.raises(NonFiniteError, match="the logits of row 0 are NaN or infinite"):
    run(model, broken, PROMPTS, make_sampling(4, **rules))


def test_one_damaged_row_is_named():
  """One prompt has a token whose vector is NaN; the other prompts are fine."""
  model, params = model_of("window, mqa, untied")  # tied, every row would have seen it
  broken = jax.tree.map(np.copy, params)
  broken["embedding"]["table"][8] = np.nan
  with pytest.raises(NonFiniteError, match="row 2"):
    run(model, broken, PROMPTS, greedy(4), 1)
