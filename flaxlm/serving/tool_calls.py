# SPDX-License-Identifier: Apache-2.0
"""Calls of tools, which a model writes into its text, as OpenAI's API tells them.

The form is that of Hermes 2 Pro, which Qwen 2.5 and 3, SmolLM2 and others have taken over:
`{"name": ..., "arguments": {...}}`, or a list of such objects, between two tags.
"""

import json
from typing import Any, NamedTuple

from flaxlm.chat.templates import Chat
from flaxlm.serving.shapes import tool_call

OPENING, CLOSING = "<tool_call>", "</tool_call>"


def writes_calls(chat: Chat) -> bool:
  """Whether a chat template asks the model for calls in this form."""
  return any(OPENING in template for template in chat.templates.values())


class Part(NamedTuple):
  """What an answer has got more: certain text, and calls that are complete."""

  text: str
  calls: list[dict[str, Any]]


class CallFinder:
  """Takes the calls out of an answer that comes piece by piece.

  What is between the tags and is no call stays text, with its tags. White space before and
  after calls goes. The closing tag may be missing at the end.
  """

  def __init__(self) -> None:
    self.count = 0  # of calls so far
    self._held = ""  # what may be a part of a call
    self._follows_call = False

  def push(self, text: str, is_last: bool = False) -> Part:
    """What has become certain with some more text."""
    self._held += text
    shown, calls = "", list[dict[str, Any]]()
    while True:
      if self._follows_call:
        self._held = self._held.lstrip()
      before, opening, rest = self._held.partition(OPENING)
      inside, closing, after = rest.partition(CLOSING)
      if not opening or not (closing or is_last):
        break
      found = read_calls(inside)
      kept = before.rstrip() if found else before + opening + inside + closing
      shown, self._held = shown + kept, after
      calls += found
      self._follows_call = bool(found) or (self._follows_call and not kept)
    certain = len(self._held) if is_last else certain_length(before, bool(opening))
    if certain:
      self._follows_call = False
    shown, self._held = shown + self._held[:certain], self._held[certain:]
    first, self.count = self.count, self.count + len(calls)
    calls = [tool_call(first + n, call) for n, call in enumerate(calls)]
    return Part(shown, calls)


def certain_length(text: str, is_followed: bool) -> int:
  """How much of a text is in no call, which follows or may have begun at its end."""
  if not is_followed:
    for size in range(min(len(OPENING) - 1, len(text)), 0, -1):
      if OPENING.startswith(text[-size:]):
        text = text[:-size]
        break
  return len(text.rstrip())


def read_calls(text: str) -> list[dict[str, Any]]:
  """The name and arguments of each call; none if the text is anything else."""
  try:
    found = json.loads(text)
  except (ValueError, RecursionError):
    return []
  calls = found if isinstance(found, list) else [found]
  return calls if all(map(is_call, calls)) else []


def is_call(found: Any) -> bool:
  if not isinstance(found, dict) or not found.keys() <= {"name", "arguments"}:
    return False
  arguments = found.get("arguments", {})
  return isinstance(found.get("name"), str) and isinstance(arguments, dict | str)
