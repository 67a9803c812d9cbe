# SPDX-License-Identifier: Apache-2.0
"""Conversations to learn from: what an assistant wrote, as transformers finds it."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
from chat_templates import MARKED, TEMPLATES
from conftest import slow_but, with_transformers
from tiny_tokenizers import llama

from flaxlm.chat import process
from flaxlm.chat.templates import Chat, Talk, plain_chat
from flaxlm.errors import DataError
from flaxlm.tokenizers import train_tokenizer
from flaxlm.tokenizers.imported import ImportedTokenizer, Specials

SPECIALS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
USER = {"role": "user", "content": "the cat?\n"}
ANSWER = {"role": "assistant", "content": "a 漢字 sat "}
CONVERSATIONS: list[list[dict[str, Any]]] = [
  [USER, ANSWER],
  [{"role": "system", "content": "Be brief."}, USER, ANSWER, USER, ANSWER],
  [USER, {"role": "assistant", "content": "<think>hm</think>\n\nyes 🙂"}, USER, ANSWER],
  [USER, ANSWER, {"role": "user", "content": "and?"}],
]


def chat_of(template: str) -> Chat:
  return Chat(Path("nowhere"), {"default": template}, SPECIALS)


def learnt(chat: Chat, messages: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
  """Each text, and the parts of it that are learnt."""
  ((_, texts),) = chat.learn([Talk(messages)])
  return [(one.text, [one.text[slice(*span)] for span in one.spans]) for one in texts]


@with_transformers
@pytest.mark.parametrize("name", MARKED)
def test_masks_are_those_of_transformers(name: str):
  """Ids and mask, by the template's marks; ten templates."""
  from transformers import PreTrainedTokenizerFast

  theirs = PreTrainedTokenizerFast(tokenizer_object=llama(), **SPECIALS)
  ours = ImportedTokenizer(llama(), Specials(bos_id=1, eos_ids=(2,), prefix=(1,)))
  options: Any = dict(return_assistant_tokens_mask=True, return_dict=True)
  masks = []
  texts = chat_of(MARKED[name]).learn(map(Talk, CONVERSATIONS))
  for (messages, *_), ((text, spans),) in texts:
    expected = theirs.apply_chat_template(
      messages, chat_template=MARKED[name], tokenize=True, **options
    )
    ((ids, offsets),) = ours.encode_chats([text])
    assert ids.tolist() == expected["input_ids"]
    mask = [
      int(any(start < end_ and end > start_ for start_, end_ in spans))
      for start, end in offsets.tolist()
    ]
    assert mask == expected["assistant_masks"]
    masks.append(sum(mask))
  assert len(MARKED) == 10 and min(masks) > 0


# -- Without marks -------------------------------------------------------------------------

UNMARKED = {
  "zephyr": ["a 漢字 sat </s>\n", "a 漢字 sat </s>\n"],
  "chatml": ["a 漢字 sat<|im_end|>\n"] * 2,
  "llama_2": [" a 漢字 sat </s>"] * 2,
  "llama_3": ["a 漢字 sat<|eot_id|>"] * 2,
  "mistral": [" a 漢字 sat</s>"] * 2,
}


@pytest.mark.parametrize("name", slow_but(["chatml"], UNMARKED))
def test_without_marks_an_answer_is_what_follows_its_prompt(name: str):
  chat = chat_of(TEMPLATES[name])
  ((text, answers),) = learnt(chat, CONVERSATIONS[1])
  assert answers == UNMARKED[name]
  assert text.startswith(chat.render(CONVERSATIONS[1][:2]))


FORGETS = """{% for m in messages %}<{{ m.role }}>
{{- m.content if loop.last else m.content.split('</think>')[-1] }}<end>
{%- endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""


def test_a_turn_that_is_written_otherwise_later_is_learnt_by_itself():
  """Many templates leave out the thoughts of answers before the last one."""
  first, second = learnt(chat_of(FORGETS), CONVERSATIONS[2])
  assert first[1] == ["<think>hm</think>\n\nyes 🙂<end>"]
  assert second[1] == ["a 漢字 sat <end>"]
  assert "hm" not in second[0] and second[0].endswith(second[1][0])


def test_a_prompt_that_goes_on_otherwise_than_the_answer():
  template = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>{% endif %}"
  )
  ((text, answers),) = learnt(chat_of(template), [USER, ANSWER])
  assert answers == ["a 漢字 sat "] and text.startswith("<user>")
  with pytest.raises(DataError, match="message 2"):
    learnt(chat_of("{{ messages | length }}" + template), [USER, ANSWER])


def test_plain_conversations_end_with_the_end_of_text():
  tokenizer = train_tokenizer("byte", [], 0)
  chat = plain_chat(tokenizer, Path("nowhere"))
  ((text, answers),) = learnt(chat, [USER, ANSWER, USER, ANSWER])
  turn = "user:\nthe cat?\n\nassistant:\na 漢字 sat <|endoftext|>\n"
  assert text == f"<|endoftext|>{turn}{turn}"
  assert answers == ["a 漢字 sat <|endoftext|>"] * 2
  assert chat.render([USER]) == text[: text.index("a 漢字")]
  with pytest.raises(DataError, match="no role critic"):
    learnt(chat, [{"role": "critic", "content": "no"}, ANSWER])
  ((ids, offsets),) = tokenizer.encode_chats([text])
  assert tokenizer.decode(ids) == text.replace("<|endoftext|>", "")
  assert ids.tolist().count(tokenizer.eos_id) == 3
  assert text[slice(*offsets[0])] == "<|endoftext|>"


# -- One process ---------------------------------------------------------------------------


def test_one_process_renders_many(monkeypatch: pytest.MonkeyPatch):
  """It takes a chunk after the other, and each answer comes in its place."""
  started = []

  class Counted(subprocess.Popen):
    def __init__(self, *args: Any, **kwargs: Any):
      started.append(self)
      super().__init__(*args, **kwargs)

  monkeypatch.setattr(subprocess, "Popen", Counted)
  chat = chat_of(TEMPLATES["zephyr"])
  count = 2 * process.AT_A_TIME + 3
  messages = [[{**USER, "content": f"{n} {'x' * 3000}"}, ANSWER] for n in range(count)]
  texts = [*chat.learn(map(Talk, messages))]
  assert [text.split()[1] for _, ((text, _),) in texts] == [str(n) for n in range(count)]
  assert len(started) == 1


@pytest.mark.slow
def test_each_conversation_has_its_own_time(monkeypatch: pytest.MonkeyPatch):
  """One that never ends is the last answer, and it is known which one it was."""
  monkeypatch.setattr(process, "MAX_SECONDS", 1)
  loops = "".join(f"{{% for a{n} in range(99999) %}}" for n in range(4))
  endless = f"{{% if messages[0].content == 'x' %}}{loops}{'{% endfor %}' * 4}{{% endif %}}"
  texts = chat_of(endless + TEMPLATES["zephyr"]).learn(
    Talk([{"role": "user", "content": content}, ANSWER], None, f"line {n}")
    for n, content in enumerate("abxc")
  )
  assert [next(texts)[0].where, next(texts)[0].where] == ["line 0", "line 1"]
  with pytest.raises(DataError, match=r"line 2: .* more than 1 s"):
    next(texts)


def test_tools_that_a_template_does_not_read_are_refused_in_their_turn():
  tools = [{"type": "function"}]
  talks = [Talk([USER, ANSWER]), Talk([USER, ANSWER], tools, "line 2")]
  texts = chat_of(TEMPLATES["zephyr"]).learn(talks)
  assert next(texts)
  with pytest.raises(DataError, match=r"line 2: .* no place for tools"):
    next(texts)
