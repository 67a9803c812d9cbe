# SPDX-License-Identifier: Apache-2.0
"""Text to ids and back: the tokenizers that are trained here, with nothing downloaded.

`train.train_tokenizer` makes a `Tokenizer`; `save` and `load` use Hugging Face's
`tokenizer.json`, which other tools read. Ids stand for bytes, so every string can be
encoded, and decode(encode(s)) == s; only of a vocabulary of whole words some are unknown.
"""

import codecs
import functools
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from flaxlm.errors import DataError

# Begins every document; the one that follows a document ends it.
END_OF_TEXT = "<|endoftext|>"
# Stands for a token to be guessed (Devlin et al., 2019).
MASK = "[MASK]"
# Stands for any word that a vocabulary of whole words lacks.
UNKNOWN = "[UNK]"
UNKNOWN_TEXT = "\ufffd".encode()  # what is shown for it
# Begins the WordPieces that go on inside of a word.
CONTINUING = "##"

# A text's use: a decoder continues it, an encoder reads it, or an encoder-decoder does.
Role = Literal["prompt", "text", "source"]

MAX_FILE_BYTES = 64 * 2**20  # parsing a hostile tokenizer.json costs many times its size
MAX_KNOWN_WORDS = 2**20

# The words that a text is split into; no token spans two of them. The pattern follows
# Llama 3's, with an eye to source code: a word includes a blank or punctuation mark before
# it, punctuation includes the line end and indentation after it. Classes are spelled out,
# and everything beyond ASCII counts as a letter: `\p{L}` depends on the Unicode version,
# and the pattern must mean the same to Oniguruma and to `re`.
WORDS = "|".join(
  (
    "[ !-/:-@\\[-`{-~]?[A-Za-z\u0080-\U0010ffff]+",
    "[0-9]{1,3}",
    " ?[!-/:-@\\[-`{-~]+(?:[\r\n]+[ \t]*)?",
    "[ \t\r\n]*[\r\n]+[ \t]*",
    "[ \t]+(?![^ \t\r\n])",
    "[\x00-\x20\x7f]",
  )
)
# The same for WordPiece, which takes the square of a word's length: none is endless. "#"
# stands alone, for a word that begins with "##" would be taken for the end of another.
SHORT_WORDS = "|".join(
  (
    " ?#",
    "[ !-/:-@\\[-`{-~]?[A-Za-z\u0080-\U0010ffff]{1,40}",
    "[0-9]{1,3}",
    ' ?[!"$-/:-@\\[-`{-~]{1,40}(?:[\r\n]{1,40}[ \t]{0,40})?',
    "[ \t\r\n]{0,40}[\r\n]{1,40}[ \t]{0,40}",
    "[ \t]{1,40}(?![^ \t\r\n])",
    "[\x00-\x20\x7f]",
  )
)
CHARACTERS = "[\x00-\U0010ffff]"
SPLITS = (WORDS, SHORT_WORDS, CHARACTERS)


class Vocabulary:
  """The base class of all tokenizers: ids, and the bytes that they stand for."""

  _backend: tokenizers.Tokenizer
  unknown_id: int | None = None  # stands for any text that the vocabulary lacks
  note: str = ""  # what was guessed about it

  @functools.cached_property
  def _pieces(self) -> list[bytes]:
    """The bytes that each id stands for; none for specials."""
    raise NotImplementedError

  @functools.cached_property
  def fingerprint(self) -> str:
    """SHA-256 of the tokenizer.json."""
    return hashlib.sha256(self.to_json().encode()).hexdigest()

  def to_json(self) -> str:
    """The text of its tokenizer.json."""
    return self._backend.to_str()

  def encode(self, text: str) -> list[int]:
    """The ids of `text`, without special tokens. A lone surrogate becomes "?"."""
    return self.encode_batch([text])[0].tolist()

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """The ids (uint32) of each text, as `encode` gives them."""
    return self._encode_with_backend(
      [text.encode("utf-8", "replace").decode() for text in texts]
    )

  def _encode_with_backend(self, texts: Sequence[str]) -> list[np.ndarray]:
    with rust_errors("cannot encode the text"):
      batch = self._backend.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array(encoding.ids, np.uint32) for encoding in batch]

  def encode_chats(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, the characters (start, end) of each) of each text as a chat template writes
    it: the name of a special token is that token, and no other is added."""
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    with rust_errors("cannot encode the text"):
      batch = self._chat_backend.encode_batch(texts, add_special_tokens=False)
    return [
      (np.array(one.ids, np.uint32), np.array(one.offsets, np.int64).reshape(-1, 2))
      for one in batch
    ]

  @functools.cached_property
  def _chat_backend(self) -> tokenizers.Tokenizer:
    """It reads the names of special tokens as these."""
    return self._backend

  def token_bytes(self) -> np.ndarray:
    """How many bytes of text each id stands for, (V,) int32; 0 for specials, and for what
    is unknown: its text is not told."""
    sizes = np.array([len(piece) for piece in self._pieces], np.int32)
    if self.unknown_id is not None:
      sizes[self.unknown_id] = 0
    return sizes

  def bytes_of(self, token_id: int) -> bytes:
    """The bytes of text that an id stands for; none for specials and for unknown ids."""
    return self._pieces[token_id] if 0 <= token_id < len(self._pieces) else b""

  def id_of(self, name: str) -> int | None:
    """The id that has this name in the vocabulary."""
    return self._backend.token_to_id(name)

  def name_of(self, token_id: int) -> str | None:
    """The vocabulary's name for an id; None for an unknown id."""
    return self._backend.id_to_token(token_id)


class Tokenizer(Vocabulary):
  """A byte-level tokenizer of any kind with a special token, `<|endoftext|>`.

  `bos_id` begins a document and `eos_id` ends one; here they are the same id. A tokenizer
  for masked language models also has `[MASK]`: `mask_id`, which is None in all others.
  """

  def __init__(self, backend: tokenizers.Tokenizer):
    """Raises `DataError` unless `backend` is byte-level, has an id for each byte or one for
    unknown words, and knows `<|endoftext|>`."""
    if not is_byte_level(backend):
      raise DataError("the tokenizer is not byte-level", "use one with a ByteLevel decoder")
    vocab = backend.get_vocab(with_added_tokens=True)
    if isinstance(backend.model, models.WordLevel):
      self.unknown_id = vocab.get(backend.model.unk_token)
    if self.unknown_id is None:
      check_all_bytes(backend)
    else:
      self.note = f"words that the vocabulary lacks are unknown ({UNKNOWN}), and are lost"
    end = vocab.get(END_OF_TEXT)
    if end is None:
      raise DataError(f"the tokenizer has no {END_OF_TEXT}", "add it as a special token")
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # its name in a text is ordinary text
    self._backend = backend
    self.bos_id: int = end
    self.eos_id: int = end
    self.eos_ids = frozenset({end})
    added = backend.get_added_tokens_decoder().items()
    self._specials = {token.content: n for n, token in added if token.special}
    self.mask_id: int | None = self._specials.get(MASK)
    self.special_ids: tuple[int, ...] = tuple(sorted({end, *self._specials.values()}))
    self.vocab_size: int = 1 + max(vocab.values())  # there may be gaps between the ids
    self._known_words: dict[str, bytes] = {}
    splits = {pre_tokenizer(split).__getstate__(): split for split in SPLITS}
    self._split: str | None = None  # the pattern of its words, if it is one of ours
    if backend.normalizer is None and backend.pre_tokenizer is not None:
      self._split = splits.get(backend.pre_tokenizer.__getstate__())

  def framed(self, ids: Sequence[int], role: Role) -> list[int]:
    """`ids` with the special tokens around them, as the model is trained to see them."""
    return [*ids, self.eos_id] if role == "source" else [self.bos_id, *ids]

  def encode_masked(self, text: str) -> list[int]:
    """The ids of `text`, with `mask_id` for each `[MASK]`.

    A blank before the mask is part of it, as a word's token includes the blank before it.
    Raises `DataError` if the tokenizer has no `[MASK]`.
    """
    if self.mask_id is None:
      raise DataError(f"the tokenizer has no {MASK}", "only masked models fill in text")
    first, *others = self.encode_batch(re.split(f" ?{re.escape(MASK)}", text))
    return [*first.tolist(), *(i for ids in others for i in (self.mask_id, *ids.tolist()))]

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """The ids (uint32) of each text, as `encode` gives them.

    The Rust library tracks the offset of every character, and reaches 2 MB/s. Splitting
    with `re`, and caching the ids of each word, gives the same ids five times as fast.
    """
    if self._split is None:
      return super().encode_batch(texts)
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    if len(self._known_words) > MAX_KNOWN_WORDS:
      self._known_words = {}
    known = self._known_words
    words_of = re.compile(self._split).findall  # `re` keeps what it has compiled
    split = [words_of(text) for text in texts]
    new = list(set().union(*split).difference(known))
    encoded = self._encode_with_backend(new)
    known.update((word, ids.tobytes()) for word, ids in zip(new, encoded, strict=True))
    return [
      np.frombuffer(b"".join(map(known.__getitem__, words)), np.uint32) for words in split
    ]

  @functools.cached_property
  def _chat_backend(self) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(self.to_json())  # with names that are special

  def decode(self, ids: Iterable[int]) -> str:
    """The text of `ids`; bytes that are not UTF-8, and an unknown word, become U+FFFD.

    Special tokens have no text, and neither do padding ids of the model's vocabulary.
    """
    return b"".join(map(self.bytes_of, ids)).decode("utf-8", "replace")

  def stream(self) -> "TextStream":
    """A decoder for ids that arrive one by one."""
    return TextStream(self)

  def save(self, path: str | Path) -> None:
    Path(path).write_text(self._backend.to_str(pretty=True), "utf-8")

  @staticmethod
  def load(path: str | Path) -> "Tokenizer":
    """Reads a tokenizer.json; raises `DataError` if it is missing, damaged or unfit."""
    cure = "give --tokenizer.path a byte-level tokenizer.json, or leave it out to train one"
    return Tokenizer.of_file(load_backend(Path(path), cure), path)

  @staticmethod
  def of_file(backend: tokenizers.Tokenizer, path: str | Path) -> "Tokenizer":
    """The tokenizer that was read from a file, which its errors name."""
    try:
      return Tokenizer(backend)
    except DataError as e:
      raise DataError(f"{path}: {e.cause}", e.cure) from e

  @functools.cached_property
  def _pieces(self) -> list[bytes]:
    """The bytes that each id stands for."""
    byte_of = {character: byte for byte, character in enumerate(byte_alphabet())}
    pieces = [b""] * self.vocab_size
    for token, token_id in self._backend.get_vocab(with_added_tokens=False).items():
      if isinstance(self._backend.model, models.WordPiece):
        token = token.removeprefix(CONTINUING)
      try:
        pieces[token_id] = bytes(byte_of[character] for character in token)
      except KeyError:  # no text becomes this token
        pieces[token_id] = token.encode()
    for token_id, added in self._backend.get_added_tokens_decoder().items():
      pieces[token_id] = b"" if added.special else added.content.encode()
    if self.unknown_id is not None:
      pieces[self.unknown_id] = UNKNOWN_TEXT
    return pieces


class TextStream:
  """Turns ids into whole characters, one id at a time; the pieces add up to `decode`."""

  def __init__(self, tokenizer: Tokenizer):
    self._bytes_of = tokenizer.bytes_of
    self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

  def push(self, token_id: int) -> str:
    """The characters that `token_id` completes."""
    return self._decoder.decode(self._bytes_of(token_id))

  def flush(self) -> str:
    """The rest of the text: U+FFFD if the last character is incomplete."""
    return self._decoder.decode(b"", final=True)


def pre_tokenizer(split: str) -> pre_tokenizers.PreTokenizer:
  """Cuts a text into the words that a pattern finds, and these into bytes."""
  cut = pre_tokenizers.Split(tokenizers.Regex(split), "isolated")
  to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  return pre_tokenizers.Sequence([cut, to_bytes])


def word_piece_decoder() -> decoders.Decoder:
  """Joins WordPieces whose characters stand for bytes."""
  begin = decoders.Replace(tokenizers.Regex(rf"\A{CONTINUING}"), "")
  return decoders.Sequence([begin, decoders.ByteLevel()])


def is_byte_level(backend: tokenizers.Tokenizer) -> bool:
  """Whether each character of its tokens stands for a byte."""
  decoder = backend.decoder
  if isinstance(backend.model, models.WordPiece) and decoder is not None:
    return decoder.__getstate__() == word_piece_decoder().__getstate__()
  return isinstance(decoder, decoders.ByteLevel)


def check_all_bytes(backend: tokenizers.Tokenizer) -> None:
  """Raises `DataError` if a byte has no id: the library leaves it out without a word."""
  vocab = backend.get_vocab(with_added_tokens=True)
  forms = ("", CONTINUING) if isinstance(backend.model, models.WordPiece) else ("",)
  alphabet = enumerate(byte_alphabet())
  missing = [byte for byte, name in alphabet if any(f + name not in vocab for f in forms)]
  if missing:
    raise DataError(
      f"the tokenizer has no id for {len(missing)} of the 256 bytes, as "
      f"{missing[0]:#04x}: text would be left out",
      "use one that was trained with the whole byte alphabet",
    )


@functools.cache
def byte_alphabet() -> list[str]:
  """The character that stands for each byte 0..255 in byte-level BPE (GPT-2's table)."""
  printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
  others = (b for b in range(256) if b not in printable)
  moved = {byte: 256 + n for n, byte in enumerate(others)}
  return [chr(moved.get(byte, byte)) for byte in range(256)]


def load_backend(path: Path, cure: str = "") -> tokenizers.Tokenizer:
  """Any tokenizer.json. Raises `DataError` if it is missing, too large or damaged."""
  try:
    if path.stat().st_size > MAX_FILE_BYTES:
      raise DataError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MB", cure)
    text = path.read_text("utf-8")
  except (OSError, ValueError) as e:
    raise DataError(f"cannot read the tokenizer {path}: {e}", cure) from e
  with rust_errors(f"{path} is not a tokenizer.json", cure):
    return tokenizers.Tokenizer.from_str(text)


@contextmanager
def rust_errors(cause: str, cure: str = "") -> Iterator[None]:
  """Turns failures of the Rust library into `DataError`, also panics, which are not an
  `Exception`."""
  try:
    yield
  except BaseException as e:
    if isinstance(e, Exception) or type(e).__name__ == "PanicException":
      raise DataError(f"{cause}: {e}", cure) from e
    raise
