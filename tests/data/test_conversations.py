# SPDX-License-Identifier: Apache-2.0
"""Files of conversations: what they say, which split has them, and what is wrong."""

import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flaxlm.config import DataConfig, TokenizerConfig
from flaxlm.data.batches import Batches
from flaxlm.data.conversations import Talks, read_talks
from flaxlm.data.prepare import Prepared, prepare, prepare_whole
from flaxlm.data.sources import find_corpus
from flaxlm.data.stores import TokenStore
from flaxlm.errors import ConfigError, DataError, FlaxLMError
from flaxlm.tokenizers import train_tokenizer

BYTES = TokenizerConfig(kind="byte")
HI = {"role": "user", "content": "hi"}
YES = {"role": "assistant", "content": "yes"}


@pytest.fixture(autouse=True)
def data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
  monkeypatch.setenv("FLAXLM_DATA_DIR", str(tmp_path / "data"))


def write(path: Path, *records: Any) -> Path:
  path.parent.mkdir(exist_ok=True, parents=True)
  lines = (one if isinstance(one, str) else json.dumps(one) for one in records)
  path.write_text("".join(f"{line}\n" for line in lines), "utf-8")
  return path


def prepare_chat(path: Path, cfg: TokenizerConfig = BYTES, **options: Any) -> Prepared:
  return prepare(f"files:{path}", cfg, lambda line: None, "chat", **options)


def shown(prepared: Prepared, store: TokenStore) -> list[str]:
  """Each conversation, with what carries loss in brackets."""
  talks, tokenizer = [], prepared.tokenizer
  assert store.weights is not None
  for start, end in zip(store.bounds, store.bounds[1:], strict=False):
    text, inside = "", 0
    for id_, weight in zip(
      store.tokens[start:end].tolist(), store.weights[start:end].tolist(), strict=True
    ):
      text += {1: "[", 0: "", -1: "]"}[weight - inside]
      inside = weight
      text += "<>" if id_ == tokenizer.eos_id else tokenizer.decode([id_])
    talks.append(text + "]" * inside)
  return talks


def test_conversations_and_prompts_become_tokens_with_weights(tmp_path: Path):
  """In the plain template; a second time they are found."""
  two = {"messages": [HI, YES, {"role": "user", "content": "so?"}, YES]}
  write(tmp_path / "chats" / "train.jsonl", two, {"prompt": "hi", "completion": "yes"})
  write(tmp_path / "chats" / "validation.jsonl", {"messages": [HI, YES]})
  prepared = prepare_chat(tmp_path / "chats")
  short = "<>user:\nhi\nassistant:\n[yes<>]\n"
  assert shown(prepared, prepared.train) == [
    "<>user:\nhi\nassistant:\n[yes<>]\nuser:\nso?\nassistant:\n[yes<>]\n",
    short,
  ]
  assert shown(prepared, prepared.validation) == [short]
  again = prepare_chat(tmp_path / "chats")
  assert again.fingerprint == prepared.fingerprint and again.chat == prepared.chat
  prepared.tokenizer.save(tmp_path / "tokenizer.json")
  whole = prepare_whole(
    f"files:{tmp_path}/chats", tmp_path / "tokenizer.json", lambda line: None, "chat"
  )
  assert isinstance(whole, TokenStore) and whole.num_documents == 3


def test_the_template_beside_the_tokenizer_is_used(tmp_path: Path):
  """Another template makes other tokens; a run's is asked for by its folder."""
  train_tokenizer("byte", [], 0).save(tmp_path / "tokenizer.json")
  write(tmp_path / "chats" / "train.jsonl", {"messages": [HI, YES]})
  write(tmp_path / "chats" / "validation.jsonl", {"messages": [HI, YES]})
  cfg = TokenizerConfig(path=str(tmp_path / "tokenizer.json"))
  plain = prepare_chat(tmp_path / "chats", cfg)
  template = (
    "{% for m in messages %}<{{ m.role[0] }}>{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}"
  )
  (tmp_path / "chat_template.jinja").write_text(template)
  own = prepare_chat(tmp_path / "chats", cfg)
  assert shown(own, own.train) == ["<u>hi<a>[yes]"]
  run = tmp_path / "run" / "huggingface"
  run.mkdir(parents=True)
  (run / "chat_template.jinja").write_text(template.replace("<{{", "({{"))
  other = prepare_chat(tmp_path / "chats", cfg, chat_folder=tmp_path / "run")
  assert shown(other, other.train) == ["(u>hi(a>[yes]"]
  assert len({plain.fingerprint, own.fingerprint, other.fingerprint}) == 3


def test_conversations_are_mixed(tmp_path: Path):
  """By the mixture's shares, in one template, with one tokenizer trained on all."""
  names = []
  for name in "ab":
    write(tmp_path / name / "train.jsonl", *[{"prompt": name, "completion": "yes"}] * 9)
    write(tmp_path / name / "validation.jsonl", {"prompt": name, "completion": "no"})
    names.append(f"files:{tmp_path / name}")
  cfg = TokenizerConfig(kind="bpe", vocab_size=300)
  mixture = f"2 {names[0]} + 1 {names[1]}"
  prepared = prepare(mixture, cfg, lambda line: None, "chat")
  data = DataConfig(objective="chat", seq_len=24, batch_size=3)
  batches = Batches(prepared.train, data, vocab_size=300, seed=0)
  batch, names = batches[0], []
  for tokens, targets, weights in zip(*batch[:2], batch.weights_BT, strict=True):
    text = prepared.tokenizer.decode(tokens)
    names.append(text[text.index("user:\n") + 6])
    learnt = prepared.tokenizer.decode(targets[weights > 0])
    assert learnt == "yes" * text.count("assistant")
  assert sorted(names) == ["a", "a", "b"] and prepared.chat is not None


def test_a_conversation_is_in_one_split(tmp_path: Path):
  """Whatever it is called, and however often it occurs; one in twenty is held out."""
  talks = [{"prompt": f"{n}?", "completion": "yes"} for n in range(300)]
  write(tmp_path / "talks.jsonl", *talks, *talks)
  found = Talks(find_corpus(f"files:{tmp_path}/talks.jsonl", lambda line: None))
  assert (found.codes[:300] == found.codes[300:]).all()
  assert 5 < np.sum(found.codes[:300] == 1) < 30
  write(tmp_path / "two.jsonl", *talks[:2])
  found = Talks(find_corpus(f"files:{tmp_path}/two.jsonl", lambda line: None))
  assert sorted(found.codes.tolist()) == [0, 1]
  assert found.count("train") == 1 and found.texts("train")[0].endswith(
    "?\nassistant:\nyes\n"
  )


FAULTS = {
  "no field": ({"text": "a"}, "no field 'messages', .* but 'text'"),
  "half": ({"prompt": "a"}, "no field 'messages', .* but 'prompt'"),
  "number": ({"prompt": "a", "completion": 1}, "completion is 1, which is no text"),
  "a text": ({"messages": "hi"}, "messages are 'hi', not a list"),
  "texts": ({"messages": ["hi"]}, "not a list of objects"),
  "no role": ({"messages": [{"content": "hi"}, YES]}, "message 1 has no role"),
  "role": ({"messages": [{"role": 1, "content": ""}, YES]}, "message 1 has the role 1"),
  "no content": ({"messages": [{"role": "user"}, YES]}, "message 1 has no content"),
  "null": ({"messages": [{"role": "user", "content": None}, YES]}, "1 has no content"),
  "empty": ({"messages": [HI, {**YES, "content": " "}]}, "message 2, an answer, is empty"),
  "none": ({"messages": [HI, {**YES, "content": None}]}, "message 2, an answer, is empty"),
  "no completion": ({"prompt": "a", "completion": ""}, "message 2, an answer, is empty"),
  "no answer": ({"messages": [HI]}, "no message has the role assistant"),
  "nothing": ({"messages": []}, "no message has the role assistant"),
  "both": (
    {"messages": [HI, YES], "prompt": "a", "completion": "b"},
    "'messages', and both 'prompt' and 'completion'",
  ),
  "tools": ({"messages": [HI, YES], "tools": "x"}, "tools are 'x'"),
  "not JSON": ("{", "not JSON"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_record_that_is_no_conversation(tmp_path: Path, name: str):
  """One line with file and line; nothing is left behind that looks prepared."""
  record, told = FAULTS[name]
  path = write(tmp_path / "talks.jsonl", {"messages": [HI, YES]}, "", record)
  with pytest.raises(DataError, match=told) as caught:
    [*read_talks(path)]
  assert caught.value.cause.startswith(f"{path}, line 3")
  assert "\n" not in caught.value.cause


@pytest.mark.parametrize(
  ("content", "told"),
  [
    ("", "there is nothing in files:.*talks.jsonl"),
    ("\n \n", "has no conversations: no record is in .*talks.jsonl"),
  ],
)
def test_files_without_a_record(tmp_path: Path, content: str, told: str):
  (tmp_path / "talks.jsonl").write_text(content)
  with pytest.raises(DataError, match=told) as caught:
    prepare_chat(tmp_path / "talks.jsonl")
  assert "\n" not in caught.value.cause and caught.value.cure.startswith("write some")


def test_what_a_template_does_not_know(tmp_path: Path):
  """A role that it refuses or leaves out, and answers that it does not mark."""
  critic = {"role": "critic", "content": "no"}
  path = write(tmp_path / "talks.jsonl", *[{"messages": [HI, YES]}] * 3)
  train_tokenizer("byte", [], 0).save(tmp_path / "tokenizer.json")
  cfg = TokenizerConfig(path=str(tmp_path / "tokenizer.json"))
  write(path, {"messages": [HI, YES]}, {"messages": [HI, critic, YES]})
  with pytest.raises(DataError, match=r"line 2: .* there is no role critic") as caught:
    prepare_chat(path, cfg)
  assert "flaxlm's own chat template" in caught.value.cause
  assert "the roles system, user, assistant, tool" in caught.value.cure
  parts = {"role": "user", "content": [{"type": "text", "text": "hi"}]}
  for other in (parts, {**YES, "tool_calls": [{"name": "f"}]}):
    write(path, {"messages": [HI, YES]}, {"messages": [HI, other, YES]})
    with pytest.raises(DataError, match=r"line 2: .* that are texts, and nothing else"):
      prepare_chat(path, cfg)
  write(path, {"messages": [HI, YES]}, {"messages": [HI, critic, YES]})
  silent = "{% for m in messages if m.role != 'critic' %}{{ m.content }}{% endfor %}"
  (tmp_path / "chat_template.jinja").write_text(silent)
  with pytest.raises(DataError, match=r"line 2: .* leaves out message 2, .* 'critic'"):
    prepare_chat(path, cfg)
  marks = "{% generation %}{% endgeneration %}"
  (tmp_path / "chat_template.jinja").write_text(f"{marks}{silent}")
  with pytest.raises(DataError, match=r"line 1: .* writes nothing that carries loss"):
    prepare_chat(path, cfg)
  (tmp_path / "chat_template.jinja").write_text("{{ nothing.at.all }}")
  with pytest.raises(DataError, match=r"line 1: .* fails: .*undefined"):
    prepare_chat(path, cfg)


@pytest.mark.parametrize(
  ("corpus", "kind"),
  [("stdlib", ConfigError), ("tfds:x", ConfigError), ("files:*.txt", DataError)],
)
def test_corpora_without_conversations(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corpus: str, kind: type[FlaxLMError]
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "a.txt").write_text("a\n" * 50)
  with pytest.raises(kind, match=r"has no (files of )?conversations"):
    prepare(corpus, BYTES, lambda line: None, "chat")


def test_conversations_of_a_table(tmp_path: Path):
  """What a message does not have is not there, and rows are named as such."""
  pyarrow = pytest.importorskip("pyarrow")
  from pyarrow import parquet

  when = datetime.datetime(2026, 1, 1)
  call = {"role": "assistant", "content": None, "calls": [{"at": when}]}
  timed = {"messages": [HI | {"calls": [{"at": when}]}, YES]}
  talks = [{"messages": [HI, YES]}, timed]
  path = tmp_path / "chats" / "train.parquet"
  path.parent.mkdir()
  parquet.write_table(pyarrow.Table.from_pylist(talks), path)
  write(path.parent / "validation.jsonl", {"messages": [HI, YES]})
  prepared = prepare_chat(path.parent)
  assert shown(prepared, prepared.train) == ["<>user:\nhi\nassistant:\n[yes<>]\n"] * 2
  parquet.write_table(pyarrow.Table.from_pylist([*talks, {"messages": [HI, call]}]), path)
  with pytest.raises(DataError, match=r"train.parquet, row 3: message 2, an answer, is em"):
    prepare_chat(path.parent)


@pytest.mark.parametrize("depth", [300, 3000])
def test_what_is_nested_deeply_is_no_traceback(tmp_path: Path, depth: int):
  nested = "[" * depth + "]" * depth
  talk = {"messages": [{**HI, "x": 0}, YES]}
  line = json.dumps(talk).replace('"x": 0', f'"x": {nested}')
  write(tmp_path / "chats" / "train.jsonl", line)
  write(tmp_path / "chats" / "validation.jsonl", {"messages": [HI, YES]})
  try:
    prepare_chat(tmp_path / "chats")
    assert depth < 900
  except FlaxLMError as e:
    assert depth > 900 and "train.jsonl, line 1" in e.cause
