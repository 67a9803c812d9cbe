# SPDX-License-Identifier: Apache-2.0
"""What clients ask for: the bodies of OpenAI's API as values, checked."""

import dataclasses
import hashlib
import json
import math
import reprlib
import secrets
from collections.abc import Sequence
from typing import Any

from flaxlm.decoding.completions import Stopping
from flaxlm.decoding.jobs import is_id, read_object
from flaxlm.decoding.sampling import SamplingSettings
from flaxlm.decoding.schemas import regex_of_any_object, regex_of_schema
from flaxlm.errors import ConfigError
from flaxlm.serving.errors import ApiError, api_error, refuse
from flaxlm.serving.fields import Fields, text_of
from flaxlm.serving.limits import (
  MOST_BIASES,
  MOST_STOP_LENGTH,
  MOST_STOPS,
  MOST_TEXTS,
  MOST_TOP,
  Limits,
)

Tokens = list[int]
INF = math.inf
LARGEST_SEED = 2**31 - 1
DEFAULT_TOKENS = 16  # of a completion, as in OpenAI's API
# Fields of both kinds of answers. The last four are not OpenAI's.
SHARED = {
  *("model", "n", "seed", "stop", "stream", "stream_options", "max_tokens", "logprobs"),
  *("temperature", "top_p", "presence_penalty", "frequency_penalty", "logit_bias"),
  *("top_k", "min_p", "repetition_penalty", "regex"),
}
COMPLETION = SHARED | {"prompt", "echo", "best_of"}
CHAT = SHARED | {
  *("messages", "max_completion_tokens", "top_logprobs", "response_format"),
  *("tools", "tool_choice", "store"),
}
EMBEDDINGS = {"model", "input", "encoding_format", "dimensions"}
NOT_COMPLETION = {"suffix": "flaxlm does not fill in the middle"}
NOT_CHAT = {
  "functions": "use tools",
  "function_call": "use tool_choice",
  "audio": "flaxlm writes text",
  "modalities": "flaxlm writes text",
  "prediction": "flaxlm guesses by itself",
  "reasoning_effort": "what a model thinks is in its template",
  "verbosity": "say it in a message",
  "web_search_options": "flaxlm opens no connections",
  "moderation": "flaxlm has no moderation",
}
ROLES = ("system", "developer", "user", "assistant", "tool")
MESSAGE_KEYS = {"role", "content", "name", "tool_calls", "tool_call_id", "refusal"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answering:
  """What completions and chats have in common."""

  model: str | None
  settings: SamplingSettings
  stop: Stopping
  max_tokens: int | None  # None: as many as fit
  n: int
  num_top: int | None  # None: no log-probabilities
  stream: bool
  include_usage: bool
  ignored: list[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionBody(Answering):
  """A body of /v1/completions."""

  prompts: list[str | Tokens]
  echo: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatBody(Answering):
  """A body of /v1/chat/completions."""

  messages: list[dict[str, Any]]
  tools: list[dict[str, Any]] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddingBody:
  """A body of /v1/embeddings."""

  model: str | None
  inputs: list[str | Tokens]
  is_base64: bool
  dimensions: int | None
  ignored: list[str]


# -- Completions and chats -----------------------------------------------------------------


def read_completion(values: dict[str, Any], limits: Limits) -> CompletionBody:
  """Raises `ApiError` for a body that cannot be answered."""
  fields = Fields(values, COMPLETION, NOT_COMPLETION)
  if "prompt" not in fields:
    refuse("prompt", "there is no prompt", "missing_required_parameter")
  prompts = read_inputs("prompt", fields.any("prompt"), limits.most_open)
  echo = fields.switch("echo")
  # Nothing new is written if only the prompt is asked for.
  least = 0 if echo else 1
  most = fields.whole("max_tokens", least, limits.max_tokens, DEFAULT_TOKENS)
  n = fields.whole("n", 1, limits.most_open, 1)
  if fields.whole("best_of", 1, INF, n) != n:
    refuse("best_of", "best_of is not supported: ask for n", "unsupported_parameter")
  if len(prompts) * n > limits.most_open:
    refuse("n", f"{len(prompts)} prompts x n={n} are more than {limits.most_open} answers")
  return CompletionBody(
    **read_shared(fields),
    settings=read_settings(fields, fields.text("regex")),
    max_tokens=most,
    n=n,
    num_top=fields.whole("logprobs", 0, MOST_TOP),
    prompts=prompts,
    echo=echo,
  )


def read_chat(values: dict[str, Any], limits: Limits) -> ChatBody:
  """Raises `ApiError` for a body that cannot be answered."""
  fields = Fields(values, CHAT, NOT_CHAT)
  if "messages" not in fields:
    refuse("messages", "there are no messages", "missing_required_parameter")
  if fields.switch("store"):
    refuse("store", "flaxlm stores no conversations", "unsupported_parameter")
  most = fields.whole("max_tokens", 1, limits.max_tokens)
  if most is not None and fields.any("max_completion_tokens") not in (None, most):
    refuse("max_tokens", "max_tokens is not max_completion_tokens: leave one of them out")
  most = fields.whole("max_completion_tokens", 1, limits.max_tokens, most)
  num_top = fields.whole("top_logprobs", 0, MOST_TOP)
  if num_top is not None and not fields.switch("logprobs"):
    refuse("top_logprobs", "top_logprobs without logprobs: true")
  num_top = (num_top or 0) if fields.switch("logprobs") else None
  regex = fields.text("regex")
  form = read_form(fields)
  if regex is not None and form is not None:
    refuse("regex", "regex beside response_format: leave one of them out")
  return ChatBody(
    **read_shared(fields),
    settings=read_settings(fields, form if regex is None else regex),
    max_tokens=most,
    n=fields.whole("n", 1, limits.most_open, 1),
    num_top=num_top,
    messages=read_messages(fields.any("messages")),
    tools=read_tools(fields),
  )


def read_shared(fields: Fields) -> dict[str, Any]:
  stops = fields.texts("stop", MOST_STOPS)
  if any(not 1 <= len(stop) <= MOST_STOP_LENGTH for stop in stops):
    refuse("stop", f"a string of stop has 1 to {MOST_STOP_LENGTH} characters")
  stream = fields.switch("stream")
  given = fields.object("stream_options")
  options = Fields(given, {"include_usage"}, {}, "stream_options")
  if "stream_options" in fields and not stream:
    refuse("stream_options", "stream_options without stream: true")
  return dict(
    model=fields.text("model"),
    stop=Stopping(strings=stops),
    stream=stream,
    include_usage=options.switch("include_usage"),
    ignored=fields.ignored,
  )


def read_settings(fields: Fields, regex: str | None) -> SamplingSettings:
  settings = SamplingSettings(
    temperature=fields.number("temperature", 0, 2, 1.0),
    # At 0 only the likeliest token is left.
    top_p=max(fields.number("top_p", 0, 1, 1.0), 1e-9),
    top_k=fields.whole("top_k", 0, INF) or None,
    min_p=fields.number("min_p", 0, 1),
    presence_penalty=fields.number("presence_penalty", -2, 2, 0.0),
    frequency_penalty=fields.number("frequency_penalty", -2, 2, 0.0),
    repetition_penalty=fields.number("repetition_penalty", 1e-3, 1e3, 1.0),
    logit_bias=read_biases(fields.object("logit_bias")),
    regex=regex,
    seed=read_seed(fields),
  )
  try:
    settings.check()
  except ConfigError as e:
    raise api_error(e) from e
  return settings


def read_seed(fields: Fields) -> int:
  """A seed of the engine: as given, or a hash of one of 64 bits; else a new one."""
  seed = fields.whole("seed", -(2**63), 2**63 - 1)
  if seed is None:
    return secrets.randbelow(LARGEST_SEED + 1)
  if 0 <= seed <= LARGEST_SEED:
    return seed
  digest = hashlib.blake2b(str(seed).encode(), digest_size=4).digest()
  return int.from_bytes(digest) & LARGEST_SEED


def read_biases(found: dict[str, Any]) -> dict[int, float]:
  if len(found) > MOST_BIASES:
    refuse("logit_bias", f"logit_bias has more than {MOST_BIASES} tokens")
  biases = {}
  for token, bias in found.items():
    bounded = Fields({"logit_bias": bias}, {"logit_bias"}, {})
    if not is_id(token):
      refuse("logit_bias", f"logit_bias: there is no token id {reprlib.repr(token)}")
    biases[int(token)] = bounded.number("logit_bias", -100, 100, 0.0)
  return biases


def read_inputs(name: str, found: Any, most: int) -> list[str | Tokens]:
  """A string, token ids, or a list of either."""
  if isinstance(found, str):
    return [text_of(name, found)]
  if isinstance(found, list) and found and all(type(x) is int for x in found):
    return [found]
  if not isinstance(found, list) or not 1 <= len(found) <= most:
    refuse(name, f"{name} is not a string, token ids, or a list of 1 to {most} of them")
  inputs: list[str | Tokens] = []
  for one in found:
    if isinstance(one, list) and one and all(type(x) is int for x in one):
      inputs.append(one)
    else:
      inputs.append(text_of(name, one))
  return inputs


# -- Messages, tools, forms ----------------------------------------------------------------


def read_messages(found: Any) -> list[dict[str, Any]]:
  """Messages as chat templates take them: contents are texts, arguments are objects."""
  if not isinstance(found, list) or not found:
    refuse("messages", "messages is not a list of at least one message", "invalid_type")
  return [read_message(one, f"messages[{i}]") for i, one in enumerate(found)]


def read_message(found: Any, where: str) -> dict[str, Any]:
  if not isinstance(found, dict):
    refuse(where, f"{where} is {reprlib.repr(found)}; use an object", "invalid_type")
  fields = Fields(found, MESSAGE_KEYS, {"function_call": "use tool_calls"}, where)
  role = fields.any("role")
  if role not in ROLES:
    refuse(f"{where}.role", f"{where}.role is {reprlib.repr(role)}; use {', '.join(ROLES)}")
  message: dict[str, Any] = {"role": "system" if role == "developer" else role}
  if "content" in fields or "tool_calls" not in fields:
    message["content"] = read_content(fields.any("content"), f"{where}.content")
  for name in ("name", "tool_call_id", "refusal"):
    if name in fields:
      message[name] = text_of(f"{where}.{name}", fields.any(name))
  if "tool_calls" in fields:
    if role != "assistant" or not isinstance(fields.any("tool_calls"), list):
      refuse(f"{where}.tool_calls", "tool_calls are a list, of the assistant")
    calls = fields.any("tool_calls")
    message["tool_calls"] = [read_call(one, f"{where}.tool_calls") for one in calls]
  return message


def read_content(found: Any, where: str) -> str:
  """A text, or the texts of several parts."""
  if not isinstance(found, list):
    return text_of(where, found)
  texts = []
  for part in found:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text":
      message = f"a part of {where} is of type {reprlib.repr(kind)}; flaxlm reads text"
      refuse(where, message, "unsupported_content")
    fields = Fields(part, {"type", "text"}, {}, where)
    texts.append(text_of(f"{where}.text", fields.any("text")))
  return "".join(texts)


def read_call(found: Any, where: str) -> dict[str, Any]:
  """A call of a function. Its arguments, a JSON text, are an object for templates."""
  function = found.get("function") if isinstance(found, dict) else None
  if not isinstance(function, dict) or not isinstance(function.get("name"), str):
    refuse(where, f"a call of {where} has no function with a name")
  arguments = function.get("arguments", {})
  if isinstance(arguments, str):
    try:
      arguments = read_object(arguments or "{}")
    except ConfigError as e:
      shown = reprlib.repr(function["name"])
      refuse(where, f"the arguments of {shown} are not a JSON object: {e.cause}")
  if not isinstance(arguments, dict):
    refuse(where, f"the arguments of {reprlib.repr(function['name'])} are not an object")
  check_texts(where, found)
  check_texts(where, arguments)
  return {**found, "function": {**function, "arguments": arguments}}


def read_tools(fields: Fields) -> list[dict[str, Any]] | None:
  """The functions that a template tells the model of; None for none."""
  tools, choice = fields.any("tools"), fields.any("tool_choice")
  if choice not in (None, "auto", "none"):
    message = f"tool_choice is {reprlib.repr(choice)}; flaxlm has auto and none"
    refuse("tool_choice", message, "unsupported_parameter")
  if tools is None:
    return None
  if not isinstance(tools, list) or not all(map(is_tool, tools)):
    like = '[{"type": "function", "function": {"name": ...}}]'
    refuse("tools", f"tools is not a list like {like}")
  check_texts("tools", tools)
  return None if choice == "none" or not tools else tools


def is_tool(found: Any) -> bool:
  """Whether it is a function with a name; other kinds of tools no template knows."""
  function = found.get("function") if isinstance(found, dict) else None
  is_named = isinstance(function, dict) and isinstance(function.get("name"), str)
  return is_named and found.get("type", "function") == "function"


def check_texts(where: str, found: Any) -> None:
  """Refuses what has halves of surrogate pairs anywhere: templates would change them."""
  try:
    text_of(where, json.dumps(found, ensure_ascii=False))
  except RecursionError:
    refuse(where, f"{where} is nested too deeply")


def read_form(fields: Fields) -> str | None:
  """The regular expression that a `response_format` asks for."""
  given = fields.object("response_format")
  check_texts("response_format", given)
  form = Fields(given, {"type", "json_schema"}, {}, "response_format")
  kind = form.any("type")
  if kind in ("text", "json_object") and "json_schema" in form:
    refuse("response_format", f"response_format has a json_schema, and is of type {kind}")
  if "response_format" not in fields or kind == "text":
    return None
  if kind == "json_object":
    return regex_of_any_object()
  if kind != "json_schema":
    message = f"response_format.type is {reprlib.repr(kind)}"
    refuse("response_format", f"{message}; use text, json_object or json_schema")
  named = form.object("json_schema")
  known, where = {"name", "schema", "strict", "description"}, "response_format.json_schema"
  inside = Fields(named, known, {}, where)
  for name in ("name", "description"):  # they change nothing
    inside.text(name)
  inside.switch("strict")  # an answer always fits
  if "schema" not in inside:
    refuse("response_format", "response_format.json_schema has no schema")
  try:
    return regex_of_schema(inside.any("schema"))
  except ConfigError as e:
    raise api_error(e, "response_format") from e


# -- Embeddings ----------------------------------------------------------------------------


def read_embedding(values: dict[str, Any]) -> EmbeddingBody:
  """Raises `ApiError` for a body that cannot be answered."""
  fields = Fields(values, EMBEDDINGS, {})
  if "input" not in fields:
    refuse("input", "there is no input", "missing_required_parameter")
  encoding = fields.any("encoding_format") or "float"
  if encoding not in ("float", "base64"):
    refuse("encoding_format", f"encoding_format is {reprlib.repr(encoding)}")
  return EmbeddingBody(
    model=fields.text("model"),
    inputs=read_inputs("input", fields.any("input"), MOST_TEXTS),
    is_base64=encoding == "base64",
    dimensions=fields.whole("dimensions", 1, INF),
    ignored=fields.ignored,
  )


def check_model(asked: str | None, served: Sequence[str]) -> None:
  """Raises `ApiError`, status 404, for a model that is not served."""
  if asked is not None and asked not in served:
    shown = reprlib.repr(asked)
    message = f"there is no model {shown} here, but {', '.join(served)}"
    raise ApiError(404, message, param="model", code="model_not_found")
