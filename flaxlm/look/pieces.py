# SPDX-License-Identifier: Apache-2.0
"""A text in a picture: its tokens in legible form, and the rows that a model reads."""

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from flaxlm.config import ResolvedModel
from flaxlm.decoding.completions import complete_request
from flaxlm.decoding.loading import Run
from flaxlm.decoding.prefill import Request
from flaxlm.decoding.sampling import GREEDY
from flaxlm.errors import ConfigError
from flaxlm.nn.base import Source
from flaxlm.sharding import batch_shards, use_mesh
from flaxlm.tokenizers import MASK, AnyTokenizer, Role

# How characters that cannot be seen are drawn.
DRAWN = {" ": "·", "\n": "↵", "\t": "→", "\r": "␍"}


class Piece(NamedTuple):
  """A token as it is shown; `label` is legible, whatever the bytes are."""

  id: int
  label: str
  hex: str  # its bytes of text; empty for a special token
  name: str  # what the vocabulary calls it
  special: bool


def describe(
  tokenizer: AnyTokenizer, ids: Iterable[int], drawn: Mapping[str, str] = DRAWN
) -> list[Piece]:
  """The tokens of some ids; ids in the padding of a vocabulary are called unused."""
  pieces = []
  for id_ in map(int, ids):
    name = tokenizer.name_of(id_) if 0 <= id_ < tokenizer.vocab_size else None
    special = is_special(tokenizer, id_)
    unseen = special or id_ == tokenizer.unknown_id
    data = b"" if unseen else tokenizer.bytes_of(id_)
    if name is None:
      pieces.append(Piece(id_, f"(unused {id_})", "", "", True))
    else:
      pieces.append(Piece(id_, legible(data, drawn) or name, data.hex(" "), name, special))
  return pieces


def is_special(tokenizer: AnyTokenizer, id_: int) -> bool:
  return id_ in tokenizer.special_ids or id_ == tokenizer.mask_id


def sort_of(tokenizer: AnyTokenizer, id_: int) -> str:
  """The kind of a token by its spelling, such as punctuation."""
  if is_special(tokenizer, id_):
    return "special"
  try:
    text = tokenizer.bytes_of(id_).decode()
  except UnicodeDecodeError:
    return "part of a character"
  word = text.strip()
  if not word:
    return "blank"
  if word.isdecimal():
    return "number"
  if not any(character.isalpha() for character in word):
    return "punctuation"
  return "word after a blank" if text[0].isspace() else "word without a blank"


def legible(data: bytes, drawn: Mapping[str, str] = DRAWN) -> str:
  """Bytes as text in which every character is visible; `\\xe6` for half a character.

  `drawn` says how some characters are drawn, such as blanks and ends of lines.
  A character that reverses, joins or hides its neighbours (such as U+202E) is spelled out,
  and so is one that combines with the character before it, which may be another token's.
  """

  def shown(character: str) -> str:
    if character in drawn:
      return drawn[character]
    if character.isprintable() and not unicodedata.combining(character):
      return character
    return character.encode("unicode_escape").decode()

  return "".join(map(shown, data.decode("utf-8", "backslashreplace")))


def spelled(tokenizer: AnyTokenizer, name: str) -> str:
  """A piece as the vocabulary calls it, in legible form."""
  id_ = tokenizer.id_of(name)
  data = b"" if id_ in (None, tokenizer.unknown_id) else tokenizer.bytes_of(id_)
  return legible(data) or name


class Reading(NamedTuple):
  """What a model is to read: the ids of a row and, for an encoder-decoder, of a source.

  `ids` is None if the model is to answer the source by itself.
  """

  ids: list[int] | None
  source_ids: list[int] | None
  cuts: list[str]
  weights: list[int] | None = None  # of a conversation: what each token counts in the loss
  texts: Sequence[str] = ()  # of which it was made, before any cut


def make_reading(
  cfg: ResolvedModel,
  tokenizer: AnyTokenizer,
  text: str | None,
  source: str | None,
  most: int,
) -> Reading:
  """A text as the model's family reads it, cut to `most` tokens and to the context.

  Raises `ConfigError` for a text that is missing, empty, or not for this family.
  """
  pairs = cfg.family == "encoder_decoder"
  if not pairs and source is not None:
    raise ConfigError(f"model.family={cfg.family} reads no source", "leave --source out")
  if pairs and source is None:
    raise ConfigError(
      "an encoder-decoder reads a source, and there is none",
      'give --source "..."; without --text the model answers it by itself',
    )
  if text is None and not pairs:
    raise ConfigError("there is no text", 'give --text "..."')
  cuts: list[str] = []
  most = min(most, cfg.context)

  def frame(ids: list[int], role: Role, what: str) -> list[int]:
    if not ids:
      raise ConfigError(f"the {what} is empty", "give it a word")
    ids = tokenizer.framed(ids, role)
    if len(ids) > most:
      limit = f"model.context={most}" if most == cfg.context else f"--max-tokens {most}"
      cuts.append(f"The {what} has {len(ids)} tokens, of which the first {most}: {limit}.")
    ids = ids[:most]
    if cfg.vocab_size is not None and max(ids) >= cfg.vocab_size:
      raise ConfigError(
        f"the {what} has the id {max(ids)}; the model has only ids below {cfg.vocab_size}",
        "the tokenizer has more ids than the model: choose another text",
      )
    return ids

  ids = source_ids = None
  if source is not None:
    source_ids = frame(tokenizer.encode(source), "source", "source")
  if text is not None:
    masked = cfg.family == "encoder" and MASK in text and tokenizer.mask_id is not None
    encode = tokenizer.encode_masked if masked else tokenizer.encode
    ids = frame(encode(text), "text" if cfg.family == "encoder" else "prompt", "text")
  texts = [given for given in (text, source) if given is not None]
  return Reading(ids, source_ids, cuts, texts=texts)


def complete_reading(run: Run, reading: Reading, most: int) -> tuple[list[int], list[str]]:
  """The ids of the row, which are the model's greedy answer if no text was given, and what
  to tell about cuts."""
  if reading.ids is not None:
    return reading.ids, reading.cuts
  start = run.tokenizer.framed([], "prompt")
  num_new = max(1, min(most, run.model.cfg.context) - len(start))
  assert reading.source_ids is not None
  request = Request([start], num_new, run.num_ids, [reading.source_ids])
  [answer] = complete_request(run, request, [""], [GREEDY])
  ids = [*start, *answer.tokens]
  cut = "" if answer.finish_reason == "stop" else f", cut at {len(ids)} tokens"
  return ids, [*reading.cuts, f"The text is the model's own answer (greedy){cut}."]


def apply_to_row(
  run: Run, function: Any, ids: Sequence[int], source_ids: Sequence[int] | None, *args: Any
) -> Any:
  """`function(model, params, tokens_BT, source, *args)` of one row, on the run's mesh.

  The row is repeated so that every device has one. The function returns results of the
  first row, without a batch dim.
  """
  copies = batch_shards(run.mesh.shape)
  repeat = lambda row: np.tile(np.array(row, np.int32), (copies, 1))
  source = None if source_ids is None else Source(repeat(source_ids))
  with use_mesh(run.mesh):
    out = function(run.model, run.params, repeat(ids), source, *args)
  return jax.tree.map(np.asarray, out)
