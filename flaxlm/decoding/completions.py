# SPDX-License-Identifier: Apache-2.0
"""Text in, text out: prompts are encoded, continued, and decoded as they grow."""

import dataclasses
from collections.abc import Callable, Sequence

from flaxlm.decoding.generate import generate
from flaxlm.decoding.prefill import Request
from flaxlm.decoding.runs import Run
from flaxlm.decoding.sampling import Sampling
from flaxlm.decoding.search import beam_search
from flaxlm.errors import ConfigError
from flaxlm.foreign_tokenizers import AnyTokenizer

DEFAULT_NEW_TOKENS = 128


@dataclasses.dataclass
class Completion:
  """One continued prompt, growing token by token."""

  prompt: str
  completion: str = ""
  tokens: list[int] = dataclasses.field(default_factory=list)
  logprobs: list[float] = dataclasses.field(default_factory=list)
  finish_reason: str | None = None  # "stop": end of text or a stop string; "length"


def complete(
  run: Run,
  prompts: Sequence[str],
  sampling: Sampling,
  max_new_tokens: int | None = None,
  stop: Sequence[str] = (),
  on_text: Callable[[int, str], None] | None = None,
) -> list[Completion]:
  """Continues each prompt until the end of text, a stop string, or the length.

  `on_text(row, piece)` is called with the text that has become certain, as soon as it
  has; the pieces of a row add up to its completion.
  """
  if any(not text for text in stop):
    raise ConfigError("a stop string is empty", "leave --stop out to have none")
  request = make_request(run, prompts, max_new_tokens)
  rows = [_Row(Completion(prompt), run.tokenizer, stop) for prompt in prompts]
  for block in generate(run.model, run.params, request, sampling, run.mesh):
    for i, row in enumerate(rows):
      piece = row.extend(block.tokens_BT[i].tolist(), block.logprobs_BT[i].tolist())
      if piece and on_text is not None:
        on_text(i, piece)
    if all(row.result.finish_reason for row in rows):
      break
  for i, row in enumerate(rows):
    piece = row.finish()
    if piece and on_text is not None:
      on_text(i, piece)
  return [row.result for row in rows]


def search(
  run: Run,
  prompts: Sequence[str],
  num_beams: int,
  alpha: float = 0.6,
  max_new_tokens: int | None = None,
  num_best: int = 1,
) -> list[Completion]:
  """The `num_best` likeliest completions of each prompt by beam search, best first.

  Their `logprobs` hold one number, the hypothesis' score: see `beam_search`.
  """
  if num_best > num_beams:
    raise ConfigError(f"{num_best} of {num_beams} beams", "ask for more beams")
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


def make_request(run: Run, prompts: Sequence[str], max_new_tokens: int | None) -> Request:
  """The prompts as ids; for an encoder-decoder they are what is read, not continued.

  Without `max_new_tokens` it asks for as many as fit, at most `DEFAULT_NEW_TOKENS`.
  """
  tokenizer = run.tokenizer
  encoded = [tokenizer.encode(prompt) for prompt in prompts]
  sources = None
  if run.cfg.model.family == "encoder_decoder":
    sources = [tokenizer.framed(ids, "source") for ids in encoded]
    encoded = [[] for _ in encoded]
  starts = [tokenizer.framed(ids, "prompt") for ids in encoded]
  if max_new_tokens is None:
    room = run.model.cfg.context - max(map(len, starts), default=0)
    max_new_tokens = max(1, min(DEFAULT_NEW_TOKENS, room))
  assert run.model.cfg.vocab_size is not None
  num_ids = min(tokenizer.vocab_size, run.model.cfg.vocab_size)
  return Request(starts, max_new_tokens, num_ids, sources)


class _Row:
  """A completion and its text so far; holds back what may begin a stop string."""

  def __init__(self, result: Completion, tokenizer: AnyTokenizer, stop: Sequence[str]):
    self.result, self.stop, self.eos_ids = result, stop, tokenizer.eos_ids
    self.stream = tokenizer.stream()
    self.held = max(map(len, stop), default=1) - 1
    self.shown = 0

  def extend(self, tokens: list[int], logprobs: list[float]) -> str:
    """Takes a block's tokens; returns the text that has become certain."""
    result = self.result
    for token, logprob in zip(tokens, logprobs, strict=True):
      if result.finish_reason is not None:
        break
      result.tokens.append(token)
      result.logprobs.append(logprob)
      if token in self.eos_ids:
        self._end("stop", self.stream.flush())
      else:
        self._add(self.stream.push(token))
    certain = len(result.completion)
    if result.finish_reason is None:
      certain = max(self.shown, certain - self.held)
    return self._show(certain)

  def finish(self) -> str:
    """Ends a row that used up its length; returns the rest of its text."""
    if self.result.finish_reason is None:
      self._end("length", self.stream.flush())
    return self._show(len(self.result.completion))

  def _end(self, reason: str, rest: str) -> None:
    self._add(rest)
    self.result.finish_reason = self.result.finish_reason or reason

  def _add(self, piece: str) -> None:
    result = self.result
    start = max(0, len(result.completion) - self.held)
    result.completion += piece
    found = [at for text in self.stop if (at := result.completion.find(text, start)) >= 0]
    if found:
      result.completion = result.completion[: min(found)]
      result.finish_reason = "stop"

  def _show(self, certain: int) -> str:
    piece = self.result.completion[self.shown : certain]
    self.shown = max(self.shown, certain)
    return piece
