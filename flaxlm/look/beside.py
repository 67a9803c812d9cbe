# SPDX-License-Identifier: Apache-2.0
"""One text as two models, or two tokenizers, read it: side by side, and word by word."""

import itertools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from flaxlm.decoding.loading import Run
from flaxlm.errors import ConfigError
from flaxlm.look.pieces import describe, legible, make_reading
from flaxlm.look.tokens import look_tokens, text_figures
from flaxlm.look.view import View
from flaxlm.tokenizers import AnyTokenizer

WORD = re.compile(r"\s*\S+|\s+$")  # with the blanks before it; all of them make the text


class Side(NamedTuple):
  """Who reads the text: a model, or a tokenizer alone."""

  name: str
  tokenizer: AnyTokenizer
  run: Run | None = None


def look_beside(
  sides: Sequence[Side], text: str | None, source: str | None, most: int
) -> View:
  """Both sides' tokens of one text, of which both read as much.

  Raises `ConfigError` for a text that is missing or empty, and for a source that no side
  reads.
  """
  if text is None:
    raise ConfigError("there is no text to set side by side", 'give --text "..."')
  if source is not None and not any(map(is_pair, sides)):
    raise ConfigError("neither side reads a source", "leave --source out")
  whole = text
  text = common_text(sides, text, source, most)
  cuts = []
  if text != whole:
    cuts.append(
      f"Of the text's {len(whole):,} characters both read the first {len(text):,}: that is "
      "what fits (--max-tokens, model.context)."
    )
  notes: list[str] = []
  figures = []
  for side in sides:
    of_side, told = side_figures(side, text, source, most)
    figures.append({"name": side.name} | of_side)
    notes += told
    notes += unasked_words(side, of_side)
  words: list[dict[str, Any]] = [{"word": word} for word in WORD.findall(text)]
  for of_side in figures:
    if not add_words(words, of_side["tokens"], text):
      notes.append(
        f"{of_side['name']} does not keep the text byte by byte, so it is not told word "
        "by word."
      )
  for word in words:
    word["word"] = legible(word["word"].encode("utf-8", "surrogatepass"))
  if sum("bits" in of_side for of_side in figures) == 2:
    notes.append(
      "Bits per byte compare models that cut a text differently; perplexity and bits per "
      "token do not."
    )
  title = f"One text as {sides[0].name} and {sides[1].name} read it"
  return View("tokens", title, cuts, notes, {"sides": figures, "words": words}, {})


def unasked_words(side: Side, figures: dict[str, Any]) -> list[str]:
  """What is to be told of a model that has no probability for a part of the text."""
  missing = [t for t in figures["tokens"] if t["hex"] and "bits" not in t]
  if not missing or "bits" not in figures:
    return []
  size = sum(len(bytes.fromhex(token["hex"])) for token in missing)
  return [
    f"{side.name} has no probability for {len(missing)} of its tokens, in which are {size} "
    f"of the {figures['num_bytes']:,} bytes: they cost it nothing here."
  ]


def is_pair(side: Side) -> bool:
  return side.run is not None and side.run.model.cfg.family == "encoder_decoder"


def side_ids(
  side: Side, text: str, source: str | None, most: int
) -> tuple[list[int], bool]:
  """The ids of the text, and whether it had to be cut."""
  if side.run is not None:
    own_source = source if is_pair(side) else None
    reading = make_reading(side.run.model.cfg, side.tokenizer, text, own_source, most)
    assert reading.ids is not None
    is_cut = len(reading.ids) < len(make_ids(side, text))
    return reading.ids, is_cut
  ids = make_ids(side, text)
  return ids[:most], len(ids) > most


def make_ids(side: Side, text: str) -> list[int]:
  """All ids of the text, framed as the model reads it."""
  ids = side.tokenizer.encode(text)
  if not ids:
    raise ConfigError("the text is empty", "give it a word")
  if side.run is None:
    return ids
  is_encoder = side.run.model.cfg.family == "encoder"
  return side.tokenizer.framed(ids, "text" if is_encoder else "prompt")


def common_text(sides: Sequence[Side], text: str, source: str | None, most: int) -> str:
  """The longest beginning of the text, nearly, of which neither side has to cut any."""
  while True:
    kept = []
    for side in sides:
      ids, is_cut = side_ids(side, text, source, most)
      if is_cut:  # fewer tokens stand for fewer characters, however the tokenizer cuts
        kept.append(min(len(side.tokenizer.decode(ids)), len(text) - 1))
    if not kept:
      return text
    if min(kept) < 1:
      raise ConfigError("nothing of the text fits both sides", "give a larger --max-tokens")
    text = text[: min(kept)]


def side_figures(
  side: Side, text: str, source: str | None, most: int
) -> tuple[dict[str, Any], list[str]]:
  """One side's tokens and figures, and what is to be told of them."""
  if side.run is not None:
    own_source = source if is_pair(side) else None
    reading = make_reading(side.run.model.cfg, side.tokenizer, text, own_source, most)
    view = look_tokens(side.run, reading, most)
    return view.figures, [*view.cuts, *view.notes]
  tokens = [piece._asdict() for piece in describe(side.tokenizer, make_ids(side, text))]
  size = len(text.encode("utf-8", "surrogatepass"))
  figures = text_figures(tokens, size, len(text.split())) | {"tokens": tokens, "source": []}
  return figures, [f"{side.name} is a tokenizer alone: it has no probabilities."]


def add_words(words: list[dict[str, Any]], tokens: list[dict[str, Any]], text: str) -> bool:
  """Adds to each word a side's `pieces`, the tokens that begin in it, and their `bits`
  together, None if one was not asked for; and to each token the byte `at` which it begins.

  Returns whether it could: the tokens have to spell the text.
  """
  sizes = [len(bytes.fromhex(token["hex"])) for token in tokens]
  spelled = b"".join(bytes.fromhex(token["hex"]) for token in tokens)
  can = spelled == text.encode("utf-8", "surrogatepass")
  if can:
    for token, at in zip(tokens, itertools.accumulate(sizes, initial=0), strict=False):
      token["at"] = at
  start = 0
  for word in words:
    end = start + len(word["word"].encode("utf-8", "surrogatepass"))
    own = [t for t in tokens if can and t["hex"] and start <= t["at"] < end]
    bits = [token["bits"] for token in own if "bits" in token]
    is_known = own and len(bits) == len(own)
    word.setdefault("pieces", []).append([token["label"] for token in own] if can else None)
    word.setdefault("bits", []).append(sum(bits) if is_known else None)
    start = end
  return can
