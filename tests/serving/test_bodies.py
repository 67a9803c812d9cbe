# SPDX-License-Identifier: Apache-2.0
"""Bodies: what is read is what OpenAI's API means, and all else is refused by name."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flaxlm.serving import bodies
from flaxlm.serving.bodies import (
  CHAT,
  COMPLETION,
  EMBEDDINGS,
  NOT_CHAT,
  NOT_COMPLETION,
  check_model,
  read_chat,
  read_completion,
  read_embedding,
)
from flaxlm.serving.errors import ApiError
from flaxlm.serving.fields import IGNORED
from flaxlm.serving.limits import Limits

LIMITS = Limits(slots=4, max_queue=8, max_tokens=64)
HELLO = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
TEXT = {"type": "text", "text": "a"}
NO_TOOLS: list[Any] = [
  [{"type": "function", "function": {}}],
  [{"type": "function", "function": {"name": 3}}],
  [{"type": "function", "function": {"name": "\ud800"}}],
  [{"type": "custom", "function": {"name": "f"}}],
  [{"type": "function", "function": {"name": "f"}, "x": "\ud800"}],
]


def call(arguments: Any) -> dict[str, Any]:
  return {"function": {"name": "f", "arguments": arguments}}


def form(**fields: Any) -> dict[str, Any]:
  return {"type": "json_schema", "json_schema": {"schema": {"type": "boolean"}} | fields}


def completion(**fields: Any) -> bodies.CompletionBody:
  return read_completion({"prompt": "a", **fields}, LIMITS)


def chat(**fields: Any) -> bodies.ChatBody:
  return read_chat({"messages": HELLO, **fields}, LIMITS)


# -- What is read --------------------------------------------------------------------------


def test_defaults_are_those_of_the_official_api():
  body = completion()
  assert (body.max_tokens, body.n, body.num_top, body.stream) == (16, 1, None, False)
  assert body.settings.temperature == 1 and body.settings.top_p == 1
  assert chat().max_tokens is None and chat().num_top is None
  assert chat(logprobs=True).num_top == 0
  assert read_embedding({"input": "a"}).is_base64 is False


def test_null_is_absent():
  body = completion(**dict.fromkeys(COMPLETION - {"prompt"}))
  assert body.settings.seed != completion().settings.seed  # each has its own
  assert (body.max_tokens, body.n) == (16, 1)


def test_settings_arrive():
  body = completion(
    temperature=0.5,
    top_p=0.25,
    top_k=3,
    min_p=0.1,
    seed=7,
    stop="x",
    presence_penalty=1,
    frequency_penalty=-1.5,
    repetition_penalty=1.25,
    logit_bias={"5": -100},
    regex="a+",
    logprobs=5,
    n=2,
  )
  found = body.settings
  assert (found.temperature, found.top_p, found.top_k, found.min_p) == (0.5, 0.25, 3, 0.1)
  assert (found.presence_penalty, found.frequency_penalty) == (1, -1.5)
  assert (found.repetition_penalty, found.logit_bias) == (1.25, {5: -100})
  assert (found.regex, found.seed) == ("a+", 7)
  assert (body.stop.strings, body.num_top, body.n) == (("x",), 5, 2)
  assert chat(max_completion_tokens=9, max_tokens=9).max_tokens == 9
  assert chat(max_completion_tokens=9).max_tokens == chat(max_tokens=9).max_tokens == 9
  assert completion(top_p=0).settings.top_p > 0


def test_every_seed_of_64_bits_is_one_of_ours():
  seeds = [-(2**63), -1, 2**31, 2**63 - 1]
  found = [completion(seed=seed).settings.seed for seed in seeds]
  assert len({*found}) == 4 and all(0 <= seed < 2**31 for seed in found)
  assert found == [completion(seed=seed).settings.seed for seed in seeds]


@pytest.mark.parametrize(
  ("given_prompt", "expected"),
  [
    ("a", ["a"]),
    ("", [""]),
    ([1, 2], [[1, 2]]),
    (["a", "b"], ["a", "b"]),
    ([[1], [2, 3]], [[1], [2, 3]]),
  ],
)
def test_prompts(given_prompt: Any, expected: list):
  assert completion(prompt=given_prompt).prompts == expected


def test_contents_and_calls_are_as_templates_take_them():
  parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
  call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
  body = chat(
    messages=[
      {"role": "developer", "content": parts},
      {"role": "assistant", "content": None, "tool_calls": [call]},
      {"role": "tool", "content": "2", "tool_call_id": "1"},
    ],
    tools=[TOOL],
  )
  assert body.messages[0] == {"role": "system", "content": "ab"}
  assert body.messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
  assert body.tools == [TOOL]
  assert chat(tools=[TOOL], tool_choice="none").tools is None


def test_forms_are_regular_expressions():
  schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
  form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
  assert chat(response_format={"type": "text"}).settings.regex is None
  assert "n" in (chat(response_format=form).settings.regex or "")
  assert chat(response_format={"type": "json_object"}).settings.regex


# -- What is not ---------------------------------------------------------------------------

WRONG: dict[str, list[Any]] = {
  "n": [0, 13, 1.5, "1", True, -1],
  "max_tokens": [0, 65, 2.5, "9"],
  "temperature": [-0.1, 2.1, "1", True, [1]],
  "top_p": [-1, 1.1],
  "top_k": [-1, 0.5],
  "min_p": [2],
  "seed": [2**63, 0.5, "a"],
  "stop": ["", ["a"] * 65, [3], "a" * 1025, {"a": 1}, "\ud800"],
  "presence_penalty": [3, -2.5],
  "frequency_penalty": [3, "x"],
  "repetition_penalty": [0],
  "logit_bias": [
    {"a": 1},
    {"1": 101},
    [1],
    {"-1": 0},
    {"²": 0},
    {"1": "x"},
    {"9" * 30: 0},
    {"097": 1},
  ],
  "regex": [3, "\ud800"],
  "stream": [1, "true"],
  "stream_options": [{"include_usage": True}, 3],
  "model": [3, ["a"]],
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_is_refused_by_its_name(name: str):
  for value in WRONG[name]:
    for read in (completion, chat):
      with pytest.raises(ApiError, match=name) as found:
        read(**{name: value})
      assert (found.value.status, found.value.param) == (400, name), value


@pytest.mark.parametrize(
  ("fields", "param"),
  [
    ({"prompt": None}, "prompt"),
    ({"prompt": 3}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": ["\udc00"]}, "prompt"),
    ({"prompt": ["a"] * 13}, "prompt"),
    ({"prompt": ["a"] * 7, "n": 2}, "n"),
    ({"best_of": 2}, "best_of"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"suffix": "x"}, "suffix"),
    ({"echo": 1}, "echo"),
    ({"max_token": 3}, "max_token"),
  ],
)
def test_wrong_completions(fields: dict[str, Any], param: str):
  with pytest.raises(ApiError) as found:
    completion(**fields)
  assert (found.value.status, found.value.param) == (400, param)


@pytest.mark.parametrize(
  ("fields", "param"),
  [
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": ["hi"]}, "messages[0]"),
    ({"messages": [{"role": "me", "content": ""}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    (
      {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
      "messages[0].content",
    ),
    ({"messages": [{"role": "user", "content": "", "tool_calls": []}]}, "messages[0]."),
    ({"messages": [{"role": "user", "content": "", "age": 3}]}, "messages[0].age"),
    (
      {"messages": [{"role": "user", "content": [TEXT | {"x": 1}]}]},
      "messages[0].content.",
    ),
    *(
      (
        {"messages": [{"role": "assistant", "tool_calls": [call(arguments)]}]},
        "messages[0].",
      )
      for arguments in (
        '{"a": NaN}',
        '{"a": 1, "a": 2}',
        '{"a": "\\ud800"}',
        {"a": "\ud800"},
      )
    ),
    *(({"tools": [tool]}, "tools") for tool in NO_TOOLS),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
    ({"response_format": {"type": "text", "json_schema": {}}}, "response_format"),
    ({"response_format": form(name=3)}, "response_format.json_schema.name"),
    ({"response_format": form(strict="yes")}, "response_format.json_schema.strict"),
    ({"response_format": form(schema={"enum": ["\ud800"]})}, "response_format"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": 3}, "logprobs"),
    ({"tools": "x"}, "tools"),
    ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    (
      {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
      "response_format",
    ),
    ({"response_format": {"type": "json_object"}, "regex": "a"}, "regex"),
    ({"store": True}, "store"),
    ({"functions": []}, "functions"),
  ],
)
def test_wrong_chats(fields: dict[str, Any], param: str):
  with pytest.raises(ApiError) as found:
    chat(**fields)
  assert found.value.status == 400
  assert (found.value.param or "").startswith(param)


def test_what_is_ignored_is_listed_and_all_else_is_read():
  """Fields are known, ignored by name, or refused by name: there is no fourth kind."""
  body = completion(user="me", metadata={"a": "b"})
  assert body.ignored == ["metadata", "user"]
  for known, refused in ((COMPLETION, NOT_COMPLETION), (CHAT, NOT_CHAT), (EMBEDDINGS, {})):
    assert not known & IGNORED and not known & set(refused)


def test_a_model_that_is_not_served_is_not_found():
  check_model(None, ["a"])
  check_model("a", ["a"])
  with pytest.raises(ApiError, match="'b'") as found:
    check_model("b", ["a"])
  assert (found.value.status, found.value.code) == (404, "model_not_found")


# -- Whatever comes ------------------------------------------------------------------------

JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
  lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
  max_leaves=6,
)
NAMES = sorted(COMPLETION | CHAT | EMBEDDINGS | IGNORED | set(NOT_CHAT))


@given(st.dictionaries(st.sampled_from(NAMES) | st.text(), JSON, max_size=6))
def test_any_object_is_a_body_or_refused(values: dict[str, Any]):
  for read in (
    lambda: read_completion({"prompt": "a", **values}, LIMITS),
    lambda: read_chat({"messages": HELLO, **values}, LIMITS),
    lambda: read_embedding({"input": "a", **values}),
  ):
    try:
      read()
    except ApiError as e:
      assert e.status in (400, 404)
      assert e.message.isprintable() and e.code
