# SPDX-License-Identifier: Apache-2.0
"""Answers in the shapes of OpenAI's API, whole and in pieces."""

import base64
import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from flaxlm.decoding.prompt_scores import PromptScores
from flaxlm.serving.generation import Piece
from flaxlm.tokenizers import AnyTokenizer

LEAST_LOGPROB = -9999.0  # for what is as good as impossible, as in OpenAI's API
REASONS = {"stop": "stop", "length": "length", "time": "length", "tool_calls": "tool_calls"}


def new_id(prefix: str) -> str:
  return f"{prefix}-{secrets.token_hex(12)}"


def head(kind: str, own_id: str, model: str) -> dict[str, Any]:
  return {"id": own_id, "object": kind, "created": int(time.time()), "model": model}


def usage_of(num_prompt: int, num_written: int, num_cached: int) -> dict[str, Any]:
  return {
    "prompt_tokens": num_prompt,
    "completion_tokens": num_written,
    "total_tokens": num_prompt + num_written,
    "prompt_tokens_details": {"cached_tokens": num_cached},
  }


def ending(finish_reason: str | None) -> dict[str, Any]:
  """Why an answer has ended; OpenAI's API has no name for a time limit."""
  fields: dict[str, Any] = {"finish_reason": REASONS.get(finish_reason or "")}
  return fields | ({"stop_reason": "time"} if finish_reason == "time" else {})


def token_text(tokenizer: AnyTokenizer, token: int) -> str:
  """A token's text; its bytes where they are no characters, and a special token's name."""
  data = tokenizer.bytes_of(token)
  if not data:
    return tokenizer.name_of(token) or f"token_{token}"
  try:
    return data.decode()
  except UnicodeDecodeError:
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


# -- /v1/completions -----------------------------------------------------------------------


class TextLogprobs:
  """The `logprobs` of a completion, which know where in the text they are."""

  def __init__(self, tokenizer: AnyTokenizer, num_top: int):
    self.tokenizer, self.num_top = tokenizer, num_top
    self.offset = 0  # characters before the next token
    self.stream = tokenizer.stream()

  def of_prompt(self, prompt: Sequence[int], scores: PromptScores) -> dict[str, Any]:
    """Of all tokens of a prompt, the first of which follows nothing."""
    logprobs = [None, *scores.logprobs][: len(prompt)]
    top = [None, *scores.top] if self.num_top else [None] * len(prompt)
    return self._of(prompt, logprobs, top[: len(prompt)])

  def of_piece(self, piece: Piece) -> dict[str, Any]:
    top = piece.top if self.num_top else [None] * len(piece.tokens)
    return self._of(piece.tokens, piece.logprobs, top)

  def _of(
    self, tokens: Sequence[int], logprobs: Sequence[Any], top: Sequence[Any]
  ) -> dict[str, Any]:
    offsets = []
    for token in tokens:
      offsets.append(self.offset)
      self.offset += len(self.stream.push(token))
    return {
      "tokens": [token_text(self.tokenizer, token) for token in tokens],
      "token_logprobs": [None if x is None else max(x, LEAST_LOGPROB) for x in logprobs],
      "top_logprobs": [
        None if of is None else self._top(token, own, of)
        for token, own, of in zip(tokens, logprobs, top, strict=True)
      ],
      "text_offset": offsets,
    }

  def _top(self, token: int, own: float, top: list[tuple[int, float]]) -> dict[str, float]:
    """The likeliest tokens, and the one that stands there. Of two with one text, the
    likelier one counts."""
    named: dict[str, float] = {}
    for one, logprob in [*top, (token, own)]:
      named.setdefault(token_text(self.tokenizer, one), max(logprob, LEAST_LOGPROB))
    return named


def joined_logprobs(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
  keys = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
  return {key: [x for part in parts for x in part[key]] for key in keys}


def text_choice(
  index: int, text: str, logprobs: dict | None, finish_reason: str | None
) -> dict[str, Any]:
  return {"index": index, "text": text, "logprobs": logprobs, **ending(finish_reason)}


# -- /v1/chat/completions ------------------------------------------------------------------


def chat_logprobs(
  tokenizer: AnyTokenizer, piece: Piece, num_top: int, ends: set[int]
) -> dict[str, Any]:
  """The `logprobs` of a piece of a message, without the token that ends it."""

  def one(token: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.bytes_of(token)
    return {
      "token": token_text(tokenizer, token),
      "logprob": max(logprob, LEAST_LOGPROB),
      "bytes": [*data] if data else None,
    }

  tops = piece.top if num_top else [[]] * len(piece.tokens)
  return {
    "content": [
      one(token, logprob) | {"top_logprobs": [one(*other) for other in top]}
      for token, logprob, top in zip(piece.tokens, piece.logprobs, tops, strict=True)
      if token not in ends
    ],
    "refusal": None,
  }


def tool_call(number: int, call: dict[str, Any]) -> dict[str, Any]:
  """A call by its name and arguments; `number` is its place among those of the answer."""
  arguments = call.get("arguments", {})
  if not isinstance(arguments, str):
    arguments = json.dumps(arguments, ensure_ascii=False)
  function = {"name": call["name"], "arguments": arguments}
  return {"index": number, "id": new_id("call"), "type": "function", "function": function}


def message_choice(
  index: int,
  text: str,
  calls: list[dict[str, Any]],
  logprobs: dict | None,
  finish_reason: str | None,
) -> dict[str, Any]:
  message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
  if calls:
    message["content"] = text or None
    message["tool_calls"] = [
      {key: value for key, value in call.items() if key != "index"} for call in calls
    ]
  return {"index": index, "message": message, "logprobs": logprobs} | ending(finish_reason)


def delta_choice(
  index: int, delta: dict[str, Any], logprobs: dict | None, finish_reason: str | None
) -> dict[str, Any]:
  return {"index": index, "delta": delta, "logprobs": logprobs} | ending(finish_reason)


# -- /v1/embeddings ------------------------------------------------------------------------


def embedding(index: int, vector_D: np.ndarray, is_base64: bool) -> dict[str, Any]:
  """A vector as numbers, or as little-endian float32 in base64."""
  vector_D = np.asarray(vector_D, "<f4")
  value: Any = [float(x) for x in vector_D]
  if is_base64:
    value = base64.b64encode(vector_D.tobytes()).decode()
  return {"object": "embedding", "index": index, "embedding": value}
