# SPDX-License-Identifier: Apache-2.0
"""The tokens of a text, and how likely each of them is to the model."""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxlm.chat.templates import Chat, Talk
from flaxlm.config import OBJECTIVES, ResolvedModel
from flaxlm.data.conversations import lessons, to_talk
from flaxlm.data.preferences import to_pair
from flaxlm.data.records import read_records
from flaxlm.decoding.encoding import check_has_head
from flaxlm.decoding.loading import Run
from flaxlm.errors import ConfigError
from flaxlm.look.pieces import Reading, apply_to_row, complete_reading, describe
from flaxlm.look.view import View
from flaxlm.nn.base import LanguageModel
from flaxlm.tokenizers import AnyTokenizer

NUM_BEST = 5
ROWS_AT_A_TIME = 32

ASKED = {
  "decoder": "given the tokens before it",
  "rnn": "given the tokens before it",
  "encoder": "given all others, with it masked",
  "encoder_decoder": "given the source and the tokens before it",
}


class Scores(NamedTuple):
  """The model's scores at each place: of the token there, and of the likeliest ones."""

  logprobs_T: Any  # nats
  ranks_T: Any  # 1 = the likeliest
  entropies_T: Any  # nats
  best_ids_TC: Any
  best_logprobs_TC: Any


def look_tokens(run: Run, reading: Reading, most: int) -> View:
  """The tokens of one text, each with its probability and the likeliest ones."""
  family, tokenizer = run.cfg.model.family, run.tokenizer
  check_has_head(run)
  ids, cuts = complete_reading(run, reading, most)
  if family == "encoder":
    scores = score_masked(run, ids)
  else:
    scores = score_following(run, ids, reading.source_ids)
  if not scores:
    cuts = [*cuts, "The tokenizer has no mask, so the model gives no probabilities."]
  tokens: list[dict[str, Any]] = [piece._asdict() for piece in describe(tokenizer, ids)]
  after = scores.pop(len(ids), None)
  for at, score in scores.items():
    tokens[at] |= to_entry(run, score, known=ids[at] != tokenizer.mask_id)
  num_words = len(b"".join(map(tokenizer.bytes_of, ids)).split())
  size = bytes_of_text(run, reading, ids)
  figures = text_figures(tokens, size, num_words) | {"tokens": tokens}
  if reading.weights is not None:
    figures |= loss_figures(tokens, reading.weights)
  if after is not None:
    figures["after"] = to_entry(run, after, known=False)
  figures["source"] = [p._asdict() for p in describe(tokenizer, reading.source_ids or [])]
  num_ids = run.model.cfg.num_ids
  notes = [
    f"{run.path} at step {run.step}, model.family={family}: each token's probability is "
    f"{ASKED[family]}. A random guess among all {num_ids:,} ids would cost "
    f"{math.log2(num_ids):.1f} bits.",
  ]
  title = f"A text as {run.cfg.name} reads it"
  return View("tokens", title, cuts, notes, figures, {})


def read_chat(
  cfg: ResolvedModel,
  tokenizer: AnyTokenizer,
  chat: Chat,
  file: Path,
  number: int,
  most: int,
  rejected: bool = False,
) -> Reading:
  """The conversation that is the `number`-th record of a file, from 1, as it is learnt; of
  a preference the one that was chosen, or `rejected`.

  Raises `ConfigError` if there is none, or for a family that learns none, and `DataError`
  for what is no conversation.
  """
  if OBJECTIVES[cfg.family] != "next_token":
    raise ConfigError(f"model.family={cfg.family} learns no chat", "give --text")
  talk = read_talk(file, number, rejected)
  texts = [*lessons([talk], chat, tokenizer)]
  ids, weights = texts[-1].ids_T.tolist(), texts[-1].weights_T.tolist()
  cuts = []
  if len(texts) > 1:
    cuts.append(f"The conversation is learnt in {len(texts)} texts: this is the last.")
  most = min(most, cfg.context)
  if len(ids) > most:
    cuts.append(f"The text has {len(ids)} tokens, of which the first {most}.")
  return Reading(ids[:most], None, cuts, weights[:most])


def read_talk(file: Path, number: int, rejected: bool) -> Talk:
  """The conversation, or one of the two, of a record; see `read_chat`."""
  talks = next(itertools.islice(read_either(file), number - 1, None), None)
  if talks is None:
    raise ConfigError(f"{file} has no record {number}", "--record counts from 1")
  if rejected and len(talks) == 1:
    raise ConfigError(f"{talks[0].where} has no rejected answer", "leave out --rejected")
  return talks[rejected]


def read_either(file: Path) -> Iterator[Sequence[Talk]]:
  """The conversation of each record, or both of those that are preferences."""
  for record in read_records(file):
    where = record.at(file)
    is_pair = "rejected" in record.fields
    yield to_pair(record, where) if is_pair else [to_talk(record, where)]


def loss_figures(tokens: list[dict[str, Any]], weights: Sequence[int]) -> dict[str, Any]:
  """Marks what carries loss; how many tokens that is, and what they cost on average."""
  for token, weight in zip(tokens, weights, strict=True):
    token["loss"] = bool(weight)
  bits = [token["bits"] for token in tokens if token["loss"]]
  loss = math.log(2) * sum(bits) / len(bits) if bits else None
  return {"num_learnt": len(bits), "loss": loss}


def bytes_of_text(run: Run, reading: Reading, ids: Sequence[int]) -> int:
  """The bytes that a row's tokens stand for: those of special tokens too, if the text
  itself named them, for they are scored."""
  if reading.ids is None or run.cfg.model.family == "encoder":
    return sum(len(run.tokenizer.bytes_of(id_)) for id_ in ids)
  is_framed = reading.weights is None  # a template writes what is before a conversation
  num_before = len(run.tokenizer.framed([0], "prompt")) - 1 if is_framed else 0
  return int(run.tokenizer.token_bytes()[list(ids[num_before:])].sum())


def text_figures(
  tokens: Sequence[dict[str, Any]], num_bytes: int, num_words: int
) -> dict[str, Any]:
  """The size of the whole text, and its surprisal at the places that were scored. A word is
  what stands between blanks."""
  num_tokens = sum(not token["special"] for token in tokens)
  asked = [token["bits"] for token in tokens if "bits" in token]
  figures = {
    "num_tokens": num_tokens,
    "num_bytes": num_bytes,
    "num_words": num_words,
    "bytes_per_token": num_bytes / num_tokens if num_tokens else None,
    "tokens_per_word": num_tokens / num_words if num_words else None,
  }
  if asked:
    figures |= {"bits": sum(asked), "bits_per_token": sum(asked) / len(asked)}
    figures["bits_per_byte"] = sum(asked) / num_bytes if num_bytes else None
    figures["perplexity"] = 2 ** min(sum(asked) / len(asked), 1000)
  return figures


def to_entry(run: Run, score: Scores, known: bool) -> dict[str, Any]:
  """A place's scores for the page; `known`: a token stands there, not a mask or nothing."""
  best = describe(run.tokenizer, score.best_ids_TC)
  chances = np.exp(score.best_logprobs_TC.astype(np.float64)).tolist()
  entry: dict[str, Any] = {
    "entropy": float(score.entropies_T) / math.log(2),
    "best": [
      {"id": piece.id, "label": piece.label, "chance": chance}
      for piece, chance in zip(best, chances, strict=True)
    ],
  }
  if known:
    logprob = float(score.logprobs_T)
    entry |= {"chance": math.exp(logprob), "bits": -logprob / math.log(2)}
    entry["rank"] = int(score.ranks_T)
  return entry


def by_place(places: Sequence[int], scores: Scores) -> dict[int, Scores]:
  return {at: Scores(*(part[n] for part in scores)) for n, at in enumerate(places)}


def score_following(
  run: Run, ids: Sequence[int], source_ids: Sequence[int] | None
) -> dict[int, Scores]:
  """The scores of each place but the first, and of the one after the text."""
  scores = apply_to_row(run, next_scores, ids, source_ids)
  return by_place(range(1, len(ids) + 1), scores)


@functools.partial(jax.jit, static_argnames="model")
def next_scores(
  model: LanguageModel, params: Any, tokens_BT: jax.Array, source: Any
) -> Scores:
  """The scores of each token's successor in the first row."""
  options = {} if source is None else {"source": source}
  logits_TV = model.apply({"params": params}, tokens_BT, **options).value[0]
  return score(logits_TV, jnp.roll(tokens_BT[0], -1))


def score(logits_TV: jax.Array, targets_T: jax.Array) -> Scores:
  logprobs_TV = jax.nn.log_softmax(logits_TV.astype(jnp.float32), -1)
  own_T1 = jnp.take_along_axis(logprobs_TV, targets_T[:, None], -1)
  best_logprobs_TC, best_ids_TC = jax.lax.top_k(logprobs_TV, NUM_BEST)
  return Scores(
    logprobs_T=own_T1[:, 0],
    ranks_T=1 + (logprobs_TV > own_T1).sum(-1),
    entropies_T=-(jnp.exp(logprobs_TV) * logprobs_TV).sum(-1),
    best_ids_TC=best_ids_TC,
    best_logprobs_TC=best_logprobs_TC,
  )


def score_masked(run: Run, ids: Sequence[int]) -> dict[int, Scores]:
  """Each place's scores when only it is masked (Salazar et al., 2020); special tokens have
  none, and without a mask no token has."""
  mask_id = run.tokenizer.mask_id
  if mask_id is None:
    return {}
  asked = lambda id_: id_ == mask_id or id_ not in run.tokenizer.special_ids
  places = [at for at, id_ in enumerate(ids) if asked(id_)]
  found: dict[int, Scores] = {}
  for start in range(0, len(places), ROWS_AT_A_TIME):
    some = places[start : start + ROWS_AT_A_TIME]
    rows_R = np.resize(np.array(some, np.int32), ROWS_AT_A_TIME)  # one shape, one program
    scores = apply_to_row(run, masked_scores, ids, None, rows_R, np.int32(mask_id))
    found |= by_place(some, scores)
  return found


@functools.partial(jax.jit, static_argnames="model")
def masked_scores(
  model: LanguageModel,
  params: Any,
  tokens_BT: jax.Array,
  _: Any,
  places_R: jax.Array,
  mask_id: jax.Array,
) -> Scores:
  """The scores of each place's own token in the first row, read with it masked."""
  tokens_T = tokens_BT[0]
  rows_RT = jnp.where(jnp.arange(len(tokens_T)) == places_R[:, None], mask_id, tokens_T)
  variables = {"params": params}
  x_RTD = model.apply(variables, rows_RT, method="hidden").value
  x_R1D = jnp.take_along_axis(x_RTD, places_R[:, None, None], 1)
  logits_RV = model.apply(variables, x_R1D, method="logits")[:, 0]
  return score(logits_RV, tokens_T[places_R])
