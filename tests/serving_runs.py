# SPDX-License-Identifier: Apache-2.0
"""Random models that tests serve: their texts are letters, and they end sometimes."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from meshes import mesh_of

from flaxlm.chat.templates import CHAT, Chat, plain_chat
from flaxlm.config import Config, ModelConfig
from flaxlm.decoding.loading import Run
from flaxlm.nn.models import abstract_params, build_model
from flaxlm.serving.limits import Limits
from flaxlm.serving.service import Service
from flaxlm.tokenizers import train_tokenizer

BYTES = train_tokenizer("byte", [], 0)
MASKED = train_tokenizer("byte", [], 0, masked=True)
LETTERS = "ab \né漢"  # of one, two and three bytes each
JSON_LETTERS = '{}[]":,.-0123456789truefalsnabc '
LIMITS = Limits(slots=4, max_queue=8, max_tokens=64, max_body=20_000, time_limit=60)
# A template with a place for tools.
WITH_TOOLS = (
  "{% if tools %}tools: {{ tools | tojson }}\n{% endif %}{% for m in messages %}"
  "{{ m.role }}: {{ m.content }}{% for c in m.tool_calls or [] %}"
  "{{ c.function.arguments | tojson }}{% endfor %}{{ '\n' }}{% endfor %}assistant:"
)


def random_run(
  path: Path,
  eos_logit: float = -3.0,
  letters: str = LETTERS,
  template: str | None = None,
  **fields: Any,
) -> Run:
  """A decoder. The last norm writes 1 into dim 0, so the head's row 0 is a bias."""
  model_cfg = ModelConfig(
    **dict(depth=1, width=16, num_heads=2, vocab_size=320, context=160)
    | dict(norm="layernorm", tied_embeddings=False)
    | fields,
  )
  run = run_of(path, model_cfg, BYTES)
  run.params["final_norm"]["scale"][0] = 0.0
  run.params["final_norm"]["bias"][0] = 1.0
  bias = run.params["head"]["kernel"][0]
  bias[:] = -30.0
  bias[[*letters.encode()]] = 0.0
  bias[BYTES.eos_id] = eos_logit
  path.mkdir(exist_ok=True)
  chat = plain_chat(BYTES, path)
  if template is not None:
    chat = Chat(path, {"default": template}, {})
  (path / CHAT).write_text(chat.to_json())
  return run


def encoder_run(path: Path) -> Run:
  model_cfg = ModelConfig(
    family="encoder", depth=1, width=16, num_heads=2, vocab_size=320, context=64
  )
  path.mkdir(exist_ok=True)
  return run_of(path, model_cfg, MASKED)


def run_of(path: Path, model_cfg: ModelConfig, tokenizer: Any) -> Run:
  cfg, mesh = Config(name="random", model=model_cfg), mesh_of()
  model = build_model(cfg.model)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: (0.3 * rng.normal(size=x.shape)).astype(np.float32),
    abstract_params(model, mesh),
  )
  return Run(path, cfg, tokenizer, 0, model, params, mesh)


@contextlib.contextmanager
def served(
  run: Run, limits: Limits = LIMITS, warm: bool = False, **options: Any
) -> Iterator[Service]:
  """A service that has started; a `warm` one compiles before that."""
  service = Service(run, limits, **options)
  with contextlib.closing(service):
    if warm:
      service.warm()
    service.start()
    yield service


def is_free(service: Service, seconds: float = 20.0) -> bool:
  """Whether no row works for anybody, after a while."""
  end = time.monotonic() + seconds
  while time.monotonic() < end:
    load = service.worker.load
    if service.num_open == load.num_active == load.num_waiting == 0:
      return True
    time.sleep(0.01)
  return False


def events_of(text: str) -> list[dict]:
  """The objects of a whole stream, which must end as it should."""
  lines = [line for line in text.split("\n\n") if line]
  assert lines[-1] == "data: [DONE]"
  return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@contextlib.contextmanager
def listening(app: Any) -> Iterator[str]:
  """The URL of an application that a real server answers for, in a thread of its own."""
  import asyncio
  import socket

  from flaxlm.serving.server import build_server

  server = build_server(app)
  sock = socket.create_server(("127.0.0.1", 0))
  thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[sock])))
  thread.start()
  try:
    yield f"http://127.0.0.1:{sock.getsockname()[1]}"
  finally:
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()
