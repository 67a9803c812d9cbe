# SPDX-License-Identifier: Apache-2.0
"""A program that renders chat templates, within limits of time and memory.

A template is a program that came with a checkpoint: it may loop for ever, or ask for all
the memory there is. `flaxlm.chat.process` starts this one, and says on stdin, a JSON value
a line, first what the limits and the templates are, then which conversations to render,
several at a time. A line of stdout answers each conversation. Templates have here what
transformers' `apply_chat_template` gives them, in jinja2's sandbox.
"""

import contextlib
import json
import math
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any, NamedTuple

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace


class Generation(Extension):
  """`{% generation %}`: what an assistant wrote, which training looks for. Its body is
  rendered, in a scope of its own; where it stands is kept, as in transformers."""

  tags = {"generation"}  # noqa: RUF012 - as in jinja2

  def __init__(self, environment: jinja2.Environment):
    super().__init__(environment)
    self.is_used = False  # by the template
    self.size = 0  # characters that are written so far
    self.spans: list[Span] = []

  def parse(self, parser: Parser) -> nodes.CallBlock:
    self.is_used = True
    line = next(parser.stream).lineno
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    call = self.call_method("_render")
    return nodes.CallBlock(call, [], [], body).set_lineno(line)

  def _render(self, caller: Callable[[], str]) -> str:
    text = caller()
    self.spans.append((self.size, self.size + len(text)))
    return text


Span = tuple[int, int]  # characters of a text, the end excluded
Learnt = tuple[str, list[Span]]  # a text, and what an assistant wrote in it


class Limits(NamedTuple):
  """What rendering one conversation may take."""

  seconds: int  # of a processor
  wait_seconds: float
  bytes: int  # of memory, of the whole process
  characters: int


def num_common(a: str, b: str) -> int:
  """How many characters two texts begin with alike."""
  if b.startswith(a):
    return len(a)
  pairs = enumerate(zip(a, b, strict=False))
  return next((n for n, (x, y) in pairs if x != y), min(len(a), len(b)))


class PlainDict:
  """`dict` without the attributes of a class, through which a sandbox is left."""

  def __call__(self, *args: Any, **kwargs: Any) -> dict:
    return dict(*args, **kwargs)

  def fromkeys(self, *args: Any) -> dict:
    return dict.fromkeys(*args)


class PlainNamespace(Namespace):
  """`namespace` without names that begin with an underscore."""

  def __init__(*args: Any, **kwargs: Any):  # a template may have a name `self`
    self, *given = args
    for name in (values := dict(*given, **kwargs)):
      check_name(name)
    Namespace.__init__(self, values)

  def __setitem__(self, name: str, value: Any) -> None:
    check_name(name)
    super().__setitem__(name, value)


def check_name(name: Any) -> None:
  if isinstance(name, str) and name.startswith("_"):
    raise jinja2.TemplateError(f"a namespace cannot have the name {name}")


def to_json(
  value: Any,
  ensure_ascii: bool = False,
  indent: int | None = None,
  separators: tuple[str, str] | None = None,
  sort_keys: bool = False,
) -> str:
  """The filter `tojson`. Jinja's own one escapes for HTML and sorts the keys."""
  return json.dumps(
    value,
    ensure_ascii=ensure_ascii,
    indent=indent,
    separators=separators,
    sort_keys=sort_keys,
    allow_nan=True,  # as in transformers: what a model is to see
  )


def raise_exception(message: str) -> None:
  raise jinja2.TemplateError(message)


class Template:
  """A compiled template."""

  def __init__(self, text: str, max_characters: int):
    environment = ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {
      "raise_exception": raise_exception,
      "strftime_now": lambda format: datetime.now().strftime(format),
      "dict": PlainDict(),
      "namespace": PlainNamespace,
    }
    self.max_characters = max_characters
    self.template = environment.from_string(text)
    extension = environment.extensions[Generation.identifier]
    assert isinstance(extension, Generation)
    self.generation = extension

  def render(self, values: dict[str, Any]) -> str:
    generation, pieces = self.generation, []
    generation.size, generation.spans = 0, []
    for piece in self.template.generate(**values):
      pieces.append(piece)
      generation.size += len(piece)
      if generation.size > self.max_characters:
        raise jinja2.TemplateError(
          f"it writes more than {self.max_characters:,} characters"
        )
    return "".join(pieces)

  def learn(self, values: dict[str, Any], since: int) -> list[Learnt]:
    """A conversation as texts to learn from, with the places of what an assistant wrote.

    That is what the template marks; of a template without marks, what an answer adds to
    the prompt for it. Most conversations are one text. A template may write a turn
    otherwise when others follow, as those that leave out earlier thoughts: the answers that
    the last text does not begin with have texts of their own. Messages before the one with
    the number `since`, from 0, are not learnt.
    """
    if self.generation.is_used:
      text, spans = self.render(values), self.generation.spans
      if since:
        before = values["messages"][:since]
        prompt = self.render({**values, "messages": before, "add_generation_prompt": True})
        start = num_common(prompt, text)
        spans = [span for span in spans if span[1] > start]
      return [(text, spans)]
    answers = [*self.answers(values, since)]
    texts: list[Learnt] = []
    while answers:
      last, _ = answers[-1]
      inside = [(text, span) for text, span in answers if last.startswith(text)]
      answers = [(text, span) for text, span in answers if not last.startswith(text)]
      texts.insert(0, (last, [span for _, span in inside]))
    return texts

  def answers(self, values: dict[str, Any], since: int) -> Iterator[tuple[str, Span]]:
    """The conversation up to each of the assistant's messages, and where that one is."""
    messages = values["messages"]
    up_to = lambda n, asks: self.render(
      {**values, "messages": messages[:n], "add_generation_prompt": asks}
    )
    for n, message in enumerate(messages):
      if n < since or message.get("role") != "assistant":
        continue
      text = up_to(n + 1, False)
      try:
        prompt = up_to(n, True)
        start = num_common(prompt, text)
        # The prompt may go on in another way than the answer, but not what is before it.
        is_lost = start < len(prompt) and not text.startswith(up_to(n, False))
      except jinja2.TemplateError as e:
        if n:
          raise
        raise jinja2.TemplateError(f"nothing is before the assistant's message: {e}") from e
      if is_lost:
        raise jinja2.TemplateError(
          f"it writes what is before message {n + 1}, an answer, otherwise than the prompt "
          "for it, and has no {% generation %} marks"
        )
      yield text, (start, len(text))


def limit(kind: int, most: int) -> None:
  """Lowers a limit of this process to `most`, if it is not lower already."""
  _, hard = resource.getrlimit(kind)
  resource.setrlimit(kind, (most if hard < 0 else min(most, hard), hard))


@contextlib.contextmanager
def limited(limits: Limits) -> Iterator[None]:
  """Ends this process if the block takes too long."""
  used = math.ceil(time.process_time())
  limit(resource.RLIMIT_CPU, used + limits.seconds)
  signal.setitimer(signal.ITIMER_REAL, limits.wait_seconds)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)


def explain(error: BaseException, limits: Limits) -> str:
  """One line that says why a template failed."""
  if isinstance(error, MemoryError):
    return f"it needs more than {limits.bytes >> 20} MB"
  text = " ".join(str(error).split())[:300]
  if isinstance(error, jinja2.TemplateSyntaxError):
    return f"line {error.lineno}: {text}"
  return (
    text if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {text}"
  )


def answer(
  job: dict[str, Any], texts: dict[str, str], known: dict[str, Template], limits: Limits
) -> dict[str, Any]:
  """The answer to a job: a prompt's text, or the texts to learn from; or an error."""
  try:
    name = job["template"]
    if name not in known:
      known[name] = Template(texts[name], limits.characters)
    if job["learn"]:
      return {"texts": known[name].learn(job["values"], job["since"])}
    return {"text": known[name].render(job["values"])}
  except Exception as e:
    return {"error": explain(e, limits)}


def main() -> None:
  start = json.loads(sys.stdin.readline())
  limits, known = Limits(**start["limits"]), dict[str, Template]()
  limit(resource.RLIMIT_CORE, 0)
  limit(resource.RLIMIT_AS, limits.bytes)
  for line in sys.stdin:
    for job in json.loads(line):
      with limited(limits):
        answered = json.dumps(answer(job, start["templates"], known, limits))
      print(answered, flush=True)


if __name__ == "__main__":
  main()
