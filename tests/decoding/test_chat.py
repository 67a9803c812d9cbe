# SPDX-License-Identifier: Apache-2.0
"""Chats: prompts as transformers writes them, templates within bounds, long talks."""

import argparse
import io
import json
from pathlib import Path
from typing import Any

import pytest
from chat_templates import TEMPLATES
from conftest import slow_but, with_transformers
from test_completions import make_run
from tiny_tokenizers import llama

from flaxlm.chat import process
from flaxlm.chat.templates import Chat, Talk, load_chat, load_special_tokens
from flaxlm.commands import infer
from flaxlm.decoding import engine
from flaxlm.decoding.chat import Conversation
from flaxlm.decoding.completions import (
  Stopping,
  complete_request,
  grow_completions,
  make_request,
)
from flaxlm.decoding.loading import Run
from flaxlm.decoding.sampling import GREEDY
from flaxlm.errors import ConfigError, DataError
from flaxlm.runs import IMPORTED_FILES
from flaxlm.tokenizers.imported import ImportedTokenizer, Specials

TEMPLATE = (
  "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}"
  "{{ raise_exception('no tools') }}{% endif %}<{{ m.role }}>{{ m.content }}{{ eos_token }}"
  "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
  "one": [{"role": "user", "content": "<b> & 'é' hi\n"}],
  "three": [
    {"role": "system", "content": "Be brief.\n\n"},
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "<think>hm</think>\n\n sat ", "tool_calls": None},
    {"role": "user", "content": "a hat"},
  ],
  "called": [
    {"role": "user", "content": "what is 漢字?"},
    {
      "role": "assistant",
      "tool_calls": [{"function": {"name": "find", "arguments": {"text": "<é>", "a": 1}}}],
    },
    {"role": "tool", "content": {"z": 1, "found": ["'"]}},
  ],
}
TOOLS = [
  {
    "type": "function",
    "function": {
      "name": "find",
      "description": "Finds <text> & 'more'.",
      "parameters": {
        "type": "object",
        "properties": {
          "text": {"type": "string"},
          "ids": {"type": "array", "items": {"type": "integer"}},
        },
        "required": ["text"],
      },
    },
  }
]


def store(folder: Path, **settings: Any) -> Path:
  """An imported run's folder, with the settings of its tokenizer."""
  (folder / IMPORTED_FILES).mkdir(exist_ok=True)
  path = folder / IMPORTED_FILES / "tokenizer_config.json"
  path.write_text(json.dumps(settings), "utf-8")
  return folder


def chat_of(template: str, **special_tokens: str) -> Chat:
  return Chat(Path("nowhere"), {"default": template}, special_tokens)


# -- Templates -----------------------------------------------------------------------------


def test_a_run_without_a_template_has_no_chat(tmp_path: Path):
  assert load_chat(tmp_path) is None
  assert load_chat(store(tmp_path)) is None


@pytest.mark.parametrize(
  "text",
  ["[", "[]", '{"chat_template": 3}', '{"chat_template": [{"name": "x"}]}', "[" * 9999],
)
def test_a_damaged_file_is_refused(tmp_path: Path, text: str):
  store(tmp_path)
  (tmp_path / IMPORTED_FILES / "tokenizer_config.json").write_text(text)
  with pytest.raises(DataError, match="tokenizer_config"):
    load_chat(tmp_path)


def test_messages_become_a_prompt_with_its_real_tokens(tmp_path: Path):
  """A file of its own comes before the settings, which name the special tokens."""
  said = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": None}
  store(tmp_path, chat_template="not me", **said)
  (tmp_path / IMPORTED_FILES / "chat_template.jinja").write_text(TEMPLATE)
  chat = load_chat(tmp_path)
  assert chat is not None and chat.special_tokens == {
    "bos_token": "<s>",
    "eos_token": "</s>",
  }
  messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
  assert chat.render(messages) == "<s><user>hi</s><assistant>yes</s><assistant>"
  with pytest.raises(DataError, match="fails: no tools"):
    chat.render([{"role": "tool", "content": ""}])


def test_special_tokens_of_older_files(tmp_path: Path):
  store(tmp_path, chat_template=TEMPLATE, eos_token="</s>")
  more = {"bos_token": {"content": "<s>"}, "additional_special_tokens": ["<a>"]}
  path = tmp_path / IMPORTED_FILES / "special_tokens_map.json"
  path.write_text(json.dumps(more))
  expected = {"eos_token": "</s>", "bos_token": "<s>"}
  assert load_chat(tmp_path).special_tokens == expected
  store(tmp_path, extra_special_tokens={"image_token": "<i>"}, added_tokens_decoder={})
  assert load_special_tokens(tmp_path) == {"image_token": "<i>"}


def test_templates_have_names(tmp_path: Path):
  named = [
    {"name": "default", "template": "plain"},
    {"name": "tool_use", "template": "tools!"},
  ]
  chat = load_chat(store(tmp_path, chat_template=named))
  assert chat.choose(Talk([])) == "default" and chat.choose(Talk([], [])) == "tool_use"
  chat = load_chat(store(tmp_path, chat_template=named[1:]))
  with pytest.raises(DataError, match="tool_use"):
    chat.render([])
  with pytest.raises(ConfigError, match="no place for tools"):
    chat_of("plain").render([], TOOLS)
  folder = tmp_path / IMPORTED_FILES / "additional_chat_templates"
  folder.mkdir()
  (folder / "rag.jinja").write_text("documents")
  (tmp_path / IMPORTED_FILES / "chat_template.jinja").write_text("mine")
  assert load_chat(tmp_path).templates == {"default": "mine", "rag": "documents"}


def test_json_is_as_it_was_given():
  """Nothing is escaped, and nothing is sorted; without tools they are None."""
  [message] = CONVERSATIONS["one"]
  chat = chat_of("{{ messages[0] | tojson }}{{ tools is none }}{{ documents is none }}")
  expected = '{"role": "user", "content": "<b> & \'é\' hi\\n"}TrueTrue'
  assert chat.render([message]) == expected


HOSTILE = {
  "{{ 'a' * 9999999999 }}": "more than 512 MB",
  "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}": "16,777,216 characters",
  "{{ 1 // 0 }}": "ZeroDivisionError",
  "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "RecursionError",
  "{{ range(10 ** 9) }}": "OverflowError",
  "{{ messages.__class__.__mro__ }}": "unsafe",
  "{% set n = namespace(__class__=1) %}": "namespace",
  "{% if %}": "line 1",
  "{{ nothing.at.all }}": "undefined",
  "{{" + "(" * 9999 + ")" * 9999 + "}}": "Error",
}


@pytest.mark.parametrize(
  "template", slow_but([*HOSTILE][:3], HOSTILE), ids=lambda text: text[:20]
)
def test_a_template_that_fails_is_one_line(template: str):
  with pytest.raises(DataError, match=HOSTILE[template]) as caught:
    chat_of(template).render([{"role": "user", "content": "hi"}])
  assert caught.value.cause.startswith("the chat template of nowhere fails: ")
  assert "\n" not in caught.value.cause


@pytest.mark.slow
def test_a_template_that_never_ends_is_ended(monkeypatch: pytest.MonkeyPatch):
  loops = "".join(f"{{% for a{n} in range(99999) %}}" for n in range(4))
  endless = chat_of(loops + "{% endfor %}" * 4)
  for bound in ("MAX_SECONDS", "MAX_WAIT_SECONDS"):
    with monkeypatch.context() as patch:
      patch.setattr(process, bound, 1)
      with pytest.raises(DataError, match=r"more than \d s"):
        endless.render([])


@with_transformers
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_those_of_transformers(name: str):
  """The text and the ids, or both fail."""
  from transformers import PreTrainedTokenizerFast

  specials = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
  theirs = PreTrainedTokenizerFast(tokenizer_object=llama(), **specials)
  ours = ImportedTokenizer(llama(), Specials(bos_id=1, eos_ids=(2,), prefix=(1,)))
  chat = chat_of(TEMPLATES[name], **specials)
  num_compared = 0
  for messages in CONVERSATIONS.values():
    for tools in (None, TOOLS if "tools" in chat.templates["default"] else None):
      options: Any = dict(tools=tools, add_generation_prompt=True, tokenize=False)
      options["chat_template"] = chat.templates["default"]
      try:
        expected = theirs.apply_chat_template(messages, **options)
      except Exception:
        with pytest.raises(DataError):
          chat.render(messages, tools)
        continue
      assert chat.render(messages, tools) == expected
      ids = theirs.apply_chat_template(messages, **options | {"tokenize": True})[
        "input_ids"
      ]
      assert ours.encode(expected) == ids
      num_compared += 1
  assert num_compared >= 4


# -- Conversations -------------------------------------------------------------------------


class Plain:
  """A chat that writes one letter for a role, and the content."""

  path = Path("nowhere")

  def render(self, messages: Any, tools: Any = None) -> str:
    return "".join(f"{message['role'][0]}{message['content']}" for message in messages)


@pytest.fixture(scope="module")
def run() -> Run:
  return make_run(-30.0)  # a context of 160 tokens, each a byte


def talk(run: Run, system: str | None = None) -> Conversation:
  return Conversation(Plain(), run, system)  # type: ignore[arg-type]


def test_the_oldest_turns_go_when_there_is_no_more_room(run: Run):
  conversation = talk(run, "S")
  sizes, dropped = (60, 60, 60, 60, 130), (0, 0, 1, 1, 2)
  for number, size in enumerate(sizes):
    text = f"{number}" * size
    prompt = conversation.ask(text, 20)
    assert prompt.num_dropped == dropped[number]
    assert prompt.text.startswith("sSu") and prompt.text.endswith(f"u{text}")
    assert prompt.num_tokens == len(prompt.text) <= 140
    conversation.answer("!")


def test_a_message_that_does_not_fit_alone_leaves_the_conversation_as_it_was(run: Run):
  conversation = talk(run)
  conversation.ask("hi")
  conversation.answer("!")
  before = [*conversation.turns]
  for size, max_new_tokens in ((160, None), (150, 20)):
    with pytest.raises(ConfigError, match=f"a message of {size + 1} tokens"):
      conversation.ask("x" * size, max_new_tokens)
    assert conversation.turns == before
  # What nobody has asked for may be shorter than usual.
  assert conversation.ask("x" * 150).num_dropped == 1


def test_a_system_message_is_not_left_out_in_silence(run: Run):
  chat = chat_of("{{ messages[-1].content }}")
  with pytest.raises(ConfigError, match="leaves the system's message out"):
    Conversation(chat, run, "Be brief.").ask("hi")


def said_by(
  run: Run, path: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch, **flags: Any
) -> str:
  """What `--interactive` prints as its answers."""
  given = dict(no_chat=False, system=None, tools=None, max_new_tokens=20) | flags
  given = dict(json=False, beams=None, num_samples=1) | given
  typed = "".join(f"{line}\n" for line in lines).encode()
  monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed)))
  out = io.StringIO()
  args = argparse.Namespace(**given)
  infer.converse(run._replace(path=path), GREEDY, Stopping(), args, out)
  return out.getvalue()


@pytest.mark.parametrize("flags", [{"json": True}, {"beams": 2}, {"num_samples": 2}])
def test_what_a_chat_does_not_read_is_refused(
  run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any]
):
  """A script that asks for JSON would get text."""
  store(tmp_path, chat_template="{{ messages[0].content }}")
  (name,) = (name.replace("_", "-") for name in flags)
  with pytest.raises(ConfigError, match=f"a chat has no --{name}"):
    said_by(run, tmp_path, ["a"], monkeypatch, **flags)


def test_a_long_conversation_goes_on(
  run: Run,
  tmp_path: Path,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture,
):
  template = "{% for m in messages %}{{ m.role[0] }}{{ m.content }}{% endfor %}"
  store(tmp_path, chat_template=template)
  lines = ["1" * 60, "2" * 200, "3" * 100]
  first = said_by(run, tmp_path, lines[:1], monkeypatch, system="S")
  whole = said_by(run, tmp_path, lines, monkeypatch, system="S")
  told = capsys.readouterr().err
  assert "a message of" in told and "turns dropped, from the oldest: 1" in told
  assert whole.startswith(first)
  # The last prompt has the first turn no more.
  prompt = [f"sSu{lines[2]}"]
  request = make_request(run, prompt, 20, has_specials=True)
  [last] = complete_request(run, request, prompt, [GREEDY])
  assert whole == f"{first}{last.completion}\n"


def test_ctrl_c_ends_an_answer_and_not_the_conversation(
  run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
  """What was told of it stays, and the next turn is what it would be anyway."""
  store(tmp_path, chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
  decode_rows, blocks = engine.decode_rows, []

  def interrupted(*arguments: Any) -> Any:
    blocks.append(decode_rows(*arguments))
    if len(blocks) == 2:
      raise KeyboardInterrupt
    return blocks[-1]

  with monkeypatch.context() as patch:
    patch.setattr(engine, "decode_rows", interrupted)
    whole = said_by(run, tmp_path, ["a", "b"], monkeypatch, max_new_tokens=40)
  asked = lambda text: (run, make_request(run, [text], 40, has_specials=True), [text])
  growing = grow_completions(*asked("a"), [GREEDY])
  _, told = next(growing)  # of the first block; the first token alone is no letter
  [following] = complete_request(*asked(f"a{told}b"), [GREEDY])
  assert whole == f"{told}\n{following.completion}\n"


def test_tools_and_a_system_need_a_template(
  run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
  with pytest.raises(ConfigError, match="has no chat template"):
    said_by(run, tmp_path, ["hi"], monkeypatch, tools=TOOLS)


@pytest.mark.parametrize(
  ("flags", "told"),
  [
    (["--prompt", "a", "--system", "b"], "--system is for a chat"),
    (["--interactive", "--no-chat", "--tools", "tools.json"], "--tools is for a chat"),
    (["--interactive", "--tools", "missing.json"], "missing.json"),
    (["--interactive", "--tools", "list.json"], "not a list of tools"),
    (["--interactive", "--tools", "deep.json"], "not JSON"),
  ],
)
def test_flags_of_a_chat(in_process: Any, tmp_path: Path, flags: list[str], told: str):
  (tmp_path / "list.json").write_text("[1]")
  (tmp_path / "deep.json").write_text("[" * 10_000)
  done = in_process("infer", *flags)
  assert done.returncode == 2 and told in done.stderr
