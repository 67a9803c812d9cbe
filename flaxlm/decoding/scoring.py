# SPDX-License-Identifier: Apache-2.0
"""How likely a model finds given texts: the log-likelihood of continuations, and of texts.

What is read and what is scored follows lm-evaluation-harness (Gao et al., 2021), so that
figures compare with those that others publish: blanks at the end of a context belong to its
continuation, a context that does not fit is cut from the left, and a long text is scored in
windows. Rows are grouped by length, so that all lengths share a few compiled programs, and
logits exist only for the tokens that are scored, a few at a time.

Likelihoods are those with which the model writes: among the ids that the tokenizer has.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxlm.decoding.completions import as_texts
from flaxlm.decoding.loading import Run
from flaxlm.decoding.prefill import (
  SMALLEST_BUCKET,
  bucket,
  check_ids,
  is_real_token,
  pad_rows,
)
from flaxlm.errors import ConfigError, NonFiniteError
from flaxlm.nn.base import LanguageModel, Source
from flaxlm.nn.vocabulary import mask_padding_ids
from flaxlm.sharding import batch_shards, on_host, use_mesh

# What one device holds at a time.
TOKENS_AT_A_TIME = 4096
LOGITS_AT_A_TIME = 2**26  # 256 MB in float32
PLACES_AT_A_TIME = SMALLEST_BUCKET  # places of a row whose logits exist at once


class Likelihood(NamedTuple):
  """How likely a continuation is, given its context."""

  logprob: float  # nats, summed over its tokens
  is_greedy: bool  # greedy decoding would write it
  num_tokens: int
  num_cut: int = 0  # tokens of the context that did not fit the model
  logprobs: tuple[float, ...] = ()  # of each token, if they were asked for


class TokenPair(NamedTuple):
  """A context and its continuation as ids; `source` is what an encoder-decoder reads, and
  its context what it has written so far."""

  context: tuple[int, ...]
  continuation: tuple[int, ...]
  source: tuple[int, ...] = ()


def score_continuations(
  run: Run,
  pairs: Sequence[tuple[str, str]],
  on_done: Callable[[int], None] = lambda _: None,
) -> list[Likelihood]:
  """The likelihood of each (context, continuation); an encoder-decoder reads the context.

  `on_done(n)` is called whenever n more pairs are scored. Raises `ConfigError` for an
  encoder, for a continuation without a token of its own and for one that the model's
  context does not hold, and `NonFiniteError` when logits are NaN.
  """
  return score_tokens(run, encode_pairs(run, pairs), on_done)


def encode_pairs(run: Run, pairs: Sequence[tuple[str, str]]) -> list[TokenPair]:
  """The tokens of each (context, continuation). Raises as `score_continuations` does."""
  check_scores(run)
  contexts = as_texts([context for context, _ in pairs], "context")
  continuations = as_texts([continuation for _, continuation in pairs], "continuation")
  return [encode_pair(run, *pair) for pair in zip(contexts, continuations, strict=True)]


def score_rolling(
  run: Run, rows: Sequence[Sequence[int]], each: bool = False
) -> list[Likelihood]:
  """The likelihood of whole texts as ids, each by itself, given the token that begins a
  text, with the `logprobs` of `each` id on request; a row without ids has likelihood 1.

  A text longer than the model's context is scored in windows, see `rolling_windows`.
  Raises as `score_continuations` does, and `ConfigError` for an encoder-decoder.
  """
  check_scores(run)
  if run.model.cfg.family == "encoder_decoder":
    raise ConfigError(
      f"{run.path} is an encoder-decoder: it scores no text by itself",
      "use the run of a decoder, or score continuations",
    )
  begin, most = run.tokenizer.bos_id, run.model.cfg.context
  windows = [[*rolling_windows(row, begin, most)] for row in rows]
  scored = iter(score_tokens(run, [*itertools.chain(*windows)], each=each))
  results = []
  for row, of_row in zip(rows, windows, strict=True):
    parts = [*itertools.islice(scored, len(of_row))]
    logprob, is_greedy = sum(x.logprob for x in parts), all(x.is_greedy for x in parts)
    logprobs = itertools.chain(*(part.logprobs for part in parts))
    results.append(Likelihood(logprob, is_greedy, len(row), logprobs=(*logprobs,)))
  return results


def rolling_windows(ids: Sequence[int], begin: int, most: int) -> Iterator[TokenPair]:
  """Windows of at most `most` read tokens that score every id once: `begin` comes before
  the first window, and the last one reads as many earlier ids as fit.

  They are those of lm-evaluation-harness's `get_rolling_token_windows`.
  """
  ids = (begin, *ids)
  for start in range(1, len(ids), most):
    end = min(start + most, len(ids))
    first = 0 if start == 1 else end - 1 - most
    yield TokenPair(tuple(ids[first:start]), tuple(ids[start:end]))


def check_scores(run: Run) -> None:
  """Raises `ConfigError` for a model that gives no probability to what follows."""
  if run.model.cfg.family == "encoder":
    raise ConfigError(
      f"{run.path} is an encoder: it does not say how likely a continuation is",
      "use the run of a decoder",
    )


def check_scored(run: Run, rows: Iterable[Sequence[int]]) -> None:
  """Raises `ConfigError` for an id that only the model has, which is never written."""
  highest = max(itertools.chain(*rows), default=0)
  if highest >= run.num_ids:
    raise ConfigError(
      f"token id {highest} has no probability: the tokenizer does not have it",
      f"score ids of 0 to {run.num_ids - 1}",
    )


def check_finite(logprobs: np.ndarray) -> None:
  """Raises `NonFiniteError` unless all are numbers."""
  if not np.isfinite(logprobs).all():
    raise NonFiniteError(
      "a log-likelihood is NaN or infinite", "the parameters are damaged"
    )


def encode_pair(run: Run, context: str, continuation: str) -> TokenPair:
  """The tokens of both, and nothing in between: a word is cut where the whole text is.

  Raises `ConfigError` if no token is the continuation's alone.
  """
  kept = context.rstrip()
  continuation, context = context[len(kept) :] + continuation, kept
  tokenizer = run.tokenizer
  if run.model.cfg.family == "encoder_decoder":
    source = tokenizer.framed(tokenizer.encode(context), "source")
    before, ids = tokenizer.framed([], "prompt"), tokenizer.encode(continuation)
    pair = TokenPair(tuple(before), tuple(ids), tuple(source))
  elif context:
    read = read_ids(run, context)
    whole = read_ids(run, context + continuation)
    pair = TokenPair(tuple(read), tuple(whole[len(read) :]))
  else:
    ids = tokenizer.encode(continuation)
    ids = ids if ids[:1] == [tokenizer.bos_id] else [tokenizer.bos_id, *ids]
    pair = TokenPair(tuple(ids[:1]), tuple(ids[1:]))
  if not pair.continuation:
    raise ConfigError(
      f"{continuation!r} has no token of its own after {context[-40:]!r}",
      "begin the continuation where a word begins",
    )
  return pair


def read_ids(run: Run, text: str) -> list[int]:
  """The ids that the model reads for a text: begun as in training, but only once."""
  ids = run.tokenizer.encode(text)
  begun = ids[:1] == [run.tokenizer.bos_id]
  return ids if begun else run.tokenizer.framed(ids, "prompt")


# -- Batches -------------------------------------------------------------------------------


class Row(NamedTuple):
  """What the model reads at once: the end of it is a continuation but for its last token,
  of which there may be several, as in a choice between A, B, C and D."""

  read: tuple[int, ...]
  source: tuple[int, ...]
  num_scored: int  # tokens of the continuation
  last: tuple[int, ...] = ()

  def continuation(self, last: int) -> tuple[int, ...]:
    return (*self.read[len(self.read) + 1 - self.num_scored :], last)


def score_tokens(
  run: Run,
  pairs: Sequence[TokenPair],
  on_done: Callable[[int], None] = lambda _: None,
  each: bool = False,
) -> list[Likelihood]:
  """The likelihood of each pair of ids, in their order, with the `logprobs` of `each` id on
  request. What is equal is computed once, and pairs that differ in their last token are
  read once."""
  cfg = run.model.cfg
  rows: dict[Row, dict[int, list[int]]] = {}  # the numbers of the pairs by their last token
  num_cut = []
  for number, pair in enumerate(pairs):
    cut = cut_to_fit(pair, cfg.context)
    num_cut.append(num_tokens(pair) - num_tokens(cut))
    *scored, last = cut.continuation
    row = Row((*cut.context, *scored), cut.source, len(cut.continuation))
    rows.setdefault(row, {}).setdefault(last, []).append(number)
  whole = {row._replace(last=(*numbers,)): numbers for row, numbers in rows.items()}
  check_ids([ids for row in whole for ids in row[:2] + row[3:] if ids], cfg.num_ids)
  check_scored(run, [pair.continuation for pair in pairs])
  results: list[Any] = [None] * len(pairs)
  shards = batch_shards(run.mesh.shape)
  for batch in batch_rows([*whole], shards, cfg.vocab_size):
    num_done = 0
    for row, scores in zip(batch, score_batch(run, batch, shards), strict=True):
      for numbers, score in zip(whole[row].values(), scores, strict=True):
        logprob, is_greedy, logprobs_C = score
        tokens = (*logprobs_C[: row.num_scored].tolist(),) if each else ()
        num_done += len(numbers)
        for number in numbers:
          results[number] = Likelihood(
            logprob, is_greedy, row.num_scored, num_cut[number], tokens
          )
    on_done(num_done)
  return results


def num_tokens(pair: TokenPair) -> int:
  return sum(map(len, pair))


def cut_to_fit(pair: TokenPair, most: int) -> TokenPair:
  """The pair without the first tokens of what is read, as far as it is too long; the last
  token is scored and not read. Raises `ConfigError` for a continuation that is too long."""
  size = len(pair.continuation)
  if size > most:
    raise ConfigError(
      f"a continuation of {size} tokens > model.context={most}", "shorten it"
    )
  return pair._replace(
    context=pair.context[-(most + 1 - size) :], source=pair.source[-most:]
  )


def batch_rows(rows: Sequence[Row], shards: int, vocab_size: int) -> Iterator[list[Row]]:
  """Batches of rows that have the same sizes when padded, longest first: what does not fit
  the memory shows at once."""

  def sizes(row: Row) -> tuple[int, int, int, int]:
    last = bucket(len(row.last), smallest=1)
    return (bucket(len(row.read)), bucket(len(row.source)), bucket(row.num_scored), last)

  places = LOGITS_AT_A_TIME // (PLACES_AT_A_TIME * vocab_size)
  ordered = sorted(rows, key=sizes, reverse=True)
  for (read, source, *_), group in itertools.groupby(ordered, sizes):
    most = max(1, min(TOKENS_AT_A_TIME // (read + source), places))
    most = shards << (most.bit_length() - 1)  # a power of two for each shard
    some = [*group]
    yield from (some[start : start + most] for start in range(0, len(some), most))


def score_batch(
  run: Run, batch: Sequence[Row], shards: int
) -> list[list[tuple[float, bool, np.ndarray]]]:
  """(log-likelihood, whether greedy, log-probability of each token (C,)) of the
  continuations. Raises `NonFiniteError`."""
  size = shards * bucket(-(-len(batch) // shards), smallest=1)
  tokens_BT, lengths_B = pad_rows([row.read for row in batch], size)
  num_last = bucket(max(len(row.last) for row in batch), smallest=1)
  columns = []  # K continuations of each row; those that it has not repeat its first
  for k in range(num_last):
    last = [row.last[k] if k < len(row.last) else row.last[0] for row in batch]
    continuations = [row.continuation(id_) for row, id_ in zip(batch, last, strict=True)]
    targets_BC, num_targets_B = pad_rows(continuations, size)
    columns.append(targets_BC)
  targets_BCK = np.stack(columns, axis=-1)
  source = None
  if run.model.cfg.family == "encoder_decoder":
    source_BS, source_lengths_B = pad_rows([row.source for row in batch], size)
    source = Source(source_BS, None, source_lengths_B)
  model = without_capacity(run.model)
  arrays = tokens_BT, lengths_B, targets_BCK, num_targets_B, source
  with use_mesh(run.mesh):
    found = likelihoods(model, run.params, jnp.int32(run.num_ids), *arrays)
  logprobs_BK, greedy_BK, logprobs_BCK = (on_host(x)[: len(batch)] for x in found)
  check_finite(logprobs_BK)
  logprobs_BKC = logprobs_BCK.swapaxes(1, 2)
  scores = zip(logprobs_BK.tolist(), greedy_BK.tolist(), logprobs_BKC, strict=True)
  return [
    [*zip(*of_row, strict=True)][: len(row.last)]
    for row, of_row in zip(batch, scores, strict=True)
  ]


def without_capacity(model: LanguageModel) -> LanguageModel:
  """The model whose experts serve every token, as in decoding: a row's padding would take
  a part of their capacity, and change its score."""
  moe = model.cfg.moe
  if moe.capacity_factor is None:
    return model
  moe = dataclasses.replace(moe, capacity_factor=None)
  return model.clone(cfg=dataclasses.replace(model.cfg, moe=moe))


@functools.partial(jax.jit, static_argnames="model")
def likelihoods(
  model: LanguageModel,
  params: Any,
  num_ids: jax.Array,
  tokens_BT: jax.Array,
  lengths_B: jax.Array,
  targets_BCK: jax.Array,
  num_targets_B: jax.Array,
  source: Source | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(log-likelihood (B, K) in nats, whether greedy (B, K), log-probability of each token
  (B, C, K)) of K continuations of each row, which differ in their last token only: the row
  ends with the others.

  Rows are right-padded. The target i of a row's n is what follows its token n - i from the
  end. A source has its rows' lengths in place of their segments.
  """
  options = {}
  segments_BT = is_real_token(tokens_BT, lengths_B).astype(jnp.int32)
  if source is not None:
    segments_BS = is_real_token(source.tokens_BS, source.segments_BS).astype(jnp.int32)
    options["source"] = source._replace(segments_BS=segments_BS)
  output = model.apply(
    {"params": params}, tokens_BT, None, segments_BT, method="hidden", **options
  )
  T, C = tokens_BT.shape[1], targets_BCK.shape[1]
  places_BC = (lengths_B - num_targets_B)[:, None] + jnp.arange(C)
  places_BC1 = jnp.clip(places_BC, 0, T - 1)[..., None]
  x_BCD = jnp.take_along_axis(output.value, places_BC1, axis=1)

  def score(logits_BXV: jax.Array, targets_BXK: jax.Array) -> tuple[jax.Array, jax.Array]:
    own_BXK = jnp.take_along_axis(logits_BXV, targets_BXK, axis=-1)
    logprobs_BXK = own_BXK - jax.nn.logsumexp(logits_BXV, axis=-1, keepdims=True)
    return logprobs_BXK, logits_BXV.argmax(-1, keepdims=True) == targets_BXK

  logprobs_BCK, hits_BCK = map_logits(score, model, params, num_ids, x_BCD, targets_BCK)
  scored_BC1 = is_real_token(targets_BCK, num_targets_B)[..., None]
  logprobs_BCK = jnp.where(scored_BC1, logprobs_BCK, 0.0)
  return logprobs_BCK.sum(1), (hits_BCK | ~scored_BC1).all(1), logprobs_BCK


def map_logits(
  function: Callable,
  model: LanguageModel,
  params: Any,
  num_ids: jax.Array,
  x_BCD: jax.Array,
  targets_BC: jax.Array,
) -> Any:
  """`function(logits (B, X, V), targets (B, X, ...))` of C places, a bucket, X at a time:
  the logits of all would not fit. Ids from `num_ids` on are masked."""
  B, C = x_BCD.shape[:2]
  assert C % PLACES_AT_A_TIME == 0, "a bucket has whole parts"

  def of_part(part: tuple[jax.Array, jax.Array]) -> Any:
    x_BXD, targets_BX = part
    logits_BXV = model.apply({"params": params}, x_BXD, method="logits").astype(jnp.float32)
    logits_BXV = mask_padding_ids(logits_BXV, num_ids)
    return function(logits_BXV, targets_BX)

  split = lambda x: x.reshape(B, -1, PLACES_AT_A_TIME, *x.shape[2:]).swapaxes(0, 1)
  joined = lambda x: x.swapaxes(0, 1).reshape(B, C, *x.shape[3:])
  return jax.tree.map(joined, jax.lax.map(of_part, (split(x_BCD), split(targets_BC))))
