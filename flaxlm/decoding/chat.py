# SPDX-License-Identifier: Apache-2.0
"""Conversations with an imported run, in the chat template of its tokenizer."""

import bisect
import functools
import importlib.metadata
import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flaxlm.decoding.completions import DEFAULT_NEW_TOKENS
from flaxlm.decoding.loading import Run
from flaxlm.errors import ConfigError, DataError, first_line
from flaxlm.runs import IMPORTED_FILES, read_imported

TOKENIZER_CONFIG, SPECIAL_TOKENS = "tokenizer_config.json", "special_tokens_map.json"
TEMPLATE, MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates"
DEFAULT, FOR_TOOLS = "default", "tool_use"  # names of templates

# Bounds of a template, far beyond what those of models need.
MAX_SECONDS = 4  # of a processor
MAX_WAIT_SECONDS = 8
MAX_BYTES = 512 * 2**20
MAX_CHARACTERS = 2**24
PROGRAM = Path(__file__).with_name("template.py")
# Templates of others have left the sandboxes of earlier versions.
OLDEST_JINJA = (3, 1, 6)

Message = Mapping[str, Any]  # "role" (system, user, assistant, tool), "content" and others
Tool = Mapping[str, Any]  # the JSON schema of a function that the model may call


class Chat(NamedTuple):
  """The chat templates of a run, by name, and the special tokens that they may write."""

  path: Path
  templates: dict[str, str]
  special_tokens: dict[str, str]  # as in {"bos_token": "<s>"}

  def render(self, messages: Sequence[Message], tools: Sequence[Tool] | None = None) -> str:
    """The prompt for what the assistant says next.

    It has all of its special tokens: it is encoded without adding any. The text is that
    of transformers' `apply_chat_template(add_generation_prompt=True)`. Raises `DataError`
    if the template fails, or needs too much time or memory; `ConfigError` for tools that
    it does not read.
    """
    values = {
      **self.special_tokens,
      # Templates take an absent key better than one without a value.
      "messages": [{k: v for k, v in m.items() if v is not None} for m in messages],
      "tools": None if tools is None else [*tools],
      "documents": None,
      "add_generation_prompt": True,
    }
    try:
      return render(self.choose(tools is not None), values)
    except DataError as e:
      raise DataError(f"the chat template of {self.path} fails: {e.cause}", e.cure) from e

  def choose(self, for_tools: bool) -> str:
    """The template for a conversation with tools, or for one without."""
    names = (FOR_TOOLS, DEFAULT) if for_tools else (DEFAULT,)
    name = next((name for name in names if name in self.templates), None)
    if name is None:
      raise DataError("there is no default", f"it has {', '.join(self.templates)}")
    if for_tools and "tools" not in self.templates[name]:
      raise ConfigError(
        f"the chat template of {self.path} has no place for tools", "leave out --tools"
      )
    return self.templates[name]


def load_chat(run_dir: Path) -> Chat | None:
  """The chat templates of a run; None if it has none.

  Raises `ConfigError` without jinja2, and `DataError` for files that cannot be read.
  """
  templates = load_templates(run_dir)
  if not templates:
    return None
  try:
    found = importlib.metadata.version("jinja2")
  except importlib.metadata.PackageNotFoundError:
    found = "0"
  if tuple(int(part) for part in found.split(".")[:3] if part.isdecimal()) < OLDEST_JINJA:
    raise ConfigError(
      f"the chat template of {run_dir} needs jinja2 {'.'.join(map(str, OLDEST_JINJA))}",
      "pip install 'flaxlm[chat]', or --no-chat",
    )
  return Chat(run_dir, templates, load_special_tokens(run_dir))


def read_settings(path: Path) -> dict[str, Any]:
  """The object in a JSON file; an empty one if there is no file."""
  return read_imported(path, dict) if path.is_file() else {}


def load_templates(run_dir: Path) -> dict[str, str]:
  """The chat templates of a run, by name. Files of their own come before the settings."""
  folder = run_dir / IMPORTED_FILES
  paths = {path.stem: path for path in sorted((folder / MORE_TEMPLATES).glob("*.jinja"))}
  if (folder / TEMPLATE).is_file():
    paths = {DEFAULT: folder / TEMPLATE, **paths}
  try:
    templates = {name: path.read_text("utf-8") for name, path in paths.items()}
  except (OSError, ValueError) as e:
    why = first_line(e)
    raise DataError(f"the chat template in {folder} cannot be read: {why}") from e
  if templates:
    return templates
  said = read_settings(folder / TOKENIZER_CONFIG).get("chat_template")
  one = {"name": DEFAULT, "template": said}
  named: list[Any] = said if isinstance(said, list) else [one]
  try:
    templates = {} if said is None else {one["name"]: one["template"] for one in named}
    if not all(isinstance(x, str) for pair in templates.items() for x in pair):
      raise TypeError
  except (TypeError, KeyError) as e:
    raise DataError(
      f"{folder / TOKENIZER_CONFIG}: chat_template is not a template",
      "it is a text, or a list of objects with a name and a template",
    ) from e
  return templates


def load_special_tokens(run_dir: Path) -> dict[str, str]:
  """The texts of the special tokens that a tokenizer's settings name, as in
  {"bos_token": "<s>"}."""
  folder = run_dir / IMPORTED_FILES
  settings = read_settings(folder / TOKENIZER_CONFIG)
  if "added_tokens_decoder" not in settings:  # an older file: another has the last word
    settings |= read_settings(folder / SPECIAL_TOKENS)
  more = settings.get("extra_special_tokens")
  settings = {**settings, **(more if isinstance(more, dict) else {})}
  texts = {
    name: token.get("content") if isinstance(token, dict) else token
    for name, token in settings.items()
    if name.endswith("_token")
  }
  return {name: text for name, text in texts.items() if isinstance(text, str)}


def render(template: str, values: Mapping[str, Any]) -> str:
  """A template with its values, rendered by a process with bounded time and memory."""
  job = {
    "template": template,
    "values": values,
    "max_seconds": MAX_SECONDS,
    "max_bytes": MAX_BYTES,
    "max_characters": MAX_CHARACTERS,
  }
  too_slow = f"it takes more than {MAX_SECONDS} s"
  try:
    # -P: its folder has modules of ours, which are not for it to import.
    child = subprocess.run(
      [sys.executable, "-P", str(PROGRAM)],
      input=json.dumps(job),
      capture_output=True,
      encoding="utf-8",
      timeout=MAX_WAIT_SECONDS,
    )
    answer = json.loads(child.stdout)
  except subprocess.TimeoutExpired as e:
    raise DataError(too_slow, "--no-chat") from e
  except OSError as e:
    raise DataError(f"no process can be started for it: {e.strerror}") from e
  except ValueError as e:
    died = child.returncode in (-9, -24)  # SIGKILL and SIGXCPU: the limit of time
    raise DataError(too_slow if died else "its process broke down", "--no-chat") from e
  if "text" not in answer:
    raise DataError(answer["error"], "--no-chat")
  return answer["text"]


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
    return Prompt(text, len(self.run.tokenizer.encode(text)))

  def answer(self, text: str) -> None:
    """Adds what the assistant has answered."""
    self.turns[-1].append({"role": "assistant", "content": text})
