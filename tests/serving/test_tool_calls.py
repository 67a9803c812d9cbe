# SPDX-License-Identifier: Apache-2.0
"""Calls of tools: taken out of the text, however it is cut, and nothing else is."""

import json
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion
from serving_runs import WITH_TOOLS, events_of, random_run, served
from starlette.testclient import TestClient

from flaxlm.serving.app import build_app
from flaxlm.serving.generation import Generation, Piece
from flaxlm.serving.tool_calls import CLOSING, OPENING, CallFinder

HOST = "http://127.0.0.1:8000"
HELLO = [{"role": "user", "content": "ab"}]
CALL = OPENING + '{"name": "f", "arguments": {"x": 1}}' + CLOSING


def find(pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
  """All text, and the calls, which are numbered in their order."""
  finder = CallFinder()
  parts = [finder.push(piece) for piece in pieces] + [finder.push("", is_last=True)]
  calls = [call for part in parts for call in part.calls]
  assert [call["index"] for call in calls] == [*range(finder.count)]
  functions = [call["function"] for call in calls]
  return "".join(part.text for part in parts), [
    (f["name"], f["arguments"]) for f in functions
  ]


@pytest.mark.parametrize(
  ("text", "shown", "names"),
  [
    ("", "", ""),
    ("no call \n", "no call \n", ""),
    (CALL, "", "f"),
    (f"a {CALL} \n{CALL}\n", "a", "ff"),
    (f"{CALL} b ", "b ", "f"),
    (CALL.removesuffix(CLOSING), "", "f"),
    (CALL[:-20], CALL[:-20], ""),
    (CALL.replace("}", ""), CALL.replace("}", ""), ""),
    (f"{OPENING}[]{CLOSING} {CALL}", f"{OPENING}[]{CLOSING}", "f"),
    (CALL.replace("{", '[{"name": "g"}, {', 1).replace(CLOSING, "]" + CLOSING), "", "gf"),
    (CALL.replace('"f"', "1"), CALL.replace('"f"', "1"), ""),
    (CALL.replace('"x"', '"y": 2, "x"').replace("{", '{"id": 1, ', 1), None, ""),
    (f"a < b <tool {OPENING}", f"a < b <tool {OPENING}", ""),
    (f"{CLOSING} a", f"{CLOSING} a", ""),
    (OPENING + "[" * 100_000 + CLOSING, None, ""),
  ],
)
def test_calls_and_text_are_told_apart(text: str, shown: str | None, names: str):
  found, calls = find([text])
  assert found == (text if shown is None else shown)
  assert "".join(name for name, _ in calls) == names


SNIPPETS = (
  OPENING,
  CLOSING,
  CALL,
  CALL,
  " ",
  "\n",
  "a",
  "<",
  "<tool",
  '{"name": "f"}',
  "[]",
)


@given(st.lists(st.sampled_from(SNIPPETS)).map("".join), st.data())
def test_it_does_not_matter_how_a_text_is_cut(text: str, data: st.DataObject):
  cuts = sorted(data.draw(st.lists(st.integers(0, len(text)))))
  pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
  assert find(pieces) == find([text])


def ask(client: TestClient, body: dict[str, Any]) -> Any:
  response = client.post("/v1/chat/completions", json=body)
  assert response.status_code == 200, response.text
  return response.json()


@pytest.fixture(scope="module")
def calls_tools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
  """A run whose template asks for calls between tags."""
  path = tmp_path_factory.mktemp("runs") / "calls"
  run = random_run(path, template="{# <tool_call> #}" + WITH_TOOLS)
  with served(run) as service, TestClient(build_app(service), HOST) as client:
    yield client


CALLS = (
  "I\n look: <tool",
  '_call>{"name": "find", "argum',
  'ents": {"a": "\u00e9"}}\n</tool_call>\n',
  '<tool_call>["x"]</tool_call>',
  ' <tool_call>[{"name": "end"}]',
)


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_calls_of_tools_are_no_text(
  calls_tools: TestClient, monkeypatch: pytest.MonkeyPatch, reason: str
):
  async def pieces(self: Generation) -> AsyncGenerator[Piece, None]:
    for n, text in enumerate(CALLS):
      yield Piece(0, text, [97], [-1.0], [[]], reason if n == len(CALLS) - 1 else None)

  monkeypatch.setattr(Generation, "pieces", pieces)
  told = "tool_calls" if reason == "stop" else reason
  tool = {"type": "function", "function": {"name": "find"}}
  body = dict(messages=HELLO, tools=[tool], logprobs=True)
  whole = ChatCompletion.model_validate(ask(calls_tools, body))
  (choice,) = whole.choices
  assert choice.message.content == 'I\n look:<tool_call>["x"]</tool_call>'
  calls = choice.message.tool_calls or []
  assert [call.function.name for call in calls] == ["find", "end"]
  assert [json.loads(call.function.arguments) for call in calls] == [{"a": "\u00e9"}, {}]
  assert choice.finish_reason == told and len({call.id for call in calls}) == 2
  chunks = events_of(
    calls_tools.post("/v1/chat/completions", json=body | {"stream": True}).text
  )
  deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
  assert "".join(d.get("content") or "" for d in deltas) == choice.message.content
  found = [call for delta in deltas for call in delta.get("tool_calls", [])]
  assert [(c["index"], c["function"]["name"]) for c in found] == [(0, "find"), (1, "end")]
  assert chunks[-1]["choices"][0]["finish_reason"] == told
  del body["tools"]
  found = ask(calls_tools, body)["choices"][0]
  assert found["message"]["content"] == "".join(CALLS)
  assert found["finish_reason"] == reason and "tool_calls" not in found["message"]
