# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of a GGUF file as the files of a Hugging Face checkpoint.

Two kinds: byte-level BPE, which llama.cpp calls gpt2, with one of its fixed ways to cut a
text into words; and SentencePiece's BPE, which it calls llama, where scores stand for the
order of merges. Both give the ids that llama.cpp gives.
"""

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from flaxlm.chat.templates import MORE_TEMPLATES, TEMPLATE
from flaxlm.errors import CheckpointError, DataError
from flaxlm.interop.gguf_cuts import CUTS, NO_MERGE, pre_tokenizer
from flaxlm.interop.gguf_file import GGUF
from flaxlm.interop.values import Values, shortened, shown
from flaxlm.tokenizers.own import rust_errors

BLANK = "\u2581"  # a blank in SentencePiece's vocabularies
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of tokens

# Tokens that end an answer by their names, whatever else a file says, as in llama.cpp.
ENDS = (
  *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>"),
  *("<|endoftext|>", "<|eom_id|>", "<EOT>", "_<EOT>", "<|end_of_text|>"),
  "<end_of_utterance>",
)
NAMED_TEMPLATE = "tokenizer.chat_template."


class Files(NamedTuple):
  """The tokenizer of a checkpoint, as its files have it."""

  backend: tokenizers.Tokenizer  # tokenizer.json
  settings: dict[str, Any]  # tokenizer_config.json
  ids: dict[str, Any]  # special ids, as in generation_config.json
  templates: dict[Path, str]  # chat templates


def read_tokenizer(file: GGUF) -> Files | None:
  """The tokenizer of a file, or None if it has none.

  Raises `CheckpointError` for one of an unknown kind, `DataError` if it is damaged.
  """
  said = Values(
    {
      key.removeprefix("tokenizer.ggml."): value
      for key, value in file.values.items()
      if key.startswith("tokenizer.ggml.")
    },
    f"{file.path}: tokenizer.ggml",
  )
  kind = said.get(str, "model", "none")
  if kind in ("none", "no_vocab"):
    return None
  if kind not in ("gpt2", "llama"):
    raise said.refused("model", "flaxlm reads the tokenizers gpt2 and llama")
  words = read_words(said)
  make = byte_level if kind == "gpt2" else sentence_piece
  with rust_errors(f"{file.path}: the tokenizer is damaged"):
    backend, begins = make(said, words)
    added = [
      AddedToken(word, normalized=False, special=kind != USER_DEFINED)
      for word, kind in words.kinds.items()
      if kind in (CONTROL, UNKNOWN, USER_DEFINED)
    ]
    backend.add_tokens(added)
  for word, number in words.ids.items():
    if backend.token_to_id(word) != number:
      raise DataError(f"{said.origin}.tokens: {shortened(word)} has no id of its own")
  return with_specials(file, said, words, backend, begins)


class Words(NamedTuple):
  """The vocabulary, without tokens that only fill it up."""

  ids: dict[str, int]
  kinds: dict[str, int]
  scores: dict[str, float]  # {} if there are none


def read_words(said: Values) -> Words:
  tokens = listed(said, "tokens", str)
  count = len(tokens)
  kinds = listed(said, "token_type", int, count) or [NORMAL] * count
  scores = listed(said, "scores", float, count)
  if not all(math.isfinite(score) for score in scores):
    raise DataError(f"{said.origin}.scores are not all finite")
  used = [number for number in range(count) if kinds[number] != UNUSED]
  ids = {tokens[number]: number for number in used}
  if len(ids) < len(used):
    twice = next(tokens[n] for n in used if ids[tokens[n]] != n)
    raise DataError(f"{said.origin}.tokens: {shortened(twice)} is there twice")
  if not ids or not all(ids):
    raise DataError(f"{said.origin}.tokens has none, or one without characters")
  return Words(
    ids,
    {tokens[number]: kinds[number] for number in used},
    {tokens[number]: scores[number] for number in used} if scores else {},
  )


def listed(said: Values, key: str, kind: type, count: int | None = None) -> list[Any]:
  """The list under `key`, [] if there is none. Raises `DataError` for another length."""
  values = said.values.get(key, [])
  wrong = not isinstance(values, list) or not all(type(one) is kind for one in values)
  if wrong or (count is not None and values and len(values) != count):
    wanted = "a list" if count is None else f"a list of {count}"
    raise DataError(f"{said.origin}.{key} is not {wanted} of type {kind.__name__}")
  return values


# -- Byte-level BPE ------------------------------------------------------------------------


def byte_level(said: Values, words: Words) -> tuple[tokenizers.Tokenizer, bool]:
  """The tokenizer, and whether its texts begin with the first token."""
  name = said.get(str, "pre", "")
  if name not in CUTS:
    raise said.refused(
      "pre", f"flaxlm cuts texts as {', '.join(sorted(CUTS))}: get the safetensors instead"
    )
  cut = CUTS[name]
  merges = [tuple(merge.split(" ")) for merge in listed(said, "merges", str)]
  merges = [merge for merge in merges if merge != tuple(NO_MERGE.split(" "))]
  if any(len(merge) != 2 for merge in merges):
    raise DataError(f"{said.origin}.merges are not all two tokens and a blank between")
  model = models.BPE(vocab=words.ids, merges=merges, ignore_merges=cut.whole_words)
  backend = tokenizers.Tokenizer(model)
  steps = [pre_tokenizer(step) for step in cut.steps]
  backend.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
  backend.decoder = decoders.ByteLevel()
  return backend, cut.begins


# -- SentencePiece's BPE -------------------------------------------------------------------


def sentence_piece(said: Values, words: Words) -> tuple[tokenizers.Tokenizer, bool]:
  """The tokenizer, and whether its texts begin with the first token."""
  if not words.scores:
    raise DataError(f"{said.origin}.scores are missing")
  unknown = [word for word, kind in words.kinds.items() if kind == UNKNOWN]
  has_bytes = all(f"<0x{byte:02X}>" in words.ids for byte in range(256))
  model = models.BPE(
    vocab=words.ids,
    merges=merges_of(words),
    unk_token=unknown[0] if unknown else None,
    fuse_unk=True,
    byte_fallback=has_bytes,
  )
  backend = tokenizers.Tokenizer(model)
  adds_blank = said.get(bool, "add_space_prefix", True)
  to_blank = normalizers.Replace(" ", BLANK)
  parts = [normalizers.Prepend(BLANK), to_blank]
  backend.normalizer = normalizers.Sequence(parts) if adds_blank else to_blank
  back = [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
  backend.decoder = decoders.Sequence(
    [*back, decoders.Strip(" ", 1, 0)] if adds_blank else back
  )
  return backend, True


def merges_of(words: Words) -> list[tuple[str, str]]:
  """Every pair of tokens that make a third, that of the highest score first.

  SentencePiece keeps no merges: it joins the two neighbours that make the token of the
  highest score, and of equals the first in the text. Of pairs that make the same token the
  one with the longest left part comes first, as transformers has them.
  """
  ids, parts = words.ids, {w for w, kind in words.kinds.items() if kind == NORMAL}
  merges = []
  for word in parts:
    rank = -words.scores[word]
    for at in range(1, len(word)):
      left, right = word[:at], word[at:]
      if left in parts and right in parts:
        merges.append((rank, -at, ids[word], left, right))
  return [merge[-2:] for merge in sorted(merges)]


# -- Special ids and templates -------------------------------------------------------------


def with_specials(
  file: GGUF, said: Values, words: Words, backend: tokenizers.Tokenizer, begins: bool
) -> Files:
  names = {number: word for word, number in words.ids.items()}

  def special(role: str) -> int | None:
    number = said.get(int, f"{role}_token_id", None)
    return number if number in names else None  # some files say 2^32 - 1

  bos, eos = special("bos"), special("eos")
  named = [words.ids[name] for name in ENDS if name in words.ids]
  ends = [end for end in (eos, special("eot"), special("eom"), *named) if end is not None]
  first = bos if said.get(bool, "add_bos_token", begins) else None
  last = eos if said.get(bool, "add_eos_token", False) else None
  frame = [names[first]] if first is not None else []
  frame += ["$A", *([names[last]] if last is not None else [])]
  if len(frame) > 1:
    added = {number for number in (first, last) if number is not None}
    backend.post_processor = processors.TemplateProcessing(
      single=frame, special_tokens=[(names[number], number) for number in sorted(added)]
    )
  roles = {"bos": bos, "eos": eos, "unk": special("unknown"), "pad": special("padding")}
  settings: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "clean_up_tokenization_spaces": False,
  }
  settings |= {f"{role}_token": names[n] for role, n in roles.items() if n is not None}
  ids = {"bos_token_id": bos, "eos_token_id": [*dict.fromkeys(ends)]}
  ids["pad_token_id"] = roles["pad"]
  ids = {key: value for key, value in ids.items() if value is not None}
  return Files(backend, settings, ids, chat_templates(file))


def chat_templates(file: GGUF) -> dict[Path, str]:
  """The chat templates, by the names of their files."""
  said = Values(file.values, str(file.path))
  found = {}
  if text := said.get(str, NAMED_TEMPLATE.rstrip("."), ""):
    found[Path(TEMPLATE)] = text
  for key in file.values:
    if key.startswith(NAMED_TEMPLATE):
      name = key.removeprefix(NAMED_TEMPLATE)
      if not re.fullmatch(r"[\w-]{1,60}", name):
        raise CheckpointError(f"{file.path}: a chat template has the name {shown(name)}")
      found[Path(MORE_TEMPLATES, f"{name}.jinja")] = said.get(str, key)
  return found
