# SPDX-License-Identifier: Apache-2.0
"""The application: answers are those of the decoder, in OpenAI's shapes, and who may not
have one is told why."""

import base64
import concurrent.futures
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from serving_runs import (
  BYTES,
  JSON_LETTERS,
  LIMITS,
  WITH_TOOLS,
  encoder_run,
  events_of,
  is_free,
  listening,
  random_run,
  run_of,
  served,
)
from starlette.testclient import TestClient

from flaxlm.config import ModelConfig
from flaxlm.decoding.completions import complete
from flaxlm.decoding.encoding import embed_texts
from flaxlm.decoding.loading import Run, prepare_for_decoding
from flaxlm.decoding.row_sizes import cache_bytes
from flaxlm.decoding.sampling import SamplingSettings
from flaxlm.decoding.scoring import TokenPair, score_tokens
from flaxlm.errors import ConfigError, NonFiniteError
from flaxlm.serving import service as service_module
from flaxlm.serving import worker
from flaxlm.serving.app import build_app, is_loopback_name
from flaxlm.serving.limits import Limits
from flaxlm.serving.service import Service

HOST = "http://127.0.0.1:8000"
HELLO = [{"role": "user", "content": "ab"}]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
  return random_run(tmp_path_factory.mktemp("runs") / "letters")


@pytest.fixture(scope="module")
def service(run: Run) -> Iterator[Service]:
  with served(run) as service:
    yield service


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[TestClient]:
  with TestClient(build_app(service), HOST) as client:
    yield client


def post(client: TestClient, path: str, status: int = 200, **body: Any) -> Any:
  response = client.post(f"/v1/{path}", json=body)
  assert response.status_code == status, response.text
  return response.json()


def expected(run: Run, prompts: list[str], num: int, n: int = 1, **settings: Any) -> list:
  """What the decoder itself writes."""
  rows = [
    of_sample
    for row in range(len(prompts))
    for of_sample in SamplingSettings(**settings, row=row).for_samples(n)
  ]
  texts = [prompt for prompt in prompts for _ in range(n)]
  return complete(run, texts, rows, num)


# -- Completions ---------------------------------------------------------------------------


def test_a_completion_is_what_the_decoder_writes(client: TestClient, run: Run):
  found = post(
    client, "completions", model="letters", prompt="ab", max_tokens=20, temperature=0
  )
  (wanted,) = expected(run, ["ab"], 20, temperature=0)
  assert found["object"] == "text_completion" and found["model"] == "letters"
  assert found["id"].startswith("cmpl-")
  (choice,) = found["choices"]
  assert choice["text"] == wanted.completion
  assert choice["finish_reason"] == wanted.finish_reason
  assert choice["logprobs"] is None and choice["index"] == 0
  num = len(wanted.tokens)
  assert found["usage"] == {
    "prompt_tokens": 3,
    "completion_tokens": num,
    "total_tokens": 3 + num,
    "prompt_tokens_details": {"cached_tokens": 0},
  }


def test_an_answer_that_alone_is_too_large_for_the_cache_is_refused(tmp_path: Path):
  run = random_run(tmp_path / "letters")
  one = cache_bytes(run.model, 1, 128, 0)
  with served(run, Limits(cache_bytes=one)) as service:
    client = TestClient(build_app(service), HOST)
    post(client, "completions", prompt=["ab", "cd"], max_tokens=20)  # one waits
    error = post(client, "completions", 400, prompt="ab", max_tokens=150)["error"]
    assert f"a cache of more than {one} bytes" in error["message"]


def test_usage_tells_what_was_read_for_earlier_prompts(client: TestClient):
  prompt = "hjkq" * 20  # in pieces of 64 tokens
  ask = lambda **more: post(
    client, "completions", prompt=[prompt, "ab"], max_tokens=1, **more
  )["usage"]["prompt_tokens_details"]
  assert ask() == {"cached_tokens": 0}
  assert ask() == ask(n=3) == {"cached_tokens": 64}


@pytest.mark.slow
@pytest.mark.parametrize(
  "fields",
  [
    pytest.param(dict(window=9), id="window", marks=pytest.mark.fuzz),
    pytest.param(dict(family="rnn", depth=2), id="rnn"),
  ],
)
def test_usage_tells_what_rings_and_rnns_had_read(tmp_path: Path, fields: dict[str, Any]):
  """A prompt that goes on from an earlier one is read from its end."""
  run = random_run(tmp_path / "letters", **fields)
  prompt = "hjkq" * 20
  for most in (2**20, 0):
    with served(run, Limits(prefix_bytes=most)) as service:
      client = TestClient(build_app(service), HOST)
      ask = lambda text, to=client: post(
        to, "completions", prompt=text, max_tokens=5, seed=1
      )
      found = [ask(text) for text in (prompt, prompt, prompt + "x")]
    cached = [one["usage"]["prompt_tokens_details"]["cached_tokens"] for one in found]
    assert cached == ([0, 64, 81] if most else [0, 0, 0])
    told = [one["choices"][0]["text"] for one in found]
    if most:
      with_store = told
  assert told == with_store and told[0] == told[1]


def test_a_server_that_rests_gives_its_batch_back(
  run: Run, monkeypatch: pytest.MonkeyPatch
):
  """And answers as before."""
  given_back: list[bool] = []
  monkeypatch.setattr(worker, "REST_SECONDS", 0.05)
  monkeypatch.setattr(
    service_module, "release_freed_memory", lambda: given_back.append(True)
  )
  with served(run) as service:
    client, found = TestClient(build_app(service), HOST), []
    for _ in range(2):
      body = dict(prompt="ab", max_tokens=3, seed=1)
      found.append(post(client, "completions", **body)["choices"])
      end = time.monotonic() + 20
      while service.engine._state is not None:  # type: ignore[union-attr]
        assert time.monotonic() < end
        time.sleep(0.01)
  assert found[0] == found[1] and given_back


def test_prompts_and_samples_have_draws_of_their_own(client: TestClient, run: Run):
  prompts = ["ab", "b a"]
  found = post(client, "completions", prompt=prompts, n=3, seed=5, max_tokens=12)
  wanted = expected(run, prompts, 12, 3, temperature=1, seed=5)
  texts = [choice["text"] for choice in found["choices"]]
  assert texts == [one.completion for one in wanted]
  assert [choice["index"] for choice in found["choices"]] == [*range(6)]
  assert len({*texts}) == 6


def test_ids_are_taken_as_they_are(client: TestClient, run: Run):
  ids = run.tokenizer.framed(run.tokenizer.encode("ab"), "prompt")
  by_ids = post(client, "completions", prompt=ids, max_tokens=9, temperature=0)
  by_text = post(client, "completions", prompt="ab", max_tokens=9, temperature=0)
  assert by_ids["choices"] == by_text["choices"]
  both = post(client, "completions", prompt=[ids, ids], max_tokens=9, temperature=0)
  assert [x["text"] for x in both["choices"]] == [by_ids["choices"][0]["text"]] * 2


@pytest.mark.parametrize("stop", [None, ["b", "\n"]])
def test_a_stream_adds_up_to_the_whole(client: TestClient, stop: Any):
  body = dict(prompt=["ab", "a"], n=2, seed=3, max_tokens=30, stop=stop, logprobs=2)
  whole = post(client, "completions", **body)
  options = {"include_usage": True}
  asked = {**body, "stream": True, "stream_options": options}
  response = client.post("/v1/completions", json=asked)
  assert response.headers["content-type"].startswith("text/event-stream")
  *chunks, last = events_of(response.text)
  assert last["choices"] == [] and last["usage"] == whole["usage"]
  for choice in whole["choices"]:
    parts = [c for e in chunks for c in e["choices"] if c["index"] == choice["index"]]
    assert "".join(part["text"] for part in parts) == choice["text"]
    for key, values in choice["logprobs"].items():
      assert [x for part in parts for x in part["logprobs"][key]] == values
    reasons = [part["finish_reason"] for part in parts]
    assert reasons == [None] * (len(parts) - 1) + [choice["finish_reason"]]


def test_stops_are_not_shown(client: TestClient):
  body = dict(prompt="ab", max_tokens=60, seed=1, temperature=1)
  whole = post(client, "completions", **body)["choices"][0]["text"]
  stop = whole[3:5]
  found = post(client, "completions", **body, stop=stop)["choices"][0]
  assert found["text"] == whole.partition(stop)[0] and found["finish_reason"] == "stop"


def test_settings_change_what_is_drawn(client: TestClient, run: Run):
  settings: dict[str, Any] = dict(presence_penalty=1.5, frequency_penalty=0.5, seed=2)
  settings |= dict(top_k=3, repetition_penalty=1.2, logit_bias={97: -3.0}, top_p=0.9)
  body = settings | dict(logit_bias={"97": -3})
  found = post(client, "completions", prompt="ab", max_tokens=24, **body)
  (wanted,) = expected(run, ["ab"], 24, temperature=1.0, **settings)
  assert found["choices"][0]["text"] == wanted.completion


# -- Log-probabilities ---------------------------------------------------------------------


def test_prompts_have_log_probabilities(client: TestClient, run: Run):
  """Their sums are those of `scoring`, as lm-evaluation-harness asks for them."""
  ids = run.tokenizer.framed(run.tokenizer.encode("ab é\na b"), "prompt")
  body = dict(prompt=ids, echo=True, logprobs=1, temperature=0, max_tokens=1)
  (choice,) = post(client, "completions", **body)["choices"]
  found = choice["logprobs"]
  assert len(found["tokens"]) == len(ids) + 1 and found["token_logprobs"][0] is None
  assert found["tokens"][:3] == ["<|endoftext|>", "a", "b"]
  assert found["tokens"][4] == "bytes:\\xc3"
  for start in range(1, len(ids)):
    pair = TokenPair(tuple(ids[:start]), tuple(ids[start:]))
    (wanted,) = score_tokens(run, [pair])
    assert sum(found["token_logprobs"][start:-1]) == pytest.approx(wanted.logprob, rel=1e-5)
    greedy = [
      own == max(top.values())
      for own, top in zip(found["token_logprobs"], found["top_logprobs"], strict=True)
      if top is not None
    ]
    assert all(greedy[start - 1 : -1]) == wanted.is_greedy
  assert choice["text"].startswith("ab é\na b")


def test_only_the_prompt(client: TestClient):
  body = dict(prompt="a é", echo=True, max_tokens=0)
  found = post(client, "completions", **body, logprobs=0)
  (choice,) = found["choices"]
  assert choice["text"] == "a é" and choice["finish_reason"] == "length"
  assert choice["logprobs"]["top_logprobs"] == [None] * 5
  assert choice["logprobs"]["text_offset"] == [0, 0, 1, 2, 2]
  assert found["usage"]["completion_tokens"] == 0
  assert post(client, "completions", **body)["choices"][0]["logprobs"] is None


def test_written_tokens_have_log_probabilities(client: TestClient, run: Run):
  (wanted,) = expected(run, ["ab"], 12, temperature=0)
  body = dict(prompt="ab", max_tokens=12, temperature=0, logprobs=3)
  found = post(client, "completions", **body)["choices"][0]["logprobs"]
  assert found["token_logprobs"] == pytest.approx(wanted.logprobs, rel=1e-4)
  for token, top in zip(found["tokens"], found["top_logprobs"], strict=True):
    values = [*top.values()]
    assert token in top and values[:3] == sorted(values[:3], reverse=True)
    assert len(top) in (3, 4)


# -- Chats ---------------------------------------------------------------------------------


def test_a_chat_is_a_completion_of_its_template(client: TestClient):
  body = dict(seed=4, max_tokens=20)
  found = post(client, "chat/completions", messages=HELLO, **body)
  text = "<|endoftext|>user:\nab\nassistant:\n"
  ids = [256, *text.removeprefix("<|endoftext|>").encode()]
  wanted = post(client, "completions", prompt=ids, **body)
  assert found["object"] == "chat.completion" and found["usage"] == wanted["usage"]
  (choice,) = found["choices"]
  message = {"role": "assistant", "content": wanted["choices"][0]["text"], "refusal": None}
  assert choice["message"] == message


def test_a_streamed_chat_adds_up_to_the_whole(client: TestClient):
  body = dict(messages=HELLO, seed=4, n=2, max_tokens=30, logprobs=True, top_logprobs=2)
  whole = post(client, "chat/completions", **body)
  asked = body | {"stream": True, "stream_options": {"include_usage": True}}
  response = client.post("/v1/chat/completions", json=asked)
  *chunks, last = events_of(response.text)
  assert last["usage"] == whole["usage"]
  for choice in whole["choices"]:
    parts = [c for e in chunks for c in e["choices"] if c["index"] == choice["index"]]
    assert parts[0]["delta"]["role"] == "assistant"
    texts = [part["delta"].get("content") or "" for part in parts]
    assert "".join(texts) == choice["message"]["content"]
    scored = [x for p in parts for x in (p["logprobs"] or {"content": []})["content"]]
    assert scored == choice["logprobs"]["content"]
    data = bytes(byte for token in scored for byte in token["bytes"])
    assert data.decode("utf-8", "replace") == choice["message"]["content"]
    assert all(len(token["top_logprobs"]) == 2 for token in scored)


def test_without_a_limit_an_answer_fills_the_context(client: TestClient):
  found = post(client, "chat/completions", messages=HELLO, logit_bias={"256": -100})
  assert found["usage"]["completion_tokens"] == LIMITS.max_tokens
  assert found["choices"][0]["finish_reason"] == "length"


@pytest.fixture(scope="module")
def writes_json(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
  """A run that has letters for JSON, and a template with a place for tools."""
  pytest.importorskip("outlines_core")
  path = tmp_path_factory.mktemp("runs") / "json"
  run = random_run(path, letters=JSON_LETTERS, template=WITH_TOOLS)
  with served(run) as service, TestClient(build_app(service), HOST) as client:
    yield client


def test_answers_have_their_form(writes_json: TestClient):
  properties = {"n": {"type": "boolean"}, "e": {"enum": ["a", "b"]}}
  schema = {"type": "object", "properties": properties, "required": ["n", "e"]}
  form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
  body = dict(messages=HELLO, max_tokens=60, seed=1)
  found = post(writes_json, "chat/completions", **body, response_format=form)
  value = json.loads(found["choices"][0]["message"]["content"])
  assert value["n"] in (True, False) and value["e"] in ("a", "b")
  found = post(writes_json, "completions", prompt="a", regex="(tr|fa)[0-9]{3}", seed=1)
  assert re.fullmatch("(tr|fa)[0-9]{3}", found["choices"][0]["text"])
  form = {"type": "json_object"}
  text = post(writes_json, "chat/completions", **body, response_format=form)
  assert text["choices"][0]["message"]["content"].startswith("{")
  error = post(writes_json, "completions", 400, prompt="a", regex="(")["error"]
  assert "regular expression" in error["message"]


def test_tools_reach_the_template(writes_json: TestClient, client: TestClient):
  tool = {"type": "function", "function": {"name": "find"}}
  body = dict(messages=HELLO, max_tokens=1, temperature=0)
  ask = lambda **more: post(writes_json, "chat/completions", **body, **more)["usage"]
  text = f"tools: {json.dumps([tool])}\nuser: ab\nassistant:"
  assert ask(tools=[tool])["prompt_tokens"] == len(text)
  assert ask(tools=[tool], tool_choice="none") == ask()
  call = {"function": {"name": "find", "arguments": '{"a": 1}'}}
  messages = [*HELLO, {"role": "assistant", "tool_calls": [call]}]
  messages += [{"role": "tool", "content": "3"}]
  body["messages"] = messages
  assert ask()["prompt_tokens"] > len("user: ab\nassistant:")
  error = post(client, "chat/completions", 400, messages=HELLO, tools=[tool])["error"]
  assert error["param"] == "tools" and "no place for tools" in error["message"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rnn", "encoder_decoder", "int8"])
def test_other_families_and_narrow_weights(tmp_path: Path, kind: str):
  fields = {"rnn": dict(family="rnn"), "encoder_decoder": dict(family="encoder_decoder")}
  shape = dict(depth=1, width=16, num_heads=2, vocab_size=320, context=64)
  run = run_of(tmp_path, ModelConfig(**shape, **fields.get(kind, {})), BYTES)
  run = prepare_for_decoding(run, *(("int8", True) if kind == "int8" else ()))
  with served(run) as service, TestClient(build_app(service), HOST) as client:
    body = dict(prompt=["ab", "c"], seed=1, n=2, max_tokens=9)
    wanted = [one.completion for one in expected(run, ["ab", "c"], 9, 2, seed=1)]
    found = post(client, "completions", **body)
    assert [choice["text"] for choice in found["choices"]] == wanted
    status = 400 if kind == "encoder_decoder" else 200
    found = post(client, "completions", status, **body, echo=True, logprobs=1)
    if status == 200:
      scored = found["choices"][0]["logprobs"]
      assert len(scored["token_logprobs"]) == len(scored["tokens"]) > 3
    assert is_free(service)


# -- Embeddings, and what there is ---------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
  run = encoder_run(tmp_path_factory.mktemp("runs") / "vectors")
  with served(run) as service, TestClient(build_app(service), HOST) as client:
    client.run = run  # type: ignore[attr-defined]
    yield client


def test_embeddings_are_those_of_the_encoder(encoder: TestClient):
  texts = ["ab", "a cat", "é"]
  run = encoder.run  # type: ignore[attr-defined]
  wanted = embed_texts(run, texts)
  found = post(encoder, "embeddings", input=texts)
  vectors = [one["embedding"] for one in found["data"]]
  np.testing.assert_allclose(vectors, wanted, rtol=1e-5, atol=1e-6)
  assert found["usage"]["prompt_tokens"] > 6
  packed = post(encoder, "embeddings", input=texts, encoding_format="base64", user="x")
  for one, vector in zip(packed["data"], vectors, strict=True):
    data = base64.b64decode(one["embedding"])
    np.testing.assert_array_equal(np.frombuffer(data, "<f4"), np.float32(vector))
  ids = run.tokenizer.framed(run.tokenizer.encode("ab"), "text")
  (of_ids,) = post(encoder, "embeddings", input=ids)["data"]
  np.testing.assert_allclose(of_ids["embedding"], wanted[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  "body",
  [
    dict(input="a" * 100),
    dict(input=""),
    dict(input=[1] * 65),
    dict(input=[10**30]),
    dict(input=[-1]),
    dict(input="a", dimensions=3),
    dict(input="a", encoding_format="hex"),
  ],
)
def test_wrong_inputs(encoder: TestClient, body: dict[str, Any]):
  error = post(encoder, "embeddings", 400, **body)["error"]
  assert error["type"] and error["param"] in body


def test_a_run_does_what_its_family_can(encoder: TestClient, client: TestClient):
  assert encoder.get("/v1/models").json()["data"][0]["endpoints"] == ["embeddings"]
  for path, body in (
    ("completions", {"prompt": "a"}),
    ("chat/completions", {"messages": HELLO}),
  ):
    assert "encoder" in post(encoder, path, 400, **body)["error"]["message"]
  assert "encoder" in post(client, "embeddings", 400, input="a")["error"]["message"]
  (model,) = client.get("/v1/models").json()["data"]
  assert (model["id"], model["max_model_len"]) == ("letters", 160)
  assert model["endpoints"] == ["completions", "chat/completions"]
  assert client.get("/v1/models/letters").json() == model
  assert client.get("/v1/models/a/b").status_code == 404


def test_metrics_are_what_prometheus_reads(client: TestClient):
  post(client, "completions", prompt="a", max_tokens=2)
  response = client.get("/metrics")
  assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
  values = {}
  for line in response.text.splitlines():
    if line.startswith("#"):
      assert re.fullmatch(r"# (HELP flaxlm_\w+ .+|TYPE flaxlm_\w+ \w+)", line)
      continue
    name, value = re.fullmatch(r"(\w+(?:\{[^}]*\})?) (\S+)", line).groups()  # type: ignore[union-attr]
    values[name] = float(value)
  assert values["flaxlm_rows"] == 4
  assert values["flaxlm_generated_tokens_total"] >= 2
  first = "flaxlm_time_to_first_token_seconds"
  assert values[f'{first}_bucket{{le="+Inf"}}'] == values[f"{first}_count"] >= 1
  path = 'flaxlm_http_requests_total{path="/v1/completions",status="200"}'
  assert values[path] >= 1


def test_the_page_loads_nothing_else(client: TestClient):
  """Its policy allows its own files; those name no other host, and nothing is inline."""
  html = client.get("/")
  policy = html.headers["content-security-policy"]
  assert "default-src 'none'" in policy and "unsafe" not in policy
  assert "frame-ancestors 'none'" in policy
  paths = re.findall(r'(?:src|href)="([^"]+)"', html.text)
  assert sorted(paths) == ["data:,", "page.css", "page.js"]
  assert not re.search(r"<script>|<style|\son\w+=|\sstyle=", html.text)
  for path in ("page.css", "page.js"):
    text = client.get(f"/{path}").text
    assert "//" not in re.sub(r"^ *//.*$|;\s+//.*$", "", text, flags=re.MULTILINE), path
    assert "innerHTML" not in text and "eval" not in text


# -- Who is refused ------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("data", "kind", "status"),
  [
    (b"{", "application/json", 400),
    (b"[1]", "application/json", 400),
    (b"\xff", "application/json", 400),
    (b'{"prompt": NaN}', "application/json", 400),
    (b'{"prompt": "a", "prompt": "b"}', "application/json", 400),
    (b"[" * 9000, "application/json", 400),
    (b'{"max_tokens": ' + b"9" * 5000 + b', "prompt": ""}', "application/json", 400),
    (b"{}", "text/plain", 415),
    (b"{}", "", 415),
    (b" " * 20_001, "application/json", 413),
    (b'{"prompt": "a"}', "application/json; charset=utf-8", 200),
  ],
)
def test_bodies(client: TestClient, data: bytes, kind: str, status: int):
  headers = {"content-type": kind}
  response = client.post("/v1/completions", content=data, headers=headers)
  assert response.status_code == status
  parts = iter([data[: len(data) // 2], data[len(data) // 2 :]])  # without its length
  response = client.post("/v1/completions", content=parts, headers=headers)
  assert response.status_code == status
  if status != 200:
    assert {*response.json()["error"]} == {"message", "type", "param", "code"}


def test_paths_and_methods(client: TestClient):
  for method, path, status in (
    ("GET", "/v1/completions", 405),
    ("POST", "/v1/nothing", 404),
    ("GET", "/v1/completions/", 404),
    ("GET", "/page.html", 404),
    ("GET", "/../page.py", 404),
    ("GET", "/%2e%2e/page.py", 404),
    ("DELETE", "/", 405),
  ):
    json_body = {} if method == "POST" else None
    response = client.request(method, path, json=json_body)
    assert response.status_code == status, path
    assert response.json()["error"]["message"]


@pytest.mark.parametrize(
  ("host", "is_ours"),
  [
    *((name, True) for name in ("localhost", "localhost:80", "127.0.0.1:9", "[::1]:8000")),
    *((name, True) for name in ("127.1.2.3", "[::1]", "")),
    *((name, False) for name in ("evil.com", "localhost.evil.com:80", "10.0.0.1")),
    *((name, False) for name in ("127.0.0.1.evil.com", "0.0.0.0:80", "x", "[::2]")),
    ("2130706433", False),
  ],
)
def test_names_of_this_machine(host: str, is_ours: bool):
  assert is_loopback_name(host) == is_ours


def test_other_names_and_other_sites_get_nothing(client: TestClient):
  response = client.get("/v1/models", headers={"host": "evil.com"})
  assert response.status_code == 403
  ours = {"origin": "http://evil.com", "x-forwarded-host": "evil.com"}
  response = client.get("/v1/models", headers=ours)
  assert not [name for name in response.headers if name.startswith("access-control")]
  response = client.options("/v1/models", headers=ours)
  assert response.status_code == 405
  assert "evil" not in str(response.headers)


def test_with_keys_only_who_has_one_is_served(service: Service):
  app = build_app(service, ["one-key", "another"])
  with TestClient(app, "http://example.com") as client:
    for given in (
      "",
      "Bearer",
      "Bearer wrong",
      "Basic one-key",
      "Bearer one-ke",
      "one-key",
    ):
      response = client.get("/v1/models", headers={"authorization": given})
      assert response.status_code == 401, given
      assert response.json()["error"]["code"] == "invalid_api_key"
    for key in ("one-key", "another"):
      headers = {"authorization": f"Bearer {key}"}
      assert client.get("/v1/models", headers=headers).status_code == 200
      assert client.get("/metrics", headers=headers).status_code == 200
    assert client.get("/metrics").status_code == 401
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/").status_code == 200


def test_what_does_not_fit_is_refused(client: TestClient):
  too_long, invalid = "context_length_exceeded", "invalid_value"
  for body, param, code in (
    (dict(prompt="a" * 150, max_tokens=20), "prompt", too_long),
    (dict(prompt=[9999]), "prompt", invalid),
    (dict(prompt=[-1, 10**30]), "prompt", invalid),
    (dict(prompt="a", logit_bias={"310": 1}), "logit_bias", invalid),
    (dict(prompt="a", model="gpt"), "model", "model_not_found"),
    (dict(prompt=[10**30], echo=True, logprobs=1, max_tokens=0), "prompt", invalid),
    (dict(prompt=[1] * 161, echo=True, max_tokens=0), "prompt", too_long),
  ):
    status = 404 if code == "model_not_found" else 400
    for more in ({}, {"stream": True}):
      error = post(client, "completions", status, **body, **more)["error"]
      assert (error["code"], error["param"]) == (code, param)
  messages = [{"role": "user", "content": "a" * 200}]
  error = post(client, "chat/completions", 400, messages=messages)["error"]
  assert (error["code"], error["param"]) == (too_long, "messages")


@pytest.mark.parametrize("depth", [50, 400, 900, 950, 980, 2000])
def test_what_is_nested_deeply_is_refused(client: TestClient, depth: int):
  """At any depth: what one reader takes, the next may not."""
  marker: Any = "HERE"
  tool = {"type": "function", "function": {"name": "f", "parameters": marker}}
  call = {"function": {"name": "f", "arguments": {"a": marker}}}
  for fields in (
    {"tools": [tool]},
    {"messages": [{"role": "assistant", "tool_calls": [call]}]},
    {"response_format": {"type": "json_schema", "json_schema": {"schema": marker}}},
    {"metadata": marker},
  ):
    body = json.dumps({"messages": HELLO, "max_tokens": 1} | fields)
    body = body.replace('"HERE"', "[" * depth + "]" * depth)
    headers = {"content-type": "application/json"}
    response = client.post("/v1/chat/completions", content=body, headers=headers)
    assert response.status_code in (200, 400), (fields, response.text)


def test_slow_automata_hold_up_nobody_else(run: Run, monkeypatch: pytest.MonkeyPatch):
  is_over, begun = threading.Event(), threading.Semaphore(0)

  def build(*_: Any) -> None:
    begun.release()
    is_over.wait(60)
    raise ConfigError("as planted")

  monkeypatch.setattr("flaxlm.serving.service.build_part", build)
  with (
    served(run) as service,
    listening(build_app(service)) as url,
    concurrent.futures.ThreadPoolExecutor(8) as pool,
  ):
    ask = lambda **body: httpx2.post(f"{url}/v1/completions", json={"prompt": "a"} | body)
    slow = [pool.submit(ask, regex="a") for _ in range(8)]
    assert begun.acquire(timeout=60)
    try:
      for _ in range(3):
        assert ask(max_tokens=1).status_code == 200
        assert not any(one.done() for one in slow)
    finally:
      is_over.set()
    assert {one.result().status_code for one in slow} == {400}


def test_what_is_prepared_when_the_server_ends_is_told(
  run: Run, monkeypatch: pytest.MonkeyPatch
):
  is_over, begun = threading.Event(), threading.Event()

  def build(*_: Any) -> None:
    begun.set()
    is_over.wait(60)

  monkeypatch.setattr("flaxlm.serving.service.build_part", build)
  monkeypatch.setattr("flaxlm.serving.server.LAST_SECONDS", 0.1)
  with served(run) as service, concurrent.futures.ThreadPoolExecutor(1) as pool:
    with listening(build_app(service)) as url:
      ask = lambda: httpx2.post(f"{url}/v1/completions", json={"prompt": "a", "regex": "a"})
      asked = pool.submit(ask)
      assert begun.wait(60)
    found = asked.result(60)
    is_over.set()
  assert found.status_code == 503 and found.json()["error"]["code"] == "draining"


def test_who_connects_and_says_nothing_is_let_go(
  service: Service, monkeypatch: pytest.MonkeyPatch
):
  from flaxlm.serving import server

  monkeypatch.setattr(server, "HEAD_SECONDS", 0.2)
  asked = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
  with listening(build_app(service)) as url:
    address = ("127.0.0.1", int(url.rpartition(":")[2]))
    for whole, part in ((b"", b""), (b"", asked), (asked + b"\r\n", asked)):
      with socket.create_connection(address, timeout=30) as sock:
        if whole:
          sock.sendall(whole)
          assert sock.recv(4096).startswith(b"HTTP/1.1 200")
        sock.sendall(part)
        while sock.recv(4096):
          pass


def test_a_full_queue_says_when_to_come_again(service: Service, client: TestClient):
  with service.admit(LIMITS.most_open - 1):
    post(client, "completions", prompt="a", max_tokens=2)
    response = client.post("/v1/completions", json={"prompt": "a", "n": 2})
  assert response.status_code == 429
  assert response.json()["error"]["code"] == "queue_full"
  assert 1 <= int(response.headers["retry-after"]) <= 60
  assert service.num_open == 0


def test_a_server_that_ends_takes_nothing_new(service: Service, client: TestClient):
  service.is_draining = True
  try:
    response = client.post("/v1/completions", json={"prompt": "a"})
    assert response.status_code == 503 and response.headers["retry-after"]
    assert client.get("/health").status_code == 503
    assert client.get("/metrics").status_code == 200
  finally:
    service.is_draining = False


def test_time_is_limited(run: Run, tmp_path: Path):
  with served(run, Limits(time_limit=1e-3)) as service:
    with TestClient(build_app(service), HOST) as client:
      error = post(client, "completions", 503, prompt="a")["error"]
      assert error["code"] == "timeout"
    assert is_free(service)


# -- What goes wrong -----------------------------------------------------------------------


def test_a_broken_model_ends_requests_and_not_the_server(tmp_path: Path):
  run = random_run(tmp_path / "broken")
  run.params["head"]["kernel"][3] = np.nan
  with served(run) as service, TestClient(build_app(service), HOST) as client:
    for _ in range(2):
      error = post(client, "completions", 500, prompt="a")["error"]
      assert (error["type"], error["code"]) == ("server_error", "non_finite")
    response = client.post("/v1/completions", json={"prompt": "a", "stream": True})
    last = response.text.strip().split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "non_finite"
    body = dict(prompt="abc", echo=True, logprobs=1, max_tokens=0)
    assert post(client, "completions", 500, **body)["error"]["code"] == "non_finite"
    assert client.get("/health").status_code == 200
    assert is_free(service)


def test_a_broken_engine_is_told_to_everybody(run: Run, monkeypatch: pytest.MonkeyPatch):
  told: list[BaseException] = []
  with served(run, on_error=told.append) as service:

    def breaks() -> list:
      raise NonFiniteError("as planted")

    monkeypatch.setattr(service.engine, "step", breaks)
    with TestClient(build_app(service), HOST) as client:
      for _ in range(2):
        error = post(client, "completions", 500, prompt="a")["error"]
        assert error["code"] == "engine_error"
      assert client.get("/health").json() == {"status": "broken"}
  assert len(told) == 1 and service.worker.error is told[0]
