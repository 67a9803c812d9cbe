# SPDX-License-Identifier: Apache-2.0
"""Laws of decoding: whatever reads from a cache gives what the full forward pass gives."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from flaxlm.decoding.engine import Engine
from flaxlm.decoding.generate import generate
from flaxlm.decoding.prefill import BLOCK_STEPS, Request, prefill_prompts
from flaxlm.decoding.prefix_store import PIECE, RowStore, has_rings
from flaxlm.decoding.requests import EngineOptions, EngineRequest
from flaxlm.decoding.sampling import SamplingSettings, stack_settings
from flaxlm.nn.base import LanguageModel, Source
from flaxlm.nn.models import init_cache
from flaxlm.verify.case import (
  ROUNDING,
  Case,
  Finding,
  Law,
  distance,
  does_not_apply,
  random_tokens,
)

NO_TEXT = "an encoder writes no text"
# All laws draw alike, so that they share their programs; what was drawn does not matter,
# only that it had the probability that the full forward pass gives it.
DRAWN = SamplingSettings(temperature=1.0, seed=1)
LONG = 640  # tokens, after which a ring has overwritten its first ones
# The tokenizer of these laws has fewer ids than the model: the others are never drawn.
FEWER_IDS = 40


# -- The cache -----------------------------------------------------------------------------


def cached(case: Case) -> Finding:
  """Ragged rows: each is prefilled to its own length, then fed on by ones and by threes."""
  if case.family == "encoder":
    return does_not_apply(NO_TEXT)
  tokens_BT, lengths_B = random_tokens(3, 15), np.array([2, 6, 4], np.int32)
  source = ragged_source(case, 3)
  full_BTV = case.logits(tokens_BT, source=source)
  prompts = np.where(np.arange(6) < lengths_B[:, None], tokens_BT[:, :6], 59)
  logits, prefilled = step(case, prompts, empty(case, 3, 20, source), lengths_B)
  errors = [
    distance(logits[row, :length], full_BTV[row, :length])
    for row, length in enumerate(lengths_B)
  ]
  for chunk in (1, 3):
    cache, ones_B = prefilled, np.full(3, chunk, np.int32)
    for start in range(0, 9, chunk):
      index = lengths_B[:, None] + start + np.arange(chunk)
      new_BT = np.take_along_axis(tokens_BT, index, 1)
      logits, cache = step(case, new_BT, cache, ones_B)
      expected = np.take_along_axis(full_BTV, index[..., None], 1)
      errors.append(distance(logits, expected))
  return Finding(max(errors))


def cache_length(case: Case) -> Finding:
  """The same tokens in a cache that they fill, and in one that is much longer."""
  if case.family == "encoder":
    return does_not_apply(NO_TEXT)
  if case.family == "rnn":
    return does_not_apply("the state of an RNN has one size")
  tokens_BT, source, counts_B = random_tokens(2, 7), case.source_of(2), np.full(2, 7)
  short, long = (
    step(case, tokens_BT, empty(case, 2, slots, source), counts_B)[0] for slots in (7, 45)
  )
  return Finding(distance(short, long))


def long_prompts(case: Case) -> Finding:
  """A prompt of several chunks, after which local layers' caches have overwritten their
  first tokens."""
  cfg = case.model_cfg
  if case.family not in ("decoder", "encoder_decoder") or not has_rings(cfg):
    return does_not_apply("no layer keeps a window only")
  if cfg.context < LONG + 24:
    return does_not_apply(f"model.context is below {LONG + 24}")
  tokens_BT, source = random_tokens(1, LONG + 8), case.source_of(1)
  prompt = tokens_BT[0, :LONG].tolist()
  sources = None if source is None else source.tokens_BS.tolist()
  request = Request([prompt], 16, cfg.num_ids, sources)
  logits_BV, cache = prefill_prompts(case.model, case.params, request, None)
  full_TV = case.logits(tokens_BT, source=source)[0]
  errors = [distance(np.asarray(logits_BV)[0, : cfg.num_ids], full_TV[LONG - 1])]
  for at in range(LONG, LONG + 8):
    logits, cache = step(case, tokens_BT[:, at : at + 1], cache, np.ones(1, np.int32))
    errors.append(distance(logits[0, 0], full_TV[at]))
  return Finding(max(errors))


def ragged_source(case: Case, rows: int) -> Source | None:
  source = case.source_of(rows)
  if source is None:
    return None
  is_text_BS = np.arange(9) < np.array([3, 9, 5])[:rows, None]
  return source._replace(segments_BS=is_text_BS.astype(np.int32))


def empty(case: Case, rows: int, slots: int, source: Source | None) -> Any:
  """A cache of nothing but the source, if there is one."""
  if source is None:
    return init_cache(case.model, rows, slots)
  return _start(case.model, case.params, source, slots)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _start(model: LanguageModel, params: Any, source: Source, slots: int) -> Any:
  return model.apply({"params": params}, source, slots, method="start")


def step(
  case: Case, tokens_BT: np.ndarray, cache: Any, counts_B: np.ndarray
) -> tuple[np.ndarray, Any]:
  """(logits of the new tokens, cache) after the first `counts_B` of each row's tokens."""
  logits, cache = _step(case.model, case.params, tokens_BT, cache, counts_B)
  return np.asarray(logits)[..., : case.model_cfg.num_ids], cache


@functools.partial(jax.jit, static_argnums=0)
def _step(
  model: LanguageModel, params: Any, tokens_BT: jax.Array, cache: Any, counts_B: jax.Array
) -> Any:
  output = model.apply({"params": params}, tokens_BT, cache=cache, num_new_B=counts_B)
  return output.value, output.cache


# -- What is drawn -------------------------------------------------------------------------


def generated(case: Case) -> Finding:
  """The text of ragged prompts has the log-probabilities of the full pass."""
  if case.family == "encoder":
    return does_not_apply(NO_TEXT)
  return Finding(
    largest_surprise(case, continued(case, case.params, case.model_cfg.num_ids))
  )


def in_company(case: Case) -> Finding:
  """An engine of two rows with requests that come and go: each gets its own text."""
  if case.family == "encoder":
    return does_not_apply(NO_TEXT)
  rows = served(case, case.params, case.model_cfg.num_ids)
  return Finding(largest_surprise(case, rows))


def prefixes(case: Case) -> Finding:
  """Prompts that begin, or go on, like earlier ones: what is kept of these is only used
  where all tokens up to there are the same."""
  if case.family not in ("decoder", "rnn"):
    return does_not_apply("only decoders and RNNs keep prefixes")
  least = 2 * PIECE + 24
  if case.model_cfg.context < least:
    return does_not_apply(f"model.context is below {least}")
  ids, rows = case.model_cfg.num_ids, []
  first, second, third = (random_tokens(PIECE, seed=40 + n).tolist() for n in range(3))
  ends = [random_tokens(n, seed=50 + n).tolist() for n in (3, 5, 2, 4)]
  options = EngineOptions(rows=1, prefix_bytes=2**24)
  engine = Engine(case.model, case.params, ids, options=options)
  # The last two have a second piece that was read after another first one.
  texts = [[*first, *second], [*first, *second], [*third, *first], [*third, *second]]
  for text, end in zip(texts, ends, strict=True):
    request = EngineRequest(prompt=text + end, max_new_tokens=4, settings=DRAWN)
    rows += answers(engine, [request])
  if not engine.counters.cached_tokens:
    return Finding(0.0, details=["no prefix is ever found"])
  past, text, num_cached = RowStore(case.model_cfg), first[:48], 0
  options = EngineOptions(rows=1, most_read=None, whole_rows=True)
  for number, end in enumerate(ends):  # a chat: each turn goes on from what was written
    engine = Engine(case.model, case.params, ids, options=options, past=past)
    # The first answer is as long as what was decoded: its last token is in no cache yet.
    count = BLOCK_STEPS + 1 if number == 0 else 3
    request = EngineRequest(prompt=text + end, max_new_tokens=count, settings=DRAWN)
    rows += answers(engine, [request])
    num_cached += engine.counters.cached_tokens
    text = [*rows[-1][0], *rows[-1][1]]
    if number == 1:  # the second question is asked again, with other words
      text = text[:-6]
  if not num_cached:
    return Finding(0.0, details=["no turn of a chat goes on from the one before"])
  return Finding(largest_surprise(case, rows))


def never_drawn(case: Case) -> Finding:
  """Padding of the vocabulary has huge parameters here, and neither it nor any id that the
  tokenizer has not is drawn, at a high temperature."""
  cfg = case.model_cfg
  params = jax.tree_util.tree_map_with_path(
    functools.partial(with_garbage, cfg.num_ids, cfg.vocab_size), case.params
  )
  tokens_BT, source = random_tokens(8, 24), case.source_of(8)
  logits_BTV = case.all_logits(tokens_BT, source=source, params=params)
  error = float(jax.nn.softmax(logits_BTV, -1)[..., cfg.num_ids :].sum(-1).max())
  clean_BTV = case.logits(tokens_BT, source=source)
  error = max(error, distance(logits_BTV[..., : cfg.num_ids], clean_BTV))
  if case.family == "encoder":
    return Finding(error)
  rows = continued(case, params, FEWER_IDS) + served(case, params, FEWER_IDS)
  tokens = [token for row in rows for token in row[1]]
  wrong = sum(token >= FEWER_IDS for token in tokens)
  details = [f"{wrong} of {len(tokens)} tokens that were drawn stand for nothing"]
  return Finding(error, details=details if wrong else ())


def with_garbage(num_ids: int, size: int, path: Any, x: jax.Array) -> Any:
  """A parameter with large numbers wherever it is for padding ids."""
  names = [key.key for key in path]
  if names[0] not in ("embedding", "head", "head_bias"):
    return x
  dim = x.shape.index(size)
  is_padding = np.arange(size) >= num_ids
  shape = [size if n == dim else 1 for n in range(x.ndim)]
  return np.where(is_padding.reshape(shape), np.float32(50), x)


def texts_read(case: Case, count: int) -> list[list[int]] | None:
  """Sources of different lengths, for models that read one."""
  if case.family != "encoder_decoder":
    return None
  return [random_tokens(3 + 2 * n, seed=60 + n).tolist() for n in range(count)]


# A prompt, the tokens drawn after it, their log-probabilities, and what was read beside it.
Row = tuple[Sequence[int], list[int], list[float], Any]


def continued(case: Case, params: Any, num_ids: int) -> list[Row]:
  """What `generate` writes after ragged prompts."""
  prompts = [random_tokens(n, seed=20 + n).tolist() for n in (1, 5, 11)]
  return draw(case, params, Request(prompts, 20, num_ids, texts_read(case, len(prompts))))


def draw(case: Case, params: Any, request: Request) -> list[Row]:
  sampling = stack_settings([DRAWN] * len(request.prompts))
  blocks = [*generate(case.model, params, request, sampling)]
  tokens_BT = np.concatenate([block.tokens_BT for block in blocks], 1)
  logprobs_BT = np.concatenate([block.logprobs_BT for block in blocks], 1)
  rows = zip(request.prompts, tokens_BT.tolist(), logprobs_BT.tolist(), strict=True)
  read = request.sources
  return [(*row, None if read is None else read[n]) for n, row in enumerate(rows)]


def served(case: Case, params: Any, num_ids: int) -> list[Row]:
  """What an engine of two rows writes for five requests."""
  sizes = ((3, 18), (1, 5), (40, 9), (7, 1), (12, 12))
  sources = texts_read(case, len(sizes))
  engine = Engine(case.model, params, num_ids, options=EngineOptions(rows=2))
  requests = [
    EngineRequest(
      prompt=random_tokens(length, seed=30 + length).tolist(),
      max_new_tokens=count,
      settings=DRAWN,
      source=None if sources is None else sources[n],
    )
    for n, (length, count) in enumerate(sizes)
  ]
  return answers(engine, requests)


def answers(engine: Engine, requests: Sequence[EngineRequest]) -> list[Row]:
  """What an engine writes for each request."""
  numbers = [engine.submit(request) for request in requests]
  found: dict[int, tuple] = {number: ([], []) for number in numbers}
  while not engine.is_idle:
    for event in engine.step():
      if event.error is not None:
        raise event.error
      found[event.number][0].extend(event.tokens)
      found[event.number][1].extend(event.logprobs)
  return [
    (request.prompt, *found[number], request.source)
    for number, request in zip(numbers, requests, strict=True)
  ]


def largest_surprise(case: Case, rows: Iterable[Row]) -> float:
  """How far the log-probabilities of what was drawn are from those of the full forward
  pass, in nats."""
  rows = [*rows]
  texts = [[*prompt, *tokens] for prompt, tokens, _, _ in rows]
  length = 64 * -(-max(map(len, texts)) // 64)  # few programs
  tokens_BT = np.array([text + [1] * (length - len(text)) for text in texts])
  source = None
  if rows[0][3] is not None:
    read = [row[3] for row in rows]
    size = max(map(len, read))
    tokens_BS = np.array([text + [0] * (size - len(text)) for text in read])
    is_text_BS = np.arange(size) < np.array([*map(len, read)])[:, None]
    source = Source(tokens_BS, segments_BS=is_text_BS.astype(np.int32))
  logits_BTV = case.logits(tokens_BT, source=source).astype(np.float64)
  logprobs_BTV = logits_BTV - np.log(np.exp(logits_BTV).sum(-1, keepdims=True))
  worst = 0.0
  for (prompt, tokens, logprobs, _), logprobs_TV in zip(rows, logprobs_BTV, strict=True):
    own_TV = logprobs_TV[len(prompt) - 1 : len(prompt) - 1 + len(tokens)]
    chosen_T = own_TV[np.arange(len(tokens)), tokens]
    worst = max(worst, float(np.abs(chosen_T - logprobs).max()))
  return worst


LAWS = (
  Law("cached", "decoding with a cache is the full pass", cached, 1e-4, ROUNDING),
  Law("cache length", "the cache's length changes nothing", cache_length, 1e-4, ROUNDING),
  Law("long prompts", "chunks and rings are the full pass", long_prompts, 1e-3, ROUNDING),
  Law("generated", "what is drawn has the full pass's share", generated, 1e-3, ROUNDING),
  Law("in company", "an engine's answers are those alone", in_company, 1e-3, ROUNDING),
  Law("prefixes", "what is kept of a prefix is its own", prefixes, 1e-3, ROUNDING),
  Law("never drawn", "ids without a token have no share", never_drawn, 1e-4, ROUNDING),
)
