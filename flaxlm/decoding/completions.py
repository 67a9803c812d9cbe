# SPDX-License-Identifier: Apache-2.0
"""Text in, text out: prompts are encoded, continued, and decoded token by token."""

import dataclasses
import reprlib
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, cast

from flaxlm.decoding.beams import beam_search
from flaxlm.decoding.engine import Engine
from flaxlm.decoding.loading import Run
from flaxlm.decoding.prefill import Request
from flaxlm.decoding.prefix_store import RowStore
from flaxlm.decoding.requests import EngineOptions, EngineRequest
from flaxlm.decoding.sampling import (
  SamplingSettings,
  check_count_of,
  is_number,
  stack_settings,
)
from flaxlm.decoding.speculative import speculate
from flaxlm.errors import ConfigError
from flaxlm.tokenizers import AnyTokenizer

DEFAULT_NEW_TOKENS = 128
MOST_ROWS = 256  # of completions that are decoded together
DEFAULT_TEMPERATURE = 0.8  # of what people ask for, if they do not say


@dataclasses.dataclass
class Completion:
  """A prompt and its continuation, which grows token by token."""

  prompt: str
  completion: str = ""
  tokens: list[int] = dataclasses.field(default_factory=list)
  logprobs: list[float] = dataclasses.field(default_factory=list)
  # "stop" (the end of text, a stop string or a stop token), "length" or "time"
  finish_reason: str | None = None
  # On request: the likeliest tokens at each step, with their log-probabilities.
  top_logprobs: list[list[tuple[int, float]]] | None = None

  def as_json(self) -> dict:
    """The fields that are not None, in their order."""
    fields = dataclasses.asdict(self)
    return {name: value for name, value in fields.items() if value is not None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stopping:
  """What ends a completion, besides its length and the end of text."""

  strings: Sequence[str] = ()  # a string alone is one of them
  tokens: Sequence[int] = ()
  max_seconds: float | None = None  # checked between blocks of tokens
  max_tokens: int | None = None  # for a row that shares its batch with longer ones

  def __post_init__(self) -> None:
    # Frozen, but what was given may be another kind of list, or a string alone.
    object.__setattr__(self, "strings", tuple(as_texts(self.strings, "stop string")))
    if not isinstance(self.tokens, Iterable):
      raise ConfigError(f"stop-tokens are {reprlib.repr(self.tokens)}", "use a list of ids")
    object.__setattr__(self, "tokens", tuple(self.tokens))

  def check(self, num_ids: int | None = None) -> None:
    """Raises `ConfigError` for stops that could never be, such as ids from `num_ids` on."""
    if any(not text for text in self.strings):
      raise ConfigError("a stop string is empty", "leave --stop out")
    for token in self.tokens:
      most = "" if num_ids is None else f", at most {num_ids - 1}"
      is_id = is_number(token, whole=True) and token >= 0
      if not is_id or (num_ids is not None and token >= num_ids):
        raise ConfigError(
          f"stop-token is {reprlib.repr(token)}", f"use an id of the vocabulary{most}"
        )
    seconds = self.max_seconds
    if seconds is not None and not (is_number(seconds) and seconds > 0):
      raise ConfigError(f"max-seconds is {reprlib.repr(seconds)}", "use more than 0")


def as_texts(texts: str | Sequence[str], what: str = "prompt") -> list[str]:
  """A list of texts; a string alone is one text, not its characters.

  Raises `ConfigError` for what is no text: other types, and halves of a surrogate pair, as
  Python makes them of a command line that is not UTF-8.
  """
  texts = as_list(texts, what)
  for number, text in enumerate(texts, 1):
    if not isinstance(text, str):
      raise ConfigError(f"{what} {number} is {reprlib.repr(text)}", "use a string")
    try:
      text.encode("utf-8")
    except UnicodeEncodeError as e:
      raise ConfigError(
        f"{what} {number} is not UTF-8: see its character {e.start + 1}", "convert it"
      ) from e
  return texts


def as_list(texts: Any, what: str) -> list[Any]:
  """What a list has, or a string alone. Raises `ConfigError` for what is neither."""
  if not isinstance(texts, Iterable):
    raise ConfigError(f"the {what} is {reprlib.repr(texts)}", "use a string, or a list")
  return [texts] if isinstance(texts, str) else [*texts]


def complete_samples(
  run: Run,
  prompts: str | Sequence[str],
  settings: SamplingSettings,
  num_samples: int = 1,
  max_new_tokens: int | None = None,
  stop: str | Sequence[str] | Stopping = (),
  on_text: Callable[[int, str], None] | None = None,
  num_top: int = 0,
) -> list[Completion]:
  """`num_samples` completions of each prompt, prompt by prompt, each with draws of its own.

  The settings are those of all rows; see `complete` for the other arguments.
  """
  prompts = as_texts(prompts)
  drawing = [
    of_sample
    for row in range(len(prompts))
    for of_sample in dataclasses.replace(settings, row=row).for_samples(num_samples)
  ]
  return complete(
    run,
    [prompt for prompt in prompts for _ in range(num_samples)],
    drawing,
    max_new_tokens,
    stop,
    on_text,
    num_top,
  )


def complete(
  run: Run,
  prompts: str | Sequence[str],
  settings: Sequence[SamplingSettings],
  max_new_tokens: int | None = None,
  stop: str | Sequence[str] | Stopping | Sequence[Stopping] = (),
  on_text: Callable[[int, str], None] | None = None,
  num_top: int = 0,
) -> list[Completion]:
  """Continues each prompt until the end of text, a stop, or its length.

  Args:
    prompts: texts to continue, or one.
    settings: as many as there are prompts; see `same_settings`.
    stop: stop strings for all rows, or a `Stopping` for all or for each of them.
    on_text: `on_text(row, piece)` is called with new text as soon as no later token can
      change it; the pieces of a row add up to its completion.
    num_top: how many of the likeliest tokens to report at each step.
  """
  prompts = as_texts(prompts)
  request = make_request(run, prompts, max_new_tokens, num_top)
  return complete_request(run, request, prompts, settings, stop, on_text)


def complete_request(
  run: Run,
  request: Request,
  prompts: Sequence[str],
  settings: Sequence[SamplingSettings],
  stop: str | Sequence[str] | Stopping | Sequence[Stopping] = (),
  on_text: Callable[[int, str], None] | None = None,
  past: RowStore | None = None,
) -> list[Completion]:
  """`complete` for ids that are known already; `prompts` are what the results are for.

  In a conversation its `past` keeps what is read and written for the next turn.
  """
  growing = grow_completions(run, request, prompts, settings, stop, past)
  while True:
    try:
      row, piece = next(growing)
    except StopIteration as e:
      return e.value
    if on_text is not None:
      on_text(row, piece)


def grow_completions(
  run: Run,
  request: Request,
  prompts: Sequence[str],
  settings: Sequence[SamplingSettings],
  stop: str | Sequence[str] | Stopping | Sequence[Stopping] = (),
  past: RowStore | None = None,
) -> Generator[tuple[int, str], None, list[Completion]]:
  """`complete_request` a piece at a time: yields (row, new text) as soon as no later token
  can change it, and returns the completions. Whoever asks for no more stops it."""
  started = time.monotonic()
  request.check(run.model.cfg)
  stops = stopping_of_rows(stop, len(prompts), run.num_ids)
  check_count_of(settings, len(prompts))
  rows = [
    GrowingCompletion(Completion(prompt), run.tokenizer, row_stop)
    for prompt, row_stop in zip(prompts, stops, strict=True)
  ]
  if run.draft is None:
    asked = [
      (row.request(request, of_row, number), row)
      for number, (row, of_row) in enumerate(zip(rows, settings, strict=True))
    ]
    for number, piece in answer_all(engine_for(run, len(rows), past), asked, started):
      if piece:
        yield number, piece
  else:
    yield from _grow_together(run, request, rows, settings, started)
  return [row.result for row in rows]


def engine_for(run: Run, count: int, past: RowStore | None = None) -> Engine:
  """An engine for so many answers, all of which are known at the start."""
  rows = min(count, MOST_ROWS)
  options = EngineOptions(rows=rows, most_read=None, whole_rows=True)
  same = run.model, run.params, run.num_ids, run.mesh, run.tokenizer
  return Engine(*same, options, past)


def _grow_together(
  run: Run,
  request: Request,
  rows: Sequence["GrowingCompletion"],
  settings: Sequence[SamplingSettings],
  started: float,
) -> Iterator[tuple[int, str]]:
  """`grow_completions` with a draft: rows begin and end together."""
  assert run.draft is not None
  sampling = stack_settings(settings, run.tokenizer)
  same = run.model, run.params, request, sampling, run.draft, run.mesh
  for block in speculate(*same):
    seconds = time.monotonic() - started
    for i, row in enumerate(rows):
      piece = row.extend(*(x_BT[i].tolist() for x_BT in block[:-1]))
      if row.stop.max_seconds is not None and seconds >= row.stop.max_seconds:
        piece += row.finish("time")
      if piece:
        yield i, piece
    if all(row.result.finish_reason for row in rows):
      break
  for i, row in enumerate(rows):
    if piece := row.finish("length"):
      yield i, piece


def answer_all(
  engine: Engine,
  answers: Iterable[tuple[EngineRequest, "GrowingCompletion"]],
  started: float | None = None,
) -> Iterator[tuple[int, str]]:
  """Yields (place of an answer, its new text) as answers grow.

  With the last piece of an answer, which may be empty, it has its `finish_reason`. Answers
  are asked for when there is room for them. The time of each counts from `started`, or from
  its first token. Raises `NonFiniteError`.
  """
  asked: dict[int, tuple[int, GrowingCompletion]] = {}
  since: dict[int, float] = {}
  waiting = enumerate(answers)
  following = next(waiting, None)
  while following is not None or not engine.is_idle:
    while following is not None and engine.num_waiting < engine.options.rows:
      place, (request, answer) = following
      asked[engine.submit(request)] = place, answer
      following = next(waiting, None)
    for event in engine.step():
      if event.error is not None:
        raise event.error
      if event.number not in asked:  # its text has ended within the same step
        continue
      place, answer = asked[event.number]
      piece = answer.extend(*event[1:5])
      if event.finish_reason == "length":
        piece += answer.finish("length")
      begun = since.setdefault(event.number, started or time.monotonic())
      seconds = answer.stop.max_seconds
      if seconds is not None and time.monotonic() - begun >= seconds:
        piece += answer.finish("time")
      has_ended = answer.result.finish_reason is not None
      if has_ended:
        engine.cancel(event.number)
        del asked[event.number], since[event.number]
      if piece or has_ended:
        yield place, piece


def stopping_of_rows(
  stop: str | Sequence[str] | Stopping | Sequence[Stopping], count: int, num_ids: int
) -> list[Stopping]:
  """A `Stopping` for each of `count` rows. Raises `ConfigError` if one is wrong."""
  if isinstance(stop, Stopping):
    stops = [stop] * count
  elif stop and all(isinstance(row_stop, Stopping) for row_stop in stop):
    stops = [*stop]
  else:
    stops = [Stopping(strings=cast(Sequence[str], stop))] * count
  if len(stops) != count:
    raise ConfigError(f"there are stops for {len(stops)} rows, and {count} prompts")
  for row_stop in stops:
    row_stop.check(num_ids)
  return stops


def search(
  run: Run,
  prompts: str | Sequence[str],
  num_beams: int,
  alpha: float = 0.6,
  max_new_tokens: int | None = None,
  num_best: int = 1,
) -> list[Completion]:
  """The `num_best` likeliest completions of each prompt by beam search, best first.

  The `logprobs` of each hold one number, its score: see `beam_search`.
  """
  if num_best > num_beams:
    raise ConfigError(
      f"{num_best} completions of {num_beams} beams", f"use {num_best} beams or more"
    )
  prompts = as_texts(prompts)
  request = make_request(run, prompts, max_new_tokens)
  found = beam_search(
    run.model, run.params, request, num_beams, run.tokenizer.eos_id, alpha, run.mesh
  )
  return [
    Completion(
      prompt,
      run.tokenizer.decode(best.tokens),
      best.tokens,
      [best.score],
      "stop" if best.ended else "length",
    )
    for prompt, hypotheses in zip(prompts, found, strict=True)
    for best in hypotheses[:num_best]
  ]


def make_request(
  run: Run,
  prompts: Sequence[str],
  max_new_tokens: int | None,
  num_top: int = 0,
  has_specials: bool = False,
) -> Request:
  """The request for some prompts, which an encoder-decoder reads instead of continuing.

  Without `max_new_tokens`, as many tokens as fit, at most `DEFAULT_NEW_TOKENS`. A prompt
  that `has_specials`, as a chat template writes it, gets none around it.
  """
  tokenizer = run.tokenizer
  if has_specials:
    encoded = [ids.tolist() for ids, _ in tokenizer.encode_chats(prompts)]
  else:
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
  framed = lambda ids, role: ids if has_specials else tokenizer.framed(ids, role)
  sources = None
  if run.cfg.model.family == "encoder_decoder":
    sources = [framed(ids, "source") for ids in encoded]
    starts = [tokenizer.framed([], "prompt") for _ in encoded]
  else:
    starts = [framed(ids, "prompt") for ids in encoded]
  if max_new_tokens is None:
    room = run.model.cfg.context - max(map(len, starts), default=0)
    max_new_tokens = max(1, min(DEFAULT_NEW_TOKENS, room))
  return Request(starts, max_new_tokens, run.num_ids, sources, num_top)


class GrowingCompletion:
  """A completion that takes tokens, and holds back text that may begin a stop string."""

  def __init__(self, result: Completion, tokenizer: AnyTokenizer, stop: Stopping):
    self.result, self.stop = result, stop
    self.ends = {*tokenizer.eos_ids, *stop.tokens}
    self.stream = tokenizer.stream()
    self.num_held = max(map(len, stop.strings), default=1) - 1  # characters
    self.num_shown = 0

  def request(
    self, request: Request, settings: SamplingSettings, row: int = 0
  ) -> EngineRequest:
    """What an engine is asked for this completion of one row of a request."""
    return EngineRequest(
      prompt=request.prompts[row],
      max_new_tokens=self.stop.max_tokens or request.max_new_tokens,
      settings=settings,
      source=None if request.sources is None else request.sources[row],
      num_top=request.num_top,
      stop_tokens=frozenset(self.ends),
    )

  def extend(
    self,
    tokens: list[int],
    logprobs: list[float],
    top_tokens: list[list[int]],
    top_logprobs: list[list[float]],
  ) -> str:
    """Adds the tokens of a block; returns the text that has become certain."""
    result = self.result
    steps = zip(tokens, logprobs, top_tokens, top_logprobs, strict=True)
    for token, logprob, *tops in steps:
      if result.finish_reason is not None:
        break
      result.tokens.append(token)
      result.logprobs.append(logprob)
      if tops[0]:
        result.top_logprobs = [*(result.top_logprobs or []), [*zip(*tops, strict=True)]]
      if token in self.ends:
        self.end("stop")
      else:
        self._add(self.stream.push(token))
      if len(result.tokens) == self.stop.max_tokens:
        self.end("length")
    certain = len(result.completion)
    if result.finish_reason is None:
      certain = max(self.num_shown, certain - self.num_held)
    return self._show(certain)

  def finish(self, reason: str = "length") -> str:
    """Ends a completion whose length or time is used up; returns the rest of its text."""
    self.end(reason)
    return self._show(len(self.result.completion))

  def end(self, reason: str) -> None:
    if self.result.finish_reason is None:
      self._add(self.stream.flush())
      # The flushed text may have completed a stop string.
      self.result.finish_reason = self.result.finish_reason or reason

  def _add(self, piece: str) -> None:
    result = self.result
    start = max(0, len(result.completion) - self.num_held)
    result.completion += piece
    found = [
      at for text in self.stop.strings if (at := result.completion.find(text, start)) >= 0
    ]
    if found:
      result.completion = result.completion[: min(found)]
      result.finish_reason = "stop"

  def _show(self, certain: int) -> str:
    piece = self.result.completion[self.num_shown : certain]
    self.num_shown = max(self.num_shown, certain)
    return piece
