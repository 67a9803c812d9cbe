# SPDX-License-Identifier: Apache-2.0
"""`flaxlm serve` against llama.cpp's server and `transformers serve`, over HTTP.

    python -m benchmarks.serving --llama-server build/bin/llama-server \
      --transformers-python peer/bin/python

Without one of the options that peer is left out. All servers have the same random weights
in the shape of GPT-2 with 124M parameters, in float32, and run at the same time, but round
by round only one of them is asked. Every round has new prompts, so that no cache of past
ones helps, and the same prompts for all servers. Answers are greedy, and end only at their
length: of all ids, only printable characters have an embedding that is not 0, and so only
they have logits above 0. A token is then a character on every side, and texts are compared
as tokens. The processor's time of each server is measured too, which other programs on the
machine change less than the time on the clock.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.writing import add_output, write
from flaxlm.benchmark.report import Result, figures, summarise, with_ratio
from flaxlm.errors import FlaxLMError

OURS, LLAMA_CPP, TRANSFORMERS = "flaxlm", "llama.cpp", "transformers"
HOST = "127.0.0.1"
PROMPTS, ANSWERS = (32, 256), (16, 128)  # tokens, from and to
ROOM = 512  # tokens of a row of llama.cpp's cache, which it splits among its slots
LETTERS = [*"abcdefghijklmnopqrstuvwxyz     "]
PRINTABLE = range(32, 127)  # as bytes, and as ids of the tokenizer of bytes
SPREAD = 1.5  # of random matrices: answers vary, and rounding parts few of them
MOST_BYTES = 10**10  # of a file of weights
LEAST_SAME = 0.5  # of the tokens; other weights share next to none
START_SECONDS, ANSWER_SECONDS, END_SECONDS = 600.0, 300.0, 20.0


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--llama-server", help="llama.cpp's program")
  parser.add_argument(
    "--transformers-python", help="an interpreter with transformers[serving] and torch"
  )
  parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
  parser.add_argument("--requests", type=int, help="default: twice the streams, 4 or more")
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--config", default="gpt2_124m")
  parser.add_argument("--logs", help="a folder for what the servers say")
  parser.add_argument("--flag", action="append", default=[], help="more for flaxlm serve")
  add_output(parser)
  args = parser.parse_args()
  # Who ends this program ends its servers, too.
  signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
  results = []
  with tempfile.TemporaryDirectory() as scratch:
    folder = Path(scratch)
    logs = folder if args.logs is None else Path(args.logs)
    logs.mkdir(parents=True, exist_ok=True)
    export(args.config, folder, args.llama_server, args.transformers_python)
    commands = commands_of(args, folder)
    with contextlib.ExitStack() as stack:
      servers = {
        name: stack.enter_context(started(name, command, logs))
        for name, command in commands.items()
      }
      for streams in args.streams:
        count = args.requests or max(4, 2 * streams)
        results += compare(servers, streams, count, args.rounds)
  write(results, args)


# -- The servers ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Server:
  """A process that answers at a port; `model` is what requests call its model."""

  name: str
  process: subprocess.Popen
  port: int
  model: str

  @property
  def processor(self) -> float:
    """Seconds of processors that it has used so far."""
    fields = Path(f"/proc/{self.process.pid}/stat").read_text("utf-8").rpartition(")")[2]
    user, system = fields.split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


@dataclasses.dataclass(frozen=True)
class Command:
  model: str
  arguments: Callable[[int], list[str]]  # of the port
  more: dict[str, str] = dataclasses.field(default_factory=dict)  # environment


def commands_of(args: argparse.Namespace, folder: Path) -> dict[str, Command]:
  """How each server is started, for the most streams that are asked for."""
  slots, threads = max(args.streams), str(len(os.sched_getaffinity(0)))
  flaxlm = [sys.executable, "-m", "flaxlm.cli", "serve", str(folder / "run")]
  flaxlm += ["--slots", str(slots), *args.flag]
  commands = {OURS: Command("run", lambda port: [*flaxlm, "--port", str(port)])}
  if args.llama_server:
    llama_cpp = [args.llama_server, "--model", str(folder / "model.gguf"), "--host", HOST]
    llama_cpp += ["--parallel", str(slots), "--ctx-size", str(ROOM * slots)]
    llama_cpp += ["--threads", threads, "--threads-batch", threads]
    llama_cpp += ["--cache-type-k", "f32", "--cache-type-v", "f32"]
    commands[LLAMA_CPP] = Command("run", lambda port: [*llama_cpp, "--port", str(port)])
  if args.transformers_python:
    path = str(folder / "hf")
    program = "from transformers.cli.transformers import main; main()"
    serve = [args.transformers_python, "-c", program, "serve", path, "--host", HOST]
    serve += ["--device", "cpu", "--dtype", "float32", "--continuous-batching"]
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": threads}
    commands[TRANSFORMERS] = Command(
      path, lambda port: [*serve, "--port", str(port)], offline
    )
  return commands


@contextlib.contextmanager
def started(name: str, command: Command, logs: Path) -> Iterator[Server]:
  """A server that answers; it is ended in the end, whatever happens."""
  port = free_port()
  log = logs / f"{name}.log"
  with log.open("w", encoding="utf-8") as out:
    process = subprocess.Popen(
      command.arguments(port),
      env=os.environ | command.more,
      stdin=subprocess.DEVNULL,
      stdout=out,
      stderr=subprocess.STDOUT,
    )
    try:
      wait_until_ready(name, process, port, log)
      yield Server(name, process, port, command.model)
    finally:
      end(process)


def free_port() -> int:
  with socket.socket() as sock:
    sock.bind((HOST, 0))
    return sock.getsockname()[1]


def wait_until_ready(name: str, process: subprocess.Popen, port: int, log: Path) -> None:
  deadline = time.monotonic() + START_SECONDS
  while time.monotonic() < deadline:
    if process.poll() is not None:
      break
    with contextlib.suppress(OSError):
      urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=5).close()
      return
    time.sleep(0.2)
  lines = log.read_text("utf-8", "replace").splitlines()[-20:]
  last = "\n".join(line[:200] for line in lines)
  raise FlaxLMError(f"{name} does not answer; it has said:\n{last}")


def end(process: subprocess.Popen) -> None:
  process.terminate()
  try:
    process.wait(END_SECONDS)
  except subprocess.TimeoutExpired:
    process.kill()
    process.wait()


# -- The clients ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Question:
  prompt: str
  num_new: int


@dataclasses.dataclass(frozen=True)
class Answer:
  text: str
  first: float  # seconds from the request to its first text


@dataclasses.dataclass(frozen=True)
class Round:
  """All answers of one server to the questions of a round."""

  seconds: float
  processor: float
  answers: list[Answer]


def make_questions(count: int, seed: Sequence[int]) -> list[Question]:
  """Random texts; the tokenizer adds one token in front of each."""
  rng = np.random.default_rng(seed)
  lengths = rng.integers(PROMPTS[0], PROMPTS[1] + 1, count) - 1
  news = rng.integers(ANSWERS[0], ANSWERS[1] + 1, count)
  texts = ["".join(rng.choice(LETTERS, length)) for length in lengths]
  return [Question(text, int(new)) for text, new in zip(texts, news, strict=True)]


def run_round(server: Server, questions: Sequence[Question], streams: int) -> Round:
  """Asks all questions; each stream takes the next when its answer has ended."""
  started, used = time.perf_counter(), server.processor
  answers = asyncio.run(ask_all(server, questions, streams))
  return Round(time.perf_counter() - started, server.processor - used, answers)


async def ask_all(
  server: Server, questions: Sequence[Question], streams: int
) -> list[Answer]:
  answers: dict[int, Answer] = {}
  numbered = iter([*enumerate(questions)])

  async def stream() -> None:
    for number, question in numbered:
      try:
        answers[number] = await asyncio.wait_for(ask(server, question), ANSWER_SECONDS)
      except TimeoutError as e:
        cause = f"{server.name}: an answer takes more than {ANSWER_SECONDS:.0f} s"
        raise FlaxLMError(f"{cause}; is the machine busy?") from e

  await asyncio.gather(*[stream() for _ in range(streams)])
  return [answers[number] for number in range(len(questions))]


async def ask(server: Server, question: Question) -> Answer:
  """One request on a connection of its own, as little work as possible beside servers."""
  body = json.dumps(
    dict(model=server.model, prompt=question.prompt, max_tokens=question.num_new)
    | dict(temperature=0.0, stream=True)
  ).encode()
  head = (
    f"POST /v1/completions HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n"
    f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
  )
  started = time.perf_counter()
  reader, writer = await asyncio.open_connection(HOST, server.port, limit=2**20)
  try:
    writer.write(head.encode() + body)
    status = (await reader.readline()).decode()
    text, first = "", 0.0
    while line := await reader.readline():
      new = text_of(line)
      if new and not text:
        first = time.perf_counter() - started
      text += new
  finally:
    writer.close()
  if status.split()[1:2] != ["200"] or len(text) != question.num_new:
    raise FlaxLMError(
      f"{server.name}: {len(text)} tokens of {question.num_new}, {status.strip()}"
    )
  return Answer(text, first)


def text_of(line: bytes) -> str:
  """The text of a line of a stream; HTTP's own lines and the end have none."""
  if not line.startswith(b"data: {"):
    return ""
  found = json.loads(line[len(b"data: ") :])
  if "error" in found:
    raise FlaxLMError(f"a server has answered {found['error']}")
  return "".join(choice["text"] or "" for choice in found["choices"])


# -- What is compared ----------------------------------------------------------------------


def compare(
  servers: dict[str, Server], streams: int, count: int, num_rounds: int
) -> list[Result]:
  """The figures of a number of streams; the first round compiles, and is not counted."""
  rounds: dict[str, list[Round]] = {name: [] for name in servers}
  asked = [make_questions(count, (streams, n)) for n in range(num_rounds + 1)]
  for number, questions in enumerate(asked):
    for name, server in servers.items():
      found = run_round(server, questions, streams)
      rounds[name].append(found)
      slowest = max(answer.first for answer in found.answers)
      print(
        f"{streams} streams, round {number}, {name}: {found.seconds:.1f} s, "
        f"{found.processor:.1f} s of processors, first tokens within {slowest:.2f} s",
        file=sys.stderr,
      )
  tokens = [sum(one.num_new for one in questions) for questions in asked]
  case = "one stream" if streams == 1 else f"{streams} streams"
  return results_of(case, {name: all[1:] for name, all in rounds.items()}, tokens[1:])


def results_of(
  case: str, rounds: dict[str, list[Round]], tokens: Sequence[int]
) -> list[Result]:
  """Speeds of each server, ours with its ratio to each peer, and times to first tokens."""
  results = []
  for clock, suffix in (("seconds", ""), ("processor", ", processor time")):
    # Rounds differ in their tokens: seconds are those of one token.
    per_token = {
      name: [getattr(one, clock) / n for one, n in zip(found, tokens, strict=True)]
      for name, found in rounds.items()
    }
    for name, seconds in per_token.items():
      speeds = figures(seconds, "tokens/s")
      results.append(summarise("serving", f"{case}, {name}{suffix}", speeds, "tokens/s"))
    speeds = figures(per_token[OURS], "tokens/s")
    for peer in [name for name in rounds if name != OURS]:
      gate = same_answers(rounds[OURS], rounds[peer])
      result = summarise("serving", f"{case} vs {peer}{suffix}", speeds, "tokens/s")
      results.append(with_ratio(result, peer, per_token[OURS], per_token[peer], gate))
  for name, found in rounds.items():
    firsts = [[answer.first for answer in one.answers] for one in found]
    for part, share in (("median", 50), ("95 %", 95), ("max", 100)):
      times = figures([float(np.percentile(one, share)) for one in firsts], "ms")
      label = f"{case}, {name}, first token, {part}"
      results.append(summarise("serving", label, times, "ms"))
  return results


def same_answers(ours: Sequence[Round], theirs: Sequence[Round]) -> str:
  """How many answers are the same, and how much of the others. Ends the program if too few
  tokens come before the first that differs. Rounding parts a few long answers: llama.cpp
  looks GELU up in a table of float16."""
  pairs = [
    (a.text, b.text)
    for our, their in zip(ours, theirs, strict=True)
    for a, b in zip(our.answers, their.answers, strict=True)
  ]
  same = sum(a == b for a, b in pairs)
  share = sum(common(a, b) for a, b in pairs) / sum(len(a) for a, _ in pairs)
  told = f"{same} of {len(pairs)} answers are the same, {share:.1%} of their tokens"
  if share < LEAST_SAME:
    raise FlaxLMError(f"the servers have written different answers: {told}")
  return told


def common(one: str, other: str) -> int:
  """How many tokens two answers share before the first that differs."""
  alike = (a == b for a, b in zip(one, other, strict=True))
  return sum(itertools.takewhile(bool, alike))


# -- The weights ---------------------------------------------------------------------------


def export(config: str, folder: Path, needs_gguf: Any, needs_hf: Any) -> None:
  """Writes a random run, as the peers that are asked read it, too."""
  import flax.linen as nn
  import jax
  import jax.numpy as jnp

  from flaxlm.checkpoint.store import CheckpointStore
  from flaxlm.config import DataConfig, ResolvedConfig, load_config, to_json
  from flaxlm.decoding.loading import Run
  from flaxlm.interop.gguf import export_gguf
  from flaxlm.interop.transfer import export_run
  from flaxlm.nn.models import build_model, init_params
  from flaxlm.runs import CHECKPOINTS, CONFIG, TOKENIZER
  from flaxlm.sharding import make_mesh, use_mesh
  from flaxlm.tokenizers import train_tokenizer

  model_cfg = load_config(config).model
  # A multiple of 128 divides over `tensor`, too.
  vocab_size = -(-model_cfg.resolve().vocab_size // 128) * 128
  shape = dataclasses.replace(model_cfg, vocab_size=vocab_size).resolve()
  cfg = ResolvedConfig(name="run", model=shape, data=DataConfig(seq_len=shape.context))
  model, mesh = build_model(shape), make_mesh({"tensor": -1})
  with use_mesh(mesh):
    params = jax.jit(lambda: nn.unbox(init_params(model, jnp.uint32(0))))()
  params = {**params, **speaking(params)}
  tokenizer = train_tokenizer("byte", [], 0)
  run = Run(folder / "run", cfg, tokenizer, 1, model, params, mesh)
  run.path.mkdir()
  (run.path / CONFIG).write_text(to_json(cfg), "utf-8")
  tokenizer.save(run.path / TOKENIZER)
  store = CheckpointStore(run.path / CHECKPOINTS)
  with contextlib.closing(store):
    store.save(run.step, params, None, {"step": run.step})
  if needs_gguf:
    export_gguf(run, folder / "model.gguf", None)
  if needs_hf:
    export_run(run, folder / "hf", None, MOST_BYTES)


def speaking(params: dict[str, Any]) -> dict[str, Any]:
  """The parts of the parameters that are changed: blocks, and what has a token."""
  import jax

  scaled = lambda x: x * SPREAD if x.ndim > 2 else x  # a matrix for each layer
  blocks = {
    name: jax.tree.map(scaled, part) if name in ("attention", "ffn") else part
    for name, part in params["blocks"].items()
  }
  (table,) = jax.tree.leaves(params["embedding"])
  embedding_VD = np.zeros_like(table)
  embedding_VD[[*PRINTABLE]] = table[np.array(PRINTABLE)]
  embedding = jax.tree.map(lambda _: embedding_VD, params["embedding"])
  return dict(blocks=blocks, embedding=embedding)


if __name__ == "__main__":
  main()
