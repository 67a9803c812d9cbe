# SPDX-License-Identifier: Apache-2.0
"""A server's process: the official client finds what it knows, signals end it in order."""

import asyncio
import contextlib
import dataclasses
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from conftest import ROOT, commands_in_process, tiny
from serving_runs import random_run
from test_load import all_at_once

from flaxlm.chat.templates import CHAT, plain_chat
from flaxlm.decoding.engine import Engine
from flaxlm.errors import OutOfMemoryError
from flaxlm.serving.limits import Limits
from flaxlm.serving.server import open_socket, serve
from flaxlm.tokenizers import load_tokenizer

pytestmark = pytest.mark.slow
TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}
HELLO: list[Any] = [{"role": "user", "content": "3 times"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, cache_root: Path) -> Path:
  """A folder with a trained run, which has learnt a template."""
  folder = tmp_path_factory.mktemp("served")
  (folder / "text").mkdir()
  for number in range(4):
    (folder / "text" / f"{number}.txt").write_text("3 times 4 is 12.\n" * 200)
  with commands_in_process(cache_root) as command, pytest.MonkeyPatch.context() as patch:
    patch.chdir(folder)
    fields = dict(training__num_steps=4, model__context=128, optimizer__kind="sgd")
    done = command("train", *tiny(f"files:{folder / 'text'}", name="numbers", **fields))
    assert done.returncode == 0, done.stderr
    run = folder / "runs" / "numbers"
    chat = plain_chat(load_tokenizer(run / "tokenizer.json"), run)
    template = "{% if tools %}{{ tools | tojson }}{% endif %}" + chat.templates["default"]
    chat = chat._replace(templates={"default": template})
    (run / CHAT).write_text(chat.to_json())
  return folder


@dataclasses.dataclass
class Process:
  """A server that was started, and where it is."""

  url: str
  child: subprocess.Popen
  clients: list[openai.OpenAI] = dataclasses.field(default_factory=list)

  def client(self, **options: Any) -> openai.OpenAI:
    options = {"api_key": "none", "max_retries": 0, "timeout": 120} | options
    self.clients.append(openai.OpenAI(base_url=self.url, **options))
    return self.clients[-1]

  def close(self) -> None:
    for client in self.clients:
      client.close()
    self.child.kill()
    self.child.communicate()

  def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
    """(exit code, stderr) after a signal."""
    self.child.send_signal(number)
    _, errors = self.child.communicate(timeout=60)
    return self.child.returncode, errors


@pytest.fixture(scope="module")
def start(folder: Path, cache_root: Path) -> Callable[..., Any]:
  @contextlib.contextmanager
  def start(*flags: str) -> Iterator[Process]:
    child = subprocess.Popen(
      [sys.executable, "-m", "flaxlm.cli", "serve", "runs/numbers", "--port=0", *flags],
      cwd=folder,
      env=os.environ
      | {
        "FLAXLM_DATA_DIR": str(cache_root),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
      },
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    assert child.stdout is not None
    process = Process(child.stdout.readline().strip(), child)
    try:
      assert process.url.startswith("http://"), child.communicate(timeout=30)
      yield process
    finally:
      process.close()

  return start


@pytest.fixture(scope="module")
def server(start: Callable[..., Any]) -> Iterator[Process]:
  with start("--slots=4", "--max-tokens=100", "--max-queue=4") as process:
    yield process


# -- The official client -------------------------------------------------------------------


def test_completions(server: Process):
  client = server.client()
  assert [model.id for model in client.models.list()] == ["numbers"]
  body: Any = dict(model="numbers", prompt="3 times", max_tokens=12, seed=1)
  whole = client.completions.create(**body, n=2, logprobs=2, stop=["\x00"])
  assert [choice.index for choice in whole.choices] == [0, 1]
  assert whole.usage is not None and whole.usage.completion_tokens <= 24
  scored = whole.choices[0].logprobs
  assert scored is not None and scored.tokens is not None
  assert len(scored.token_logprobs or []) == len(scored.tokens)
  options = {"include_usage": True}
  stream = client.completions.create(**body, stream=True, stream_options=options)
  *parts, last = stream
  text = "".join(part.choices[0].text for part in parts)
  assert text == whole.choices[0].text
  assert parts[-1].choices[0].finish_reason == whole.choices[0].finish_reason
  assert last.usage is not None and last.usage.completion_tokens <= 12


def test_chats(server: Process):
  client = server.client()
  body: Any = dict(model="numbers", messages=HELLO, max_completion_tokens=10, seed=1)
  whole = client.chat.completions.create(**body, logprobs=True, top_logprobs=2, user="x")
  message = whole.choices[0].message
  assert message.role == "assistant" and message.content is not None
  scored = whole.choices[0].logprobs
  assert scored is not None and scored.content is not None
  assert all(len(token.top_logprobs) == 2 for token in scored.content)
  stream = client.chat.completions.create(**body, stream=True)
  deltas = [part.choices[0].delta.content or "" for part in stream]
  assert "".join(deltas) == message.content
  with_tools = client.chat.completions.create(**body, tools=[TOOL], tool_choice="auto")
  assert with_tools.usage and whole.usage
  assert with_tools.usage.prompt_tokens > whole.usage.prompt_tokens + 40


def test_json_schema(server: Process):
  pytest.importorskip("outlines_core")
  properties = {"n": {"type": "integer", "minimum": 0, "maximum": 99}}
  schema = {"type": "object", "properties": properties, "required": ["n"]}
  form: Any = {
    "type": "json_schema",
    "json_schema": {"name": "a", "schema": schema, "strict": True},
  }
  found = server.client().chat.completions.create(
    model="numbers", messages=HELLO, max_tokens=60, response_format=form
  )
  value = json.loads(found.choices[0].message.content or "")
  assert 0 <= value["n"] <= 99


def test_errors_are_those_that_the_client_knows(server: Process):
  client = server.client()
  create: Any = client.completions.create
  for kind, body in (
    (openai.NotFoundError, dict(model="gpt", prompt="a")),
    (openai.BadRequestError, dict(model="numbers", prompt="a", temperature=3)),
    (openai.BadRequestError, dict(model="numbers", prompt="a" * 200)),
    (openai.BadRequestError, dict(model="numbers", prompt="a", extra_body={"x": 1})),
  ):
    with pytest.raises(kind) as found:
      create(**body)
    assert found.value.type == "invalid_request_error" and found.value.code
  with pytest.raises(openai.BadRequestError, match="not an encoder"):
    client.embeddings.create(model="numbers", input="a")


def test_too_many_at_once_are_told_to_come_again(server: Process):
  """A client that is told so, and may ask again, gets its answer in the end."""
  body: Any = dict(model="numbers", prompt="3", max_tokens=100, logit_bias={"256": -100})
  stream = server.client().completions.create(**body, n=8, stream=True)
  next(iter(stream))
  with pytest.raises(openai.RateLimitError, match="8 answers"):
    server.client().completions.create(**body)
  patient = server.client(max_retries=9)
  stream.close()  # frees its rows
  assert patient.completions.create(**body).choices[0].text


# -- Keys, addresses, flags ----------------------------------------------------------------


def test_keys(start: Callable[..., Any], folder: Path):
  (folder / "keys").write_text("a-key\nanother-key\n")
  (folder / "keys").chmod(0o644)
  with start("--api-key-file=keys", "--host=0.0.0.0") as process:
    url = process.url.replace("0.0.0.0", "127.0.0.1")
    assert httpx2.get(f"{url}/models").status_code == 401
    process.url = url
    with pytest.raises(openai.AuthenticationError):
      process.client(api_key="wrong").models.list()
    assert process.client(api_key="another-key").models.list().data
    _, errors = process.end()
  assert "keys can be read by others: chmod 600" in errors


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--host=0.0.0.0"], "can be reached from elsewhere"),
    (["--host=::"], "can be reached from elsewhere"),
    (["--host=no.such.host.invalid"], "--host no.such.host.invalid"),
    (["--api-key-file=nowhere"], "nowhere cannot be read"),
    (["--port=70000"], "--port is 70000"),
    (["--slots=0"], "--slots is 0"),
    (["--time-limit=nan"], "--time-limit is nan"),
    (["--max-body=1"], "--max-body is 1"),
    (["--prefix-bytes=-1"], "--prefix-bytes is -1"),
    (["--weights=int3"], "--weights"),
    (["--port=0", "--host=127.0.0.1", "nonexistent"], "nonexistent"),
  ],
)
def test_what_cannot_be_is_one_line(
  flags: list[str], message: str, in_process: Callable[..., subprocess.CompletedProcess]
):
  done = in_process("serve", *flags)
  assert done.returncode in (2, 4), done.stderr
  assert message in done.stderr and "Traceback" not in done.stderr
  assert len(done.stderr.splitlines()) <= 2


def test_a_port_in_use_is_one_line(
  in_process: Callable[..., subprocess.CompletedProcess],
):
  with socket.create_server(("127.0.0.1", 0)) as other:
    done = in_process("serve", f"--port={other.getsockname()[1]}")
  assert done.returncode == 2 and "Address already in use" in done.stderr
  assert "--port 0" in done.stderr


def test_an_empty_or_odd_file_of_keys_is_refused(
  in_process: Callable[..., subprocess.CompletedProcess], tmp_path: Path
):
  for text in ("", "\n \n", "two words\n", "é\n"):
    (tmp_path / "keys").write_text(text)
    done = in_process("serve", "--api-key-file=keys")
    assert done.returncode == 2 and "key" in done.stderr


def test_names_of_loopback_need_no_keys():
  for host in ("127.0.0.1", "localhost", "127.0.0.2"):
    open_socket(host, 0, has_keys=False).close()


# -- How much it takes ---------------------------------------------------------------------


@pytest.mark.timeout(3600)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
@pytest.mark.parametrize(
  ("num_first", "num_more"),
  [(100, 200), pytest.param(2000, 8000, marks=pytest.mark.fuzz)],
  ids=["300", "10000"],
)
def test_memory_stays_as_it_is_and_nothing_is_compiled(
  start: Callable[..., Any], num_first: int, num_more: int
):
  """Whatever the lengths and settings, and whoever leaves, the process is no larger after
  so many requests more than it was, but for 8 MB."""
  rng = random.Random(0)
  with start("--warm", "--slots=4", "--max-queue=60", "--prefix-bytes=1000000") as process:
    numbers = lambda name: float(
      httpx2.get(process.url.replace("/v1", "/metrics"))
      .text.split(f"\n{name} ")[1]
      .split()[0]
    )
    compiled = numbers("flaxlm_compiled_programs_total")

    def ask(count: int) -> int:
      """Bytes that are resident after so many requests."""
      for begin in range(0, count, 50):
        bodies = [mixed_body(rng) for _ in range(min(50, count - begin))]
        leave = [rng.choice([None, None, None, 0, 1]) for _ in bodies]
        asyncio.run(all_at_once(process.url.removesuffix("/v1"), bodies, leave))
      statm = Path(f"/proc/{process.child.pid}/statm").read_text()
      return int(statm.split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = ask(num_first)
    grown = ask(num_more) - before
    assert numbers("flaxlm_compiled_programs_total") == compiled > 0
    assert numbers("flaxlm_clients_left_total") > num_more / 20
    code, errors = process.end()
  assert grown < 8 * 2**20
  assert code == 0 and "Traceback" not in errors


def mixed_body(rng: random.Random) -> dict[str, Any]:
  """A request whose prompt may begin as another one did."""
  body: dict[str, Any] = {
    "prompt": "3 times 4 is 12.\n" * 5 if rng.random() < 0.3 else "",
    "max_tokens": rng.randint(1, 20),
    "temperature": rng.choice([0, 0.7, 1.5]),
    "seed": rng.randrange(1000),
    "stream": True,
  }
  body["prompt"] += "".join(rng.choices("0123456789 times", k=rng.randint(1, 20)))
  for name, value in (
    ("top_k", 3),
    ("top_p", 0.9),
    ("min_p", 0.1),
    ("presence_penalty", 0.5),
    ("repetition_penalty", 1.2),
    ("logit_bias", {"7": -5}),
    ("logprobs", 3),
    ("stop", ["12"]),
  ):
    if rng.random() < 0.2:
      body[name] = value
  return body


# -- How it ends ---------------------------------------------------------------------------


def long_stream(process: Process) -> Any:
  """A stream that has begun, and goes on."""
  body: Any = dict(model="numbers", prompt="3", max_tokens=100, logit_bias={"256": -100})
  stream = iter(process.client().completions.create(**body, n=4, stream=True))
  next(stream)
  return stream


def test_sigterm_finishes_what_runs_and_takes_nothing_new(start: Callable[..., Any]):
  with start("--slots=4") as process:
    stream = long_stream(process)
    process.child.send_signal(signal.SIGTERM)
    while httpx2.get(process.url.replace("/v1", "/health")).status_code == 200:
      time.sleep(0.01)
    with pytest.raises(openai.InternalServerError, match="ending") as found:
      process.client().completions.create(model="numbers", prompt="a")
    assert found.value.response.status_code == 503
    reasons = [part.choices[0].finish_reason for part in stream]
    assert reasons.count("length") == 4
    _, errors = process.child.communicate(timeout=60)
  assert process.child.returncode == 0 and "Traceback" not in errors


def test_grace_has_an_end(start: Callable[..., Any]):
  with start("--slots=1", "--grace=0", "--max-queue=8") as process:
    stream = long_stream(process)
    process.child.send_signal(signal.SIGTERM)
    with pytest.raises(openai.APIError, match="ending"):
      list(stream)
    _, errors = process.child.communicate(timeout=60)
  assert process.child.returncode == 0 and "Traceback" not in errors


def test_a_broken_engine_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  """Its error is that of the command, with its exit code; clients are told."""
  told: list[int] = []

  def ask(url: str) -> None:
    def post() -> None:
      body = {"prompt": "a", "max_tokens": 3}
      told.append(httpx2.post(f"{url}/v1/completions", json=body).status_code)

    client.append(threading.Thread(target=post))
    client[0].start()

  def breaks(engine: Engine) -> list:
    raise OutOfMemoryError("as planted")

  client: list[threading.Thread] = []
  monkeypatch.setattr(Engine, "step", breaks)
  run = random_run(tmp_path / "letters")
  sock = open_socket("127.0.0.1", 0, has_keys=False)
  with sock, pytest.raises(OutOfMemoryError, match="as planted"):
    serve(run, Limits(), sock, on_ready=ask)
  client[0].join(20)
  assert told == [500]


def test_ctrl_c_ends_it(start: Callable[..., Any]):
  with start() as process:
    code, errors = process.end(signal.SIGINT)
  assert code == 130 and "Traceback" not in errors


def test_a_client_of_a_killed_server_gets_a_clear_error(start: Callable[..., Any]):
  with start() as process:
    stream = long_stream(process)
    process.child.kill()
    with pytest.raises((openai.APIConnectionError, httpx2.RemoteProtocolError)) as found:
      list(stream)
    assert str(found.value)
    with pytest.raises(openai.APIConnectionError):
      process.client().models.list()
