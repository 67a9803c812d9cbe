# SPDX-License-Identifier: Apache-2.0
"""Chat templates: which a run or a tokenizer has, and the text that they make of messages.

An imported checkpoint brings its own, as files or in the settings of its tokenizer. A run
that has learnt conversations keeps what it has learnt them in, in `chat.json`.
"""

import collections
import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flaxlm.chat import process
from flaxlm.errors import ConfigError, DataError, FlaxLMError, first_line
from flaxlm.runs import IMPORTED_FILES, read_imported
from flaxlm.tokenizers import AnyTokenizer

CHAT = "chat.json"
TOKENIZER_CONFIG, SPECIAL_TOKENS = "tokenizer_config.json", "special_tokens_map.json"
TEMPLATE, MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates"
DEFAULT, FOR_TOOLS = "default", "tool_use"  # names of templates
ASSISTANT = "assistant"
# Templates of others have left the sandboxes of earlier versions.
OLDEST_JINJA = (3, 1, 6)

ROLES = ("system", "user", ASSISTANT, "tool")  # that `PLAIN` knows
# For tokenizers that come without one. A prompt ends with the end of a line, which few
# tokenizers join with the first word of an answer.
PLAIN = """{{ bos_token }}
{%- for message in messages %}
  {%- if message.role not in ["system", "user", "assistant", "tool"] %}
    {{- raise_exception("there is no role " ~ message.role) }}
  {%- endif %}
  {%- if message.content is not string or message.tool_calls %}
    {{- raise_exception("it writes contents that are texts, and nothing else") }}
  {%- endif %}
  {{- message.role ~ ":\\n" }}
  {%- if message.role == "assistant" %}
    {%- generation %}{{ message.content ~ eos_token }}{% endgeneration %}
  {%- else %}{{ message.content }}{% endif %}
  {{- "\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "assistant:\\n" }}{% endif %}"""

Message = Mapping[str, Any]  # "role" (system, user, assistant, tool), "content" and others
Tool = Mapping[str, Any]  # the JSON schema of a function that the model may call


class Talk(NamedTuple):
  """A conversation."""

  messages: Sequence[Message]
  tools: Sequence[Tool] | None = None
  where: str = ""  # file and line, for errors
  since: int = 0  # the first message, counted from 0, of those that may be learnt


class Learnt(NamedTuple):
  """A text to learn from, and the characters (start, end) that the assistant wrote."""

  text: str
  spans: list[tuple[int, int]]


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
    (text,) = self.prompts([Talk(messages, tools)])
    return text

  def prompts(self, talks: Iterable[Talk]) -> Iterator[str]:
    """The prompt of each conversation, as `render` makes it; one process renders all."""
    return (answer["text"] for _, answer in self._answers(talks, learn=False))

  def render_by(self, renderer: process.Renderer, talk: Talk) -> str:
    """`render` in a process that stays: see `renderer`."""
    job = {"template": self.choose(talk), "values": self.values(talk, True), "learn": False}
    answer = renderer.answer(job)
    if "error" in answer:
      raise self.failure(talk.where, answer["error"], "")
    return answer["text"]

  def renderer(self) -> process.Renderer:
    """A process for many conversations that come one by one; it is closed in the end."""
    return process.Renderer(self.templates)

  def learn(self, talks: Iterable[Talk]) -> Iterator[tuple[Talk, list[Learnt]]]:
    """Each conversation with the texts to learn from, mostly one.

    What the assistant wrote is what the template marks by `{% generation %}`, as
    transformers' `return_assistant_tokens_mask` takes it. Without marks it is what each
    answer adds to the prompt for it, which is found by rendering the turns up to there.
    One process renders them all. Raises what `render` does, when its turn has come.
    """
    for talk, answer in self._answers(talks, learn=True):
      texts = answer["texts"]
      yield talk, [Learnt(text, [(start, end) for start, end in at]) for text, at in texts]

  def _answers(
    self, talks: Iterable[Talk], learn: bool
  ) -> Iterator[tuple[Talk, dict[str, Any]]]:
    waiting: collections.deque[Talk] = collections.deque()
    errors: list[FlaxLMError] = []  # of talks that come after those that wait

    def jobs() -> Iterator[process.Job]:
      try:
        for talk in talks:
          name = self.choose(talk)
          waiting.append(talk)
          values = self.values(talk, asks=not learn)
          job = {"template": name, "values": values, "learn": learn}
          yield {**job, "since": talk.since}
      except FlaxLMError as e:
        errors.append(e)

    for answer in process.answers(self.templates, jobs()):
      if "error" in answer:
        where = waiting[0].where if waiting else ""
        raise self.failure(where, answer["error"], "" if learn or where else "--no-chat")
      yield waiting.popleft(), answer
    if errors:
      raise errors[0]

  def failure(self, where: str, cause: str, cure: str) -> DataError:
    at = where and f"{where}: "
    if self.is_plain:
      knows = f"it knows the roles {', '.join(ROLES)}, and contents that are texts"
      cure = f"{knows}; or {cure}" if cure else knows
    return DataError(f"{at}{self.said} fails: {cause}", cure)

  @property
  def is_plain(self) -> bool:
    """Whether it came with no tokenizer: see `plain_chat`."""
    return self.templates == {DEFAULT: PLAIN}

  @property
  def said(self) -> str:
    """Which template it is, for errors."""
    return (
      "flaxlm's own chat template"
      if self.is_plain
      else (f"the chat template of {self.path}")
    )

  def values(self, talk: Talk, asks: bool) -> dict[str, Any]:
    """What the template can read; it `asks` for an answer, or has them all."""
    return {
      **self.special_tokens,
      # Templates take an absent key better than one without a value.
      "messages": [{k: v for k, v in m.items() if v is not None} for m in talk.messages],
      "tools": None if talk.tools is None else [*talk.tools],
      "documents": None,
      "add_generation_prompt": asks,
    }

  def choose(self, talk: Talk) -> str:
    """The name of the template for a conversation, which may have tools."""
    names = (DEFAULT,) if talk.tools is None else (FOR_TOOLS, DEFAULT)
    name = next((name for name in names if name in self.templates), None)
    if name is None:
      has = f"it has {', '.join(self.templates)}"
      raise self.failure(talk.where, "there is no default", has)
    if talk.tools is not None and "tools" not in self.templates[name]:
      said = f"{self.said} has no place for tools"
      if talk.where:
        raise DataError(f"{talk.where}: {said}", "leave them out")
      raise ConfigError(said, "leave them out")
    return name

  @property
  def fingerprint(self) -> str:
    """A hash of what the text of a conversation depends on."""
    return hashlib.sha256(self.to_json().encode()).hexdigest()

  def to_json(self) -> str:
    """The text of the file from which `load_chat` makes it again."""
    values = {"templates": self.templates, "special_tokens": self.special_tokens}
    return json.dumps(values, indent=2, sort_keys=True, allow_nan=False) + "\n"


def plain_chat(tokenizer: AnyTokenizer, path: Path) -> Chat:
  """The template for a tokenizer that has none: each message is a line with its role, and
  its content. A text begins as the tokenizer's texts do; an answer ends with the end of
  text."""
  names = lambda ids: "".join(tokenizer.name_of(i) or "" for i in ids)
  starts = tokenizer.framed([0], "prompt")[:-1]
  specials = {"bos_token": names(starts), "eos_token": names([tokenizer.eos_id])}
  return Chat(path, {DEFAULT: PLAIN}, specials)


def load_chat(folder: Path) -> Chat | None:
  """The chat templates of a run, or beside a tokenizer.json; None if it has none.

  Raises `ConfigError` without jinja2, and `DataError` for files that cannot be read.
  """
  templates = load_templates(folder)
  if not templates:
    return None
  check_jinja(f"the chat template of {folder}", ", or --no-chat")
  return Chat(folder, templates, load_special_tokens(folder))


def check_jinja(what: str, other_cure: str = "") -> None:
  """Raises `ConfigError` if there is no jinja2 that keeps templates in."""
  try:
    found = importlib.metadata.version("jinja2")
  except importlib.metadata.PackageNotFoundError:
    found = "0"
  if tuple(int(part) for part in found.split(".")[:3] if part.isdecimal()) < OLDEST_JINJA:
    raise ConfigError(
      f"{what} needs jinja2 {'.'.join(map(str, OLDEST_JINJA))}",
      f"pip install 'flaxlm[chat]'{other_cure}",
    )


def read_settings(path: Path) -> dict[str, Any]:
  """The object in a JSON file; an empty one if there is no file."""
  return read_imported(path, dict) if path.is_file() else {}


def read_own(folder: Path, key: str) -> dict[str, str] | None:
  """The texts in the file of a run that has learnt conversations; None if there is none."""
  path = folder / CHAT
  if not path.is_file():
    return None
  texts = read_settings(path).get(key)
  if not isinstance(texts, dict) or not all(isinstance(x, str) for x in texts.values()):
    raise DataError(f"{path} cannot be read: {key} are not texts by their names")
  return texts


def files_of(folder: Path) -> Path:
  """Where the files that came with a tokenizer are: in a run, in a folder of their own."""
  kept = folder / IMPORTED_FILES
  return kept if kept.is_dir() else folder


def load_templates(folder: Path) -> dict[str, str]:
  """The chat templates of a run, or beside a tokenizer.json, by name. Files of their own
  come before the settings."""
  own = read_own(folder, "templates")
  if own is not None:
    return own
  folder = files_of(folder)
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


def load_special_tokens(folder: Path) -> dict[str, str]:
  """The texts of the special tokens that a tokenizer's settings name, as in
  {"bos_token": "<s>"}; `folder` is that of `load_templates`."""
  own = read_own(folder, "special_tokens")
  if own is not None:
    return own
  folder = files_of(folder)
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
