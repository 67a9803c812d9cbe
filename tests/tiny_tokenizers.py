# SPDX-License-Identifier: Apache-2.0
"""Tiny tokenizers of the kinds that come with checkpoints, made without a download."""

import functools

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = ["the cat sat on the mat", "the cats that sat there", "a hat, a cat: théâtre"] * 4
BLANK = "\u2581"


def _frame(template: str, *tokens: tuple[str, int]) -> processors.TemplateProcessing:
  return processors.TemplateProcessing(single=template, special_tokens=list(tokens))


@functools.cache
def _llama() -> str:
  """SentencePiece's BPE: blanks are letters, unknown characters are bytes."""
  pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
  pieces += [BLANK, *"abcehmnost", "th", "the", f"{BLANK}the", "at", "cat"]
  merges = [("t", "h"), ("th", "e"), (BLANK, "the"), ("a", "t"), ("c", "at")]
  vocab = {piece: n for n, piece in enumerate(pieces)}
  model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True)
  made = tokenizers.Tokenizer(model)
  made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
  parts = [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
  made.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
  made.add_special_tokens(pieces[:3])
  made.post_processor = _frame("<s> $A", ("<s>", 1))
  return made.to_str()


@functools.cache
def _gpt2() -> str:
  """Byte-level BPE that adds nothing to a text."""
  made = tokenizers.Tokenizer(models.BPE())
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = decoders.ByteLevel()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = trainers.BpeTrainer(
    vocab_size=300, initial_alphabet=alphabet, show_progress=False
  )
  made.train_from_iterator(TEXTS, trainer)
  made.add_special_tokens(["<|endoftext|>"])
  return made.to_str()


# How the tokenizers of published models cut a text into words, before their bytes.
WORDS = {
  "llama3": (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
  ),
  "qwen2": (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
  ),
  "tekken": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{M}]*[\p{Ll}\p{M}]+|\p{N}|\s+",
}


@functools.cache
def _gpt_2_like(kind: str) -> str:
  made = tokenizers.Tokenizer(models.BPE())
  to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind not in WORDS)
  first = [pre_tokenizers.Digits(True)] if kind == "smollm" else []
  if kind in WORDS:
    first = [pre_tokenizers.Split(tokenizers.Regex(WORDS[kind]), "isolated")]
  made.pre_tokenizer = pre_tokenizers.Sequence([*first, to_bytes]) if first else to_bytes
  made.decoder = decoders.ByteLevel()
  code = ["def f(x):\n    return x ==  12\n", "it's 1234 DON'T\r\n\r\n ...", "漢字 é  x"]
  trainer = trainers.BpeTrainer(
    vocab_size=360,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  made.train_from_iterator([*TEXTS, *code * 3], trainer)
  made.add_special_tokens(["<|endoftext|>"])
  return made.to_str()


@functools.cache
def _bert() -> str:
  """WordPiece between [CLS] and [SEP]."""
  specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
  made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
  made.normalizer = normalizers.BertNormalizer()
  made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  made.decoder = decoders.WordPiece()
  trainer = trainers.WordPieceTrainer(
    vocab_size=60, special_tokens=specials, show_progress=False
  )
  made.train_from_iterator(TEXTS, trainer)
  made.post_processor = _frame("[CLS] $A [SEP]", ("[CLS]", 2), ("[SEP]", 3))
  return made.to_str()


@functools.cache
def _t5() -> str:
  """A unigram model that ends what is read."""
  pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (BLANK, -2.0)]
  pieces += [(BLANK + word, -3.0) for word in ("the", "cat", "sat")]
  pieces += [(chr(97 + n), -4.0) for n in range(26)]
  made = tokenizers.Tokenizer(models.Unigram(pieces, 2, False))
  made.pre_tokenizer = pre_tokenizers.Metaspace()
  made.decoder = decoders.Metaspace()
  made.add_special_tokens(["<pad>", "</s>", "<unk>"])
  made.post_processor = _frame("$A </s>", ("</s>", 1))
  return made.to_str()


def llama() -> tokenizers.Tokenizer:
  return tokenizers.Tokenizer.from_str(_llama())


def gpt2() -> tokenizers.Tokenizer:
  return tokenizers.Tokenizer.from_str(_gpt2())


def gpt_2_like(kind: str) -> tokenizers.Tokenizer:
  """Byte-level BPE that cuts texts as gpt2, smollm, or one of `WORDS`."""
  return tokenizers.Tokenizer.from_str(_gpt_2_like(kind))


def bert() -> tokenizers.Tokenizer:
  return tokenizers.Tokenizer.from_str(_bert())


def t5() -> tokenizers.Tokenizer:
  return tokenizers.Tokenizer.from_str(_t5())
