# SPDX-License-Identifier: Apache-2.0
"""Conversations with a run, in its chat template."""

import bisect
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

from flaxlm.chat.templates import Chat, Message, Tool
from flaxlm.decoding.completions import DEFAULT_NEW_TOKENS
from flaxlm.decoding.loading import Run
from flaxlm.errors import ConfigError


class Prompt(NamedTuple):
  """What the model reads before it answers."""

  text: str
  num_tokens: int
  num_dropped: int = 0  # turns that it no longer has room for


class Conversation:
  """The turns of a conversation, of which the oldest go when there is no more room.

  A turn is what the user says and what the assistant answers. The system's message stays.
  """

  def __init__(
    self,
    chat: Chat,
    run: Run,
    system: str | None = None,
    tools: Sequence[Tool] | None = None,
  ):
    self.chat, self.run, self.tools = chat, run, tools
    self.system = [] if system is None else [{"role": "system", "content": system}]
    self.turns: list[list[Message]] = []

  def ask(self, text: str, max_new_tokens: int | None = None) -> Prompt:
    """Adds what the user says; returns the prompt for the answer.

    Turns are dropped until prompt and answer fit into the model's context. Raises
    `ConfigError`, and leaves the conversation as it was, when the last one does not fit
    alone, or the template leaves the system's message out.
    """
    turns: list[list[Message]] = [*self.turns, [{"role": "user", "content": text}]]
    last, cfg = len(turns) - 1, self.run.model.cfg
    prompt_from = functools.cache(lambda first: self.prompt(turns[first:]))
    wanted = max_new_tokens or min(DEFAULT_NEW_TOKENS, cfg.context // 2)
    least = max_new_tokens or 1  # what nobody has asked for may be shorter
    if cfg.family == "encoder_decoder":  # its answer is not in one context with the prompt
      wanted = least = 0
    room = math.inf if cfg.family == "rnn" else cfg.context
    fits = lambda first: prompt_from(first).num_tokens + wanted <= room
    first = 0 if fits(0) else min(last, bisect.bisect_left(range(last), True, 1, key=fits))
    prompt = prompt_from(first)
    if prompt.num_tokens + least > room:
      raise ConfigError(
        f"a message of {prompt.num_tokens} tokens + {least} new > model.context={room}",
        "shorten it",
      )
    if not all(message["content"].strip() in prompt.text for message in self.system):
      raise ConfigError(
        f"the chat template of {self.chat.path} leaves the system's message out",
        "leave out --system",
      )
    self.turns = turns[first:]
    return prompt._replace(num_dropped=first)

  def prompt(self, turns: Sequence[Sequence[Message]]) -> Prompt:
    messages = [*self.system, *(message for turn in turns for message in turn)]
    text = self.chat.render(messages, self.tools)
    ((ids, _),) = self.run.tokenizer.encode_chats([text])
    return Prompt(text, len(ids))

  def answer(self, text: str) -> None:
    """Adds what the assistant has answered."""
    self.turns[-1].append({"role": "assistant", "content": text})
