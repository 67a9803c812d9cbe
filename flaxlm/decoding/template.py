# SPDX-License-Identifier: Apache-2.0
"""A program that renders one chat template, within limits of time and memory.

A template is a program that came with a checkpoint: it may loop for ever, or ask for all
the memory there is. `flaxlm.decoding.chat` starts this one with a JSON object on stdin, and
reads another from stdout. Templates have here what transformers' `apply_chat_template`
gives them, in jinja2's sandbox.
"""

import json
import resource
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace


class Generation(Extension):
  """`{% generation %}`: what an assistant wrote, which training looks for. Its body is
  rendered, in a scope of its own."""

  tags = {"generation"}  # noqa: RUF012 - as in jinja2

  def parse(self, parser: Parser) -> nodes.CallBlock:
    line = next(parser.stream).lineno
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    call = self.call_method("_render")
    return nodes.CallBlock(call, [], [], body).set_lineno(line)

  def _render(self, caller: Callable[[], str]) -> str:
    return caller()


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


def render(template: str, values: dict[str, Any], max_characters: int) -> str:
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
  pieces, size = [], 0
  for piece in environment.from_string(template).generate(**values):
    pieces.append(piece)
    size += len(piece)
    if size > max_characters:
      raise jinja2.TemplateError(f"it writes more than {max_characters:,} characters")
  return "".join(pieces)


def limit(kind: int, most: int) -> None:
  """Lowers a limit of this process to `most`, if it is not lower already."""
  _, hard = resource.getrlimit(kind)
  resource.setrlimit(kind, (most if hard < 0 else min(most, hard), hard))


def explain(error: BaseException, max_bytes: int) -> str:
  """One line that says why a template failed."""
  if isinstance(error, MemoryError):
    return f"it needs more than {max_bytes >> 20} MB"
  text = " ".join(str(error).split())[:300]
  if isinstance(error, jinja2.TemplateSyntaxError):
    return f"line {error.lineno}: {text}"
  return (
    text if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {text}"
  )


def main() -> None:
  job = json.load(sys.stdin)
  limit(resource.RLIMIT_CORE, 0)
  limit(resource.RLIMIT_CPU, job["max_seconds"])
  limit(resource.RLIMIT_AS, job["max_bytes"])
  try:
    answer = {"text": render(job["template"], job["values"], job["max_characters"])}
  except Exception as e:
    answer = {"error": explain(e, job["max_bytes"])}
  json.dump(answer, sys.stdout)


if __name__ == "__main__":
  main()
