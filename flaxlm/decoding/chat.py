# SPDX-License-Identifier: Apache-2.0
"""Conversations with a run, in its chat template."""

import bisect
import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from flaxlm.chat.templates import Chat, Message, Tool
from flaxlm.data.conversations import MEMBERS, mistakes_of
from flaxlm.decoding.completions import DEFAULT_NEW_TOKENS
from flaxlm.decoding.loading import Run
from flaxlm.errors import ConfigError

SYSTEM = ("system", "developer")  # roles of messages before all turns


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
    self.system: list[Message] = []
    if system is not None:
      self.system = [{"role": "system", "content": system}]
    self.turns: list[list[Message]] = []

  def ask(self, text: str, max_new_tokens: int | None = None) -> Prompt:
    """Adds what the user says; returns the prompt for the answer, as `read` does."""
    return self.read([*self.turns, [{"role": "user", "content": text}]], max_new_tokens)

  def read(self, turns: list[list[Message]], max_new_tokens: int | None = None) -> Prompt:
    """Takes over the turns of a conversation, the last of which is to be answered; returns
    the prompt for the answer.

    Turns are dropped until prompt and answer fit into the model's context. Raises
    `ConfigError`, and leaves the conversation as it was, when the last one does not fit
    alone, or the template leaves the system's message out.
    """
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
    said = [message["content"] for message in self.system]
    if not all(text.strip() in prompt.text for text in said if isinstance(text, str)):
      raise ConfigError(
        f"the chat template of {self.chat.path} leaves the system's message out",
        "say it in the first message of the user",
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


def prompt_for(
  chat: Chat,
  run: Run,
  messages: Sequence[Message],
  tools: Sequence[Tool] | None = None,
  max_new_tokens: int | None = None,
) -> Prompt:
  """The prompt for what the assistant says after some messages.

  A turn begins with what the user says; messages of the system before the first turn stay.
  Raises `ConfigError` for what is no conversation, and as `Conversation.read` does.
  """
  messages = [*messages] if isinstance(messages, tuple) else messages
  mistake = next(mistakes_of(messages, tools, learnt=False), None)
  if mistake is None and not messages:
    mistake = "there is no message"
  if mistake is not None:
    raise ConfigError(mistake, MEMBERS)
  conversation = Conversation(chat, run, tools=tools)
  is_system = lambda message: message["role"] in SYSTEM
  conversation.system = [*itertools.takewhile(is_system, messages)]
  turns: list[list[Message]] = []
  for message in messages[len(conversation.system) :]:
    if message["role"] == "user" or not turns:
      turns.append([])
    turns[-1].append(message)
  return conversation.read(turns or [[]], max_new_tokens)
