# SPDX-License-Identifier: Apache-2.0
"""Many clients at once, some of whom leave: who stays gets what it would get alone."""

import asyncio
import gc
import json
import random
import time
import tracemalloc
from pathlib import Path
from typing import Any

import httpx2
import pytest
from serving_runs import JSON_LETTERS, is_free, listening, random_run, served

from flaxlm.decoding.compile_counter import count_compilations
from flaxlm.decoding.completions import complete
from flaxlm.decoding.sampling import SamplingSettings
from flaxlm.serving import server
from flaxlm.serving.app import build_app
from flaxlm.serving.limits import Limits

NUM_NEW = 40


def body_of(number: int) -> dict[str, Any]:
  """Requests of all kinds: greedy and drawn, short prompts and long."""
  prompt = "ab \n"[number % 4] * (1 + number * 7 % 60)
  return {
    "prompt": prompt,
    "max_tokens": 4 + number % NUM_NEW,
    "temperature": number % 3 / 2,
    "seed": number % 11,
    "stream": True,
  }


async def ask(client: Any, url: str, body: dict[str, Any], leave_after: int | None) -> Any:
  """The text of a stream; None for a client that leaves after so many events."""
  text, count = "", 0
  async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
    assert response.status_code == 200, await response.aread()
    async for line in response.aiter_lines():
      if count == leave_after:
        return None
      if line == "data: [DONE]":
        return text
      if line:
        (choice,) = json.loads(line.removeprefix("data: "))["choices"]
        text, count = text + choice["text"], count + 1
  raise AssertionError("the stream has no end")


async def all_at_once(
  url: str, bodies: list[dict[str, Any]], leave: list[int | None]
) -> list[Any]:
  limits = httpx2.Limits(max_connections=None)
  async with httpx2.AsyncClient(timeout=200, limits=limits) as client:
    asked = zip(bodies, leave, strict=True)
    return await asyncio.gather(*(ask(client, url, body, n) for body, n in asked))


@pytest.mark.slow
@pytest.mark.parametrize(
  "count", [40, pytest.param(200, marks=pytest.mark.fuzz)], ids=["40", "200"]
)
def test_who_stays_gets_what_it_would_get_alone(tmp_path: Path, count: int):
  run = random_run(tmp_path / "letters", eos_logit=-6.0)
  rng = random.Random(0)
  bodies = [body_of(number) for number in range(count)]
  leave = [rng.choice([None, None, None, 0, 1]) for _ in bodies]
  limits = Limits(slots=8, max_queue=count)
  with served(run, limits) as service, listening(build_app(service)) as url:
    found = asyncio.run(all_at_once(url, bodies, leave))
    assert is_free(service)
    num_left = service.metrics.num_left
  assert num_left > 0
  stayed = [
    (body, text) for body, text in zip(bodies, found, strict=True) if text is not None
  ]
  assert len(stayed) > count / 3
  wanted = complete(
    run,
    [body["prompt"] for body, _ in stayed],
    [
      SamplingSettings(temperature=body["temperature"], seed=body["seed"])
      for body, _ in stayed
    ],
    NUM_NEW + 4,
  )
  for (body, text), alone in zip(stayed, wanted, strict=True):
    tokens = alone.tokens[: body["max_tokens"]]
    assert text == run.tokenizer.decode(tokens)


def memory_in_use() -> int:
  """Bytes of Python's objects, without those that wait for their end."""
  time.sleep(2)
  gc.collect()
  return tracemalloc.get_traced_memory()[0]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
  "num_requests", [200, pytest.param(10_000, marks=pytest.mark.fuzz)], ids=["200", "10000"]
)
def test_many_requests_leave_nothing_behind(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_requests: int
):
  """No program is compiled, and after the first of them memory stays as it is."""
  # Until then uvicorn's timer holds on to a connection, even if its client has left.
  monkeypatch.setattr(server, "KEEP_ALIVE_SECONDS", 1)
  run = random_run(tmp_path / "letters", context=64)
  limits = Limits(slots=4, max_queue=60)

  async def some(url: str, first: int, count: int) -> None:
    bodies = [
      body_of(number) | {"prompt": "ab", "max_tokens": 3 + number % 5}
      for number in range(first, first + count)
    ]
    for start in range(0, count, 50):
      part = bodies[start : start + 50]
      await all_at_once(url, part, [0 if n % 9 == 8 else None for n in range(len(part))])

  # How the batch grows and shrinks is a matter of time: only a warm server has met it all.
  with (
    served(run, limits, warm=True) as service,
    listening(build_app(service)) as url,
    count_compilations() as counter,
  ):
    asyncio.run(some(url, 0, 100))
    tracemalloc.start()
    asyncio.run(some(url, 100, 100))  # what is made anew, as caches, is seen from now on
    assert is_free(service)
    before = memory_in_use()
    asyncio.run(some(url, 200, num_requests))
    assert is_free(service)
    after = memory_in_use()
    tracemalloc.stop()
    assert counter.programs == 0, counter.names
    assert after - before < 100_000
    assert not service.worker._tickets and not service.worker._open


@pytest.mark.slow
def test_a_warm_server_compiles_nothing(tmp_path: Path):
  run = random_run(tmp_path / "letters", context=64)
  limits = Limits(slots=1, max_queue=60)
  with (
    served(run, limits, warm=True) as service,
    listening(build_app(service)) as url,
    count_compilations() as counter,
  ):
    bodies = [body_of(number) | {"prompt": "ab", "max_tokens": 5} for number in range(4)]
    bodies += [bodies[0] | more for more in ({"top_p": 0.5}, {"presence_penalty": 1.0})]
    bodies += [bodies[1] | {"logprobs": 2, "echo": True}]
    asyncio.run(all_at_once(url, bodies, [None] * len(bodies)))
  assert counter.programs == 0, counter.names


# -- Whatever is sent ----------------------------------------------------------------------

VALUES: list[Any] = [
  *(None, True, False, 0, 1, -1, 2, 7, 63, 1e9, 0.5, -0.5, 10**30, 1e308),
  *(
    "",
    "a",
    "ab\n",
    "\ud800",
    "漢" * 50,
    "true",
    "auto",
    "json_object",
    "\x00",
    "a" * 3000,
  ),
  *(
    [],
    {},
    [[]],
    [1],
    [1, 2, 3],
    [[1], [2]],
    ["a", "b"],
    [None],
    [9999],
    {"1": 2},
    {"a": 1},
  ),
  *({"type": "json_object"}, {"type": "text"}, {"include_usage": True}),
  *([{"role": "user", "content": "a"}], [{"role": "user", "content": ["a"]}]),
  [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
  [{"role": "system", "content": [{"type": "text", "text": "a"}]}],
  {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "boolean"}}},
  [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
]
PATHS = ("completions", "chat/completions", "embeddings")


def strange_body(rng: random.Random) -> tuple[str, bytes]:
  """A body that begins well, with fields that may be anything, and bytes that may break."""
  from flaxlm.serving.bodies import CHAT, COMPLETION, EMBEDDINGS, NOT_CHAT
  from flaxlm.serving.fields import IGNORED

  path = rng.choice(PATHS)
  fields = {"completions": COMPLETION, "chat/completions": CHAT, "embeddings": EMBEDDINGS}
  names = sorted(fields[path] | IGNORED | set(NOT_CHAT) | {"x", ""})
  body: dict[str, Any] = {"max_tokens": rng.choice([1, 2, 5]), "stream": rng.random() < 0.3}
  body |= {
    "completions": {"prompt": "ab"},
    "chat/completions": {"messages": [{"role": "user", "content": "ab"}]},
    "embeddings": {"input": "ab"},
  }[path]
  if path == "embeddings":
    body = {"input": "ab"}
  for _ in range(rng.randrange(4)):
    body[rng.choice(names)] = rng.choice(VALUES)
  data = json.dumps(body).encode()
  if rng.random() < 0.15:
    at, size = rng.randrange(len(data)), rng.randrange(4)
    data = data[:at] + rng.randbytes(size) + data[at + rng.randrange(3) :]
  return path, data


async def send_strange(url: str, count: int, seed: int) -> list[int]:
  rng = random.Random(seed)
  statuses = []

  async def one(client: Any, path: str, data: bytes) -> None:
    headers = {"content-type": "application/json"}
    response = await client.post(f"{url}/v1/{path}", content=data, headers=headers)
    statuses.append(response.status_code)
    assert response.status_code < 500, (path, data, response.text)
    if response.status_code != 200:
      assert response.json()["error"]["message"], data
    elif response.headers["content-type"].startswith("text/event-stream"):
      assert response.text.endswith("data: [DONE]\n\n"), (data, response.text)

  async with httpx2.AsyncClient(timeout=300) as client:
    for start in range(0, count, 8):
      some = [strange_body(rng) for _ in range(min(8, count - start))]
      await asyncio.gather(*(one(client, path, data) for path, data in some))
  return statuses


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
  ("count", "seed"),
  [(200, 0), pytest.param(10_000, 1, marks=pytest.mark.fuzz)],
  ids=["200", "10000"],
)
def test_no_body_is_a_failure_of_the_server(tmp_path: Path, count: int, seed: int):
  pytest.importorskip("outlines_core")
  run = random_run(tmp_path / "letters", letters=JSON_LETTERS)
  limits = Limits(slots=4, max_queue=200, max_tokens=16, max_body=5000)
  with served(run, limits) as service:
    with listening(build_app(service)) as url:
      statuses = asyncio.run(send_strange(url, count, seed))
    assert is_free(service, 60)
    assert service.worker.error is None
  assert len(statuses) == count and statuses.count(200) > count / 8
  assert {200, 400} <= {*statuses} <= {200, 400, 404, 413}
