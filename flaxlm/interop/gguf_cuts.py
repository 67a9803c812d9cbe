# SPDX-License-Identifier: Apache-2.0
"""How llama.cpp cuts a text into words, and how a tokenizer.json says the same."""

from typing import Any, NamedTuple

import tokenizers
from tokenizers import pre_tokenizers

from flaxlm.errors import CheckpointError

# llama.cpp has a fixed list of ways to cut a text into the words within which merges apply.
# Here are those that a tokenizer.json has too, as `cuts_of` gives them, and whether a word
# that is in the vocabulary is taken whole, without its merges (`ignore_merges`).
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_3 = f"{CONTRACTIONS}\\p{{N}}{{1,3}}{OTHERS}"
QWEN_2 = f"{CONTRACTIONS}\\p{{N}}{OTHERS}"
GPT_2 = "gpt-2"  # its own pattern, which stands in no tokenizer.json, and then bytes
DIGITS = "digits"  # each a word
BYTES = "bytes"
PRE_TOKENIZERS = {
  ((GPT_2,), False): "gpt-2",
  ((DIGITS, GPT_2), False): "smollm",
  ((LLAMA_3, BYTES), True): "llama-bpe",
  ((LLAMA_3, BYTES), False): "dbrx",
  ((QWEN_2, BYTES), False): "qwen2",
}
# llama.cpp does not open a file without merges. This one never applies: a word begins as
# single characters.
NO_MERGE = "<no> <merge>"
WHOLE_WORDS, BEGINS = True, True


class Cut(NamedTuple):
  """How a pre-tokenizer of llama.cpp treats a text."""

  steps: tuple[str, ...]
  whole_words: bool = False  # a word that is in the vocabulary needs no merges
  begins: bool = False  # texts begin with the first token, unless the file says otherwise


# Those that the export knows, and names for the same in llama.cpp's `load_vocab`.
CUTS = {name: Cut(*cut) for cut, name in PRE_TOKENIZERS.items()}
CUTS["llama-bpe"] = Cut((LLAMA_3, BYTES), WHOLE_WORDS, BEGINS)
CUTS |= dict.fromkeys(("llama3", "llama-v3", "falcon3", "pixtral"), CUTS["llama-bpe"])
CUTS |= dict.fromkeys(("starcoder", "refact", "command-r", "codeshell"), CUTS["smollm"])
CUTS |= dict.fromkeys(("phi-2", "exaone4", "mellum", "modern-bert"), CUTS["gpt-2"])
CUTS |= dict.fromkeys(("deepseek-r1-qwen", "megrez"), Cut((QWEN_2, BYTES)))
CUTS["smaug-bpe"] = CUTS["dbrx"]


def pre_tokenizer(step: str) -> pre_tokenizers.PreTokenizer:
  """The inverse of `cuts_of`, for one step."""
  if step == DIGITS:
    return pre_tokenizers.Digits(individual_digits=True)
  if step in (GPT_2, BYTES):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=step == GPT_2)
  return pre_tokenizers.Split(tokenizers.Regex(step), "isolated")


def find_pre_tokenizer(spec: dict[str, Any]) -> str:
  """llama.cpp's name for how a tokenizer.json cuts a text.

  Raises `CheckpointError` for a tokenizer that llama.cpp does not have, or reads
  otherwise.
  """
  model = spec["model"]
  if model["type"] != "BPE" or model.get("byte_fallback"):
    raise CheckpointError("GGUF: the tokenizer is not a byte-level BPE")
  said = [
    *(f"model.{key}" for key in ("dropout", "continuing_subword_prefix") if model.get(key)),
    *(["model.end_of_word_suffix"] if model.get("end_of_word_suffix") else []),
    # llama.cpp composes no characters, as all tools around it accept.
    *(["normalizer"] if spec["normalizer"] not in (None, {"type": "NFC"}) else []),
    *(
      f"{flag} of the token {one['content']!r}"
      for one in spec["added_tokens"]
      for flag in ("lstrip", "rstrip", "single_word")
      if one[flag]
    ),
  ]
  if said:
    raise CheckpointError(
      f"GGUF: llama.cpp has no place for the tokenizer's {said[0]}", "export to safetensors"
    )
  cuts, whole_words = cuts_of(spec["pre_tokenizer"]), bool(model.get("ignore_merges"))
  if not model["merges"] and all(len(word) == 1 for word in model["vocab"]):
    # Where each byte is an id, every way to cut gives the same ids.
    cuts, whole_words = (GPT_2,) if {GPT_2, BYTES} & {*cuts} else (), False
  name = PRE_TOKENIZERS.get((cuts, whole_words))
  if name is None:
    raise CheckpointError(
      "GGUF: llama.cpp does not split texts as this tokenizer does",
      "export to safetensors, or train with --tokenizer.kind=byte",
    )
  return name


def cuts_of(pre_tokenizer: dict[str, Any] | None) -> tuple[str, ...]:
  """How a pre-tokenizer cuts a text, step by step; ("",) for any that llama.cpp lacks."""
  steps = pre_tokenizer or {}
  cuts = []
  for step in steps.get("pretokenizers", [steps]):
    match step:
      case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
        cuts.append(GPT_2)
      case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}:
        cuts.append(BYTES)
      case {"type": "Digits", "individual_digits": True}:
        cuts.append(DIGITS)
      case {"type": "Split", "pattern": {"Regex": str(pattern)}} if (
        step["behavior"],
        step["invert"],
      ) in (("Isolated", False), ("Removed", True)):  # the same, if a pattern fits all
        cuts.append(pattern)
      case _:
        return ("",)
  return tuple(cuts)
