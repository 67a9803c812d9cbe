# SPDX-License-Identifier: Apache-2.0
"""A run in three lines of Python: what `flaxlm.load` gives.

    model = flaxlm.load("runs/stdlib_tiny")
    print(model.generate("def ", max_new_tokens=40).completion)

It writes, scores and embeds as the commands do, through the same functions; what they print
is returned.
"""

import difflib
import functools
import html
import logging
import os
import reprlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict, Unpack, overload

import numpy as np

from flaxlm.chat.templates import Chat, Message, Tool, load_chat
from flaxlm.config import is_file, parse_mesh
from flaxlm.data.storage import data_dir
from flaxlm.decoding import completions
from flaxlm.decoding.chat import prompt_for
from flaxlm.decoding.completions import (
  DEFAULT_TEMPERATURE,
  Stopping,
  as_list,
  as_texts,
  complete_request,
  complete_samples,
  grow_completions,
  make_request,
)
from flaxlm.decoding.constraint import check_expressions
from flaxlm.decoding.encoding import embed_texts
from flaxlm.decoding.jobs import check_count
from flaxlm.decoding.loading import Run, equip_for_decoding, load_run
from flaxlm.decoding.prefill import MOST_NEW_TOKENS
from flaxlm.decoding.prefix_store import RowStore
from flaxlm.decoding.sampling import MOST_SAMPLES, SamplingSettings, is_number
from flaxlm.decoding.schemas import regex_of_form
from flaxlm.decoding.scoring import encode_pairs, score_rolling, score_tokens
from flaxlm.errors import CheckpointError, ConfigError
from flaxlm.interop.hub import find_source
from flaxlm.interop.imported import import_once
from flaxlm.look.attention import check_attention, look_attention
from flaxlm.look.embeddings import look_embeddings
from flaxlm.look.page import check_output, save_view, to_html
from flaxlm.look.pieces import make_reading
from flaxlm.look.surprise import surprise_html
from flaxlm.look.tokens import look_tokens
from flaxlm.look.view import View
from flaxlm.platform import start_jax
from flaxlm.runs import CONFIG, find_run, is_a_hubs
from flaxlm.sharding import make_mesh
from flaxlm.tokenizers import AnyTokenizer

Pair = tuple[str, str]  # a context, and how it goes on
MOST_SEEN = {"attention": 256, "tokens": 1024}  # tokens of a text that a picture shows


class Options(TypedDict, total=False):
  """How an answer is drawn, as `SamplingSettings` has it, and where it ends; None is what a
  missing one is."""

  temperature: float | None  # 0: greedy; by default 0.8, as in `flaxlm infer`
  top_k: int | None
  top_p: float | None
  min_p: float | None
  typical_p: float | None
  repetition_penalty: float | None
  presence_penalty: float | None
  frequency_penalty: float | None
  logit_bias: Mapping[int, float] | None
  banned_tokens: Sequence[int] | None
  regex: str | None  # the whole answer matches it
  seed: int | None
  json_schema: str | Mapping[str, Any] | None  # the whole answer is JSON of this schema
  max_new_tokens: int | None
  stop: str | Sequence[str] | None
  stop_tokens: Sequence[int] | None
  max_seconds: float | None
  num_top: int | None  # how many of the likeliest tokens of each step to report


def load(
  path: str | os.PathLike[str],
  *,
  mesh: str = "data=-1",
  weights: str | None = None,
  cache: str | None = None,
  draft: str | None = None,
  draft_tokens: int | None = None,
  runs_dir: str | os.PathLike[str] = "runs",
  weights_kernel: str | None = None,
) -> "Model":
  """A model, ready to write, score or embed.

  Args:
    path: a run's directory, or its name below `runs_dir`; or a checkpoint of others: a
      folder of Hugging Face's files, a GGUF file, or a name on the hub, as org/name, that
      the local cache has (`flaxlm import --download` gets it). It is imported once.
    mesh: the devices, as in `fsdp=2`; by default all of them share the rows of a batch.
    weights: the dtype that matrices are kept in: float32, bfloat16, int8 or int4; None: as
      in the run.
    cache: `int8` keeps keys and values so.
    draft: a smaller run that guesses tokens ahead, or `ngram`.
    draft_tokens: how many it guesses at a time.
    weights_kernel: `pallas` for a kernel of narrow weights, on one NVIDIA GPU.

  Warns of damaged checkpoints, which are skipped. Raises `CheckpointError` if there is no
  such run, or it is not whole, and `ConfigError` for what it cannot have.
  """
  if not isinstance(runs_dir, (str, os.PathLike)):
    raise ConfigError(f"runs_dir is {reprlib.repr(runs_dir)}", "use a string")
  named, below = find_model(path, os.fspath(runs_dir)), os.fspath(runs_dir)
  sizes = parse_mesh(mesh)
  for flag in start_jax(None, data_dir() / "xla"):
    logging.getLogger("flaxlm").info(flag.line)
  devices = make_mesh(sizes)
  if not is_file(named / CONFIG) or is_a_hubs(named):
    named, notes = import_once(named, devices)
    for note in notes:
      warn(note)
  run = load_run(named, devices, warn)
  drafted = (draft, draft_tokens, below)
  return Model(equip_for_decoding(run, weights, cache, *drafted, weights_kernel))


def find_model(path: str | os.PathLike[str], runs_dir: str) -> Path:
  """The directory of the run, or the checkpoint of others, that `path` names.

  Raises `CheckpointError` if it names none.
  """
  if not isinstance(path, (str, os.PathLike)):
    raise ConfigError(f"the path of a run is {reprlib.repr(path)}", "use a string")
  name = str(Path(path).expanduser())
  try:
    return find_run(name, runs_dir)
  except CheckpointError:
    source = find_source(name)
    if not (is_file(source) or is_file(source / CONFIG)):
      raise
    return source


def warn(line: str) -> None:
  warnings.warn(line, stacklevel=3)


class Model:
  """A run that writes, scores and embeds; `load` opens one.

  `run` is what the functions of `flaxlm.decoding` take.
  """

  def __init__(self, run: Run):
    self.run = run
    self._past = RowStore(run.model.cfg)  # of chats: the next turn reads only what is new

  def __repr__(self) -> str:
    run = self.run
    return f"<flaxlm.Model {run.path} at step {run.step}, {run.cfg.model.family}>"

  @property
  def tokenizer(self) -> AnyTokenizer:
    return self.run.tokenizer

  # -- Writing -----------------------------------------------------------------------------

  @overload
  def generate(  # type: ignore[overload-overlap]  # a string is a sequence of strings
    self, prompts: str, *, num_samples: None = None, **options: Unpack[Options]
  ) -> "Completion": ...
  @overload
  def generate(
    self,
    prompts: Sequence[str],
    *,
    num_samples: int | None = None,
    **options: Unpack[Options],
  ) -> list["Completion"]: ...
  def generate(
    self,
    prompts: str | Sequence[str],
    *,
    num_samples: int | None = None,
    **options: Unpack[Options],
  ) -> Any:
    """Continues a prompt, or each of a list; an encoder-decoder reads them instead.

    A string gives one completion, a list of strings a list. With `num_samples` it is always
    a list: so many completions of each prompt, prompt by prompt. They are those of `flaxlm
    infer` with the same settings. Raises `ConfigError` for options that are wrong, and for
    an encoder.
    """
    asked = self._read_options(options)
    texts, most = as_texts(prompts), 1 if num_samples is None else num_samples
    check_count("num_samples", most, MOST_SAMPLES)
    if not texts:
      return []
    found = complete_samples(
      *(self.run, texts, asked.settings, most, asked.max_new_tokens, asked.stop),
      num_top=asked.num_top,
    )
    shown = [self._shown(completion) for completion in found]
    return shown[0] if isinstance(prompts, str) and num_samples is None else shown

  def stream(self, prompt: str, **options: Unpack[Options]) -> Iterator[str]:
    """The pieces of one completion as soon as no later token can change them; together they
    are the text that `generate` returns. Whoever asks for no more stops it."""
    if not isinstance(prompt, str):
      raise ConfigError(f"the prompt is {reprlib.repr(prompt)}", "stream a single string")
    asked, texts = self._read_options(options), as_texts(prompt)
    request = make_request(self.run, texts, asked.max_new_tokens, asked.num_top)
    request.check(self.run.model.cfg)
    growing = grow_completions(self.run, request, texts, [asked.settings], asked.stop)
    return (piece for _, piece in growing)

  def chat(
    self,
    messages: Sequence[Message],
    tools: Sequence[Tool] | None = None,
    **options: Unpack[Options],
  ) -> "Answer":
    """What the assistant says next, as a message to append.

    `messages` have a `role` and `content`, `tools` are JSON schemas of functions; the run's
    chat template writes both. Turns that do not fit the context are dropped from the
    oldest, with a warning. Raises `ConfigError` for what is no conversation, or for a run
    without a template.
    """
    asked = self._read_options(options)
    if self._chat is None:
      raise ConfigError(f"{self.run.path} has no chat template", "use generate")
    prompt = prompt_for(self._chat, self.run, messages, tools, asked.max_new_tokens)
    if prompt.num_dropped:
      warnings.warn(
        f"the conversation is longer than model.context={self.run.model.cfg.context}: "
        f"turns dropped, from the oldest: {prompt.num_dropped}",
        stacklevel=2,
      )
    text = as_texts(prompt.text, "conversation")
    request = make_request(
      self.run, text, asked.max_new_tokens, asked.num_top, has_specials=True
    )
    (completion,) = complete_request(
      self.run, request, text, [asked.settings], asked.stop, past=self._past
    )
    return Answer(self._shown(completion))

  @functools.cached_property
  def _chat(self) -> Chat | None:
    return load_chat(self.run.path)

  def _read_options(self, options: Mapping[str, Any]) -> "Asked":
    if self.run.cfg.model.family == "encoder":
      raise ConfigError(
        f"{self.run.path} is an encoder: it writes no text", "embed is what it is for"
      )
    return read_options(options)

  def _shown(self, found: completions.Completion) -> "Completion":
    shown = Completion(**vars(found))
    shown.tokenizer = self.tokenizer
    return shown

  # -- Reading -----------------------------------------------------------------------------

  @overload
  def score(self, texts: str) -> "Score": ...  # type: ignore[overload-overlap]
  @overload
  def score(self, texts: Sequence[str] | Sequence[Pair]) -> list["Score"]: ...
  def score(self, texts: str | Sequence[str] | Sequence[Pair]) -> Any:
    """How likely a text is, or each of a list; or each (context, continuation) of a list.

    They are scored as `flaxlm eval --tasks` does: the first token of a text, too, given the
    token that begins texts; a text longer than the context in windows. An encoder-decoder
    reads the contexts, and scores no text by itself. Raises `ConfigError`.
    """
    some, tokenizer = as_list(texts, "text"), self.tokenizer
    if has_pairs(some):
      pairs = encode_pairs(self.run, some)
      rows = [[*pair.continuation] for pair in pairs]
      found = score_tokens(self.run, pairs, each=True)
    else:
      rows = [tokenizer.encode(text) for text in as_texts(some, "text")]
      found = score_rolling(self.run, rows, each=True)
      some = [("", text) for text in some]
    scores = [
      Score(before, text, ids, [*x.logprobs], x.logprob, x.is_greedy, x.num_cut, tokenizer)
      for (before, text), ids, x in zip(some, rows, found, strict=True)
    ]
    return scores[0] if isinstance(texts, str) else scores

  def embed(self, texts: str | Sequence[str], *, normalise: bool = False) -> np.ndarray:
    """The vector (D,) of a text, or (B, D) of a list of them, as `flaxlm embed` gives it;
    with `normalise` its length is 1. Raises `ConfigError` if the run is not an encoder."""
    rows = as_texts(texts, "text")
    if not rows:
      raise ConfigError("there is no text", "give at least one")
    vectors_BD = np.stack(embed_texts(self.run, rows, normalise, warn))
    return vectors_BD[0] if isinstance(texts, str) else vectors_BD

  def look(
    self,
    subject: Literal["attention", "tokens", "embeddings"],
    text: str | None = None,
    *,
    source: str | None = None,
  ) -> "Picture":
    """The page of `flaxlm look SUBJECT`, which a notebook shows in a frame.

    `text` is what the model reads, and an encoder-decoder writes for its `source`; the
    embeddings are those of the model, whatever it reads. Raises `ConfigError`.
    """
    run = self.run
    for name, value in (("text", text), ("source", source)):
      if value is not None and not isinstance(value, str):
        raise ConfigError(f"{name} is {reprlib.repr(value)}", "use a string")
    if subject == "embeddings":
      if text is not None or source is not None:
        raise ConfigError("the embeddings are of no text", "leave it out")
      return Picture(*look_embeddings(run))
    if subject not in [*MOST_SEEN]:  # which compares, and hashes nothing
      known = ", ".join((*MOST_SEEN, "embeddings"))
      raise ConfigError(f"there is no picture of {subject!r}", f"there are {known}")
    if subject == "attention":
      check_attention(run.model.cfg, None, None)
    most = MOST_SEEN[subject]
    reading = make_reading(run.model.cfg, self.tokenizer, text, source, most)
    views = {"attention": look_attention, "tokens": look_tokens}
    return Picture(*views[subject](run, reading, most))


# -- What is given back --------------------------------------------------------------------


class Completion(completions.Completion):
  """A completion that a notebook shows with its tokens coloured by surprise."""

  tokenizer: AnyTokenizer  # no field: neither `as_json` nor == has it

  def _repr_html_(self) -> str:
    return surprise_html(self.tokenizer, self.tokens, self.logprobs, self.prompt)


class Answer(dict[str, Any]):
  """The assistant's message, with the `completion` that it is the text of."""

  def __init__(self, completion: Completion):
    super().__init__(role="assistant", content=completion.completion)
    self.completion = completion

  def _repr_html_(self) -> str:
    written = self.completion
    return surprise_html(written.tokenizer, written.tokens, written.logprobs)


class Score(NamedTuple):
  """How likely a text is after a context; a notebook colours its tokens by surprise."""

  context: str
  text: str
  tokens: list[int]
  logprobs: list[float]  # of each token, in nats
  logprob: float  # their sum
  is_greedy: bool  # greedy decoding would write the text
  num_cut: int  # tokens of the context that did not fit the model
  tokenizer: AnyTokenizer

  def _repr_html_(self) -> str:
    return surprise_html(self.tokenizer, self.tokens, self.logprobs, self.context)


class Picture(View):
  """A page of `flaxlm look`; its `figures` are numbers. Nothing in it leads out of it."""

  def save(self, path: str | os.PathLike[str]) -> None:
    """Writes a .html or .png file. Raises `ConfigError` if it cannot be written."""
    if not isinstance(path, (str, os.PathLike)):
      raise ConfigError(f"the path of a picture is {reprlib.repr(path)}", "use a string")
    check_output(Path(path))
    save_view(self, Path(path))

  def _repr_html_(self) -> str:
    page = html.escape(to_html(self)).replace("\n", "&#10;")
    return (
      f'<iframe title="{html.escape(self.title)}" srcdoc="{page}" sandbox="allow-scripts" '
      'style="width:100%;height:640px;border:0"></iframe>'
    )


# -- What is asked -------------------------------------------------------------------------


class Asked(NamedTuple):
  """`Options`, read and checked."""

  settings: SamplingSettings
  stop: Stopping
  max_new_tokens: int | None
  num_top: int


def read_options(options: Mapping[str, Any]) -> Asked:
  """Raises `ConfigError` for an option that is wrong, or that there is not."""
  for name in options:
    if name not in Options.__annotations__:
      near = difflib.get_close_matches(name, Options.__annotations__, 1)
      known = f"the options are {', '.join(Options.__annotations__)}"
      raise ConfigError(
        f"unknown option {name}", f"did you mean {near[0]}?" if near else known
      )
  given = {name: value for name, value in options.items() if value is not None}
  stop = Stopping(
    strings=given.pop("stop", ()),
    tokens=given.pop("stop_tokens", ()),
    max_seconds=given.pop("max_seconds", None),
  )
  stop.check()
  max_new_tokens, num_top = given.pop("max_new_tokens", None), given.pop("num_top", 0)
  if max_new_tokens is not None:
    check_count("max_new_tokens", max_new_tokens, MOST_NEW_TOKENS)
  if not is_number(num_top, whole=True):
    raise ConfigError(f"num_top is {reprlib.repr(num_top)}", "use a whole number")
  regex = regex_of_form(given.pop("regex", None), given.pop("json_schema", None))
  settings = SamplingSettings(**{"temperature": DEFAULT_TEMPERATURE, **given}, regex=regex)
  settings.check()
  if regex is not None:
    check_expressions([regex])
  return Asked(settings, stop, max_new_tokens, num_top)


def has_pairs(texts: Any) -> bool:
  """Whether these are pairs, not texts. Raises `ConfigError` for pairs that are none."""
  are_pairs = [isinstance(text, (tuple, list)) and len(text) == 2 for text in texts]
  if any(are_pairs) and not all(are_pairs):
    wrong = are_pairs.index(False)
    raise ConfigError(
      f"pair {wrong + 1} is {reprlib.repr(texts[wrong])}", "use (context, continuation)"
    )
  return any(are_pairs)
