# SPDX-License-Identifier: Apache-2.0
"""Decoding speed, float32, on GPT-2's 124M shape with random weights, against peers.

Every side is a process of its own that loads once and then waits for its turn; rounds go
from side to side, since machines drift. A speed counts only if the greedy tokens of both
sides are identical. The memory's read bandwidth is measured in the same rounds: at batch 1
each token reads every weight once, so that bandwidth is the limit.

    python -m flaxlm.benchmark.generation --vs transformers --json
"""

import argparse
import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from flaxlm.benchmark.report import Result, print_json, print_results, summarise
from flaxlm.configfile import load_config
from flaxlm.errors import ConfigError, FlaxLMError

MODULE = "flaxlm.benchmark.generation"  # also when it runs as __main__
ROUNDS = 5
PROMPT, NEW_TOKENS = 32, 128
BATCHES = (1, 8)
PEERS = ("transformers",)
MODEL = load_config("gpt2_124m").model.resolve()


def bench_generation(batch: int, peer: str | None, rounds: int = ROUNDS) -> list[Result]:
  """Tokens per second, their share of the bandwidth, the ratio to `peer`; the bandwidth.

  Raises `ConfigError` if the peer is not installed, `FlaxLMError` if tokens disagree.
  """
  sides = {side: Side(side, batch) for side in ("flaxlm", peer) if side is not None}
  try:
    for side in sides.values():
      side.round()  # compiles
    found: dict[str, list] = {side: [] for side in (*sides, "bandwidth")}
    for number in range(rounds):
      found["bandwidth"].append(read_bandwidth())
      for name in [*sides][:: 1 if number % 2 else -1]:
        found[name].append(sides[name].round())
  finally:
    for side in sides.values():
      side.close()
  rates = {
    side: [batch * NEW_TOKENS / of["seconds"] for of in found[side]] for side in sides
  }
  case = f"124M batch {batch}, {PROMPT} + {NEW_TOKENS} tokens"
  peer_rates = rates[peer] if peer else ()
  result = summarise("generation", case, rates["flaxlm"], "tokens/s", peer_rates)
  shares = [
    rate / batch * bytes_per_step(batch) / bandwidth
    for rate, bandwidth in zip(rates["flaxlm"], found["bandwidth"], strict=True)
  ]
  result.measured_limit_fraction = float(np.median(shares))
  if peer:
    result.peer = peer
    result.correct = compare(found["flaxlm"][-1]["tokens"], found[peer][-1]["tokens"])
  limit = [bandwidth / 1e9 for bandwidth in found["bandwidth"]]
  return [result, summarise("generation", f"read bandwidth, {case}", limit, "GB/s")]


def compare(ours: list[list[int]], theirs: list[list[int]]) -> str:
  text = f"greedy tokens of {len(ours)} rows"
  if ours != theirs:
    where = [a != b for a, b in zip(ours, theirs, strict=True)].index(True)
    raise FlaxLMError(f"a speed without a result: {text} differ in row {where}")
  return f"{text} identical"


def bytes_per_step(batch: int) -> float:
  """What a step must read: each weight once, and the cache of half of the new tokens."""
  L, D, F, V = MODEL.depth, MODEL.width, MODEL.ffn_width, MODEL.vocab_size
  assert F is not None and V is not None
  weights = L * (4 * D * D + 2 * D * F) + V * D
  return 4 * (weights + batch * 2 * L * D * (PROMPT + NEW_TOKENS / 2))


def read_bandwidth() -> float:
  """Bytes per second that two threads read, summing 256 MiB each; the best of three."""
  arrays = [np.ones(2**26, np.float32) for _ in range(2)]
  best = float("inf")
  for _ in range(3):
    threads = [threading.Thread(target=array.sum) for array in arrays]
    started = time.perf_counter()
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    best = min(best, time.perf_counter() - started)
  return sum(array.nbytes for array in arrays) / best


class Side:
  """A process that generates when told to."""

  def __init__(self, name: str, batch: int):
    command = [sys.executable, "-m", MODULE, "--side", name, "--batch", str(batch)]
    pipe = subprocess.PIPE
    self.name = name
    self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

  def round(self) -> dict[str, Any]:
    """Seconds of one request, and its tokens."""
    assert self.process.stdin is not None and self.process.stdout is not None
    with contextlib.suppress(BrokenPipeError):  # reading says why
      print("go", file=self.process.stdin, flush=True)
    line = self.process.stdout.readline()
    if not line:
      raise ConfigError(f"the {self.name} side failed", f"pip install {self.name}?")
    return json.loads(line)

  def close(self) -> None:
    self.process.communicate()


def serve(generate: Callable[[], list[list[int]]]) -> None:
  """One request for each line of standard input."""
  for _ in sys.stdin:
    started = time.perf_counter()
    tokens = generate()
    print(json.dumps({"seconds": time.perf_counter() - started, "tokens": tokens}))
    sys.stdout.flush()


def prompts(batch: int) -> list[list[int]]:
  rng = np.random.default_rng(1)
  assert MODEL.vocab_size is not None
  return rng.integers(0, MODEL.vocab_size, (batch, PROMPT)).tolist()


def weights() -> dict[str, np.ndarray]:
  """The same parameters for every side, by our names, drawn in the order of the names."""
  cfg, rng = MODEL, np.random.default_rng(0)
  L, D, N, H, F = cfg.depth, cfg.width, cfg.num_heads, cfg.head_dim, cfg.ffn_width
  assert H is not None and F is not None and cfg.vocab_size is not None
  shapes: dict[str, tuple[int, ...]] = {
    "embedding/table": (cfg.vocab_size, D),
    "positions/table": (cfg.context, D),
    "final_norm/scale": (D,),
    "final_norm/bias": (D,),
    "blocks/attention/o/kernel": (L, N, H, D),
    "blocks/attention/o/bias": (L, D),
    "blocks/ffn/up/kernel": (L, D, F),
    "blocks/ffn/up/bias": (L, F),
    "blocks/ffn/down/kernel": (L, F, D),
    "blocks/ffn/down/bias": (L, D),
  }
  for name in "qkv":
    shapes[f"blocks/attention/{name}/kernel"] = (L, D, N, H)
    shapes[f"blocks/attention/{name}/bias"] = (L, N, H)
  for name in ("attention_norm", "ffn_norm"):
    shapes |= {f"blocks/{name}/scale": (L, D), f"blocks/{name}/bias": (L, D)}
  arrays = {}
  for name, shape in shapes.items():
    noise = rng.standard_normal(shape, np.float32) * np.float32(0.02)
    arrays[name] = noise + np.float32(name.endswith("scale"))
  return arrays


def flaxlm_side(batch: int) -> Callable[[], list[list[int]]]:
  import flax
  import jax

  from flaxlm.decoding.generate import generate
  from flaxlm.decoding.prefill import Request
  from flaxlm.decoding.sampling import make_sampling
  from flaxlm.decoding.weights import prepare_params
  from flaxlm.nn.models import build_model
  from flaxlm.sharding import start_jax

  start_jax()
  params = flax.traverse_util.unflatten_dict(weights(), sep="/")
  params = prepare_params(jax.tree.map(jax.numpy.asarray, params), MODEL)
  assert MODEL.vocab_size is not None
  request = Request(prompts(batch), NEW_TOKENS, MODEL.vocab_size)
  model, greedy = build_model(MODEL), make_sampling(batch, 0.0)

  def run() -> list[list[int]]:
    blocks = [block.tokens_BT for block in generate(model, params, request, greedy)]
    return np.concatenate(blocks, 1).tolist()

  return run


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--side", choices=("flaxlm", *PEERS), help=argparse.SUPPRESS)
  parser.add_argument("--batch", type=int, help="one alone")
  parser.add_argument("--vs", choices=PEERS)
  parser.add_argument("--rounds", type=int, default=ROUNDS)
  parser.add_argument("--json", action="store_true")
  args = parser.parse_args()
  if args.side is None:
    write = print_json if args.json else print_results
    for batch in BATCHES if args.batch is None else (args.batch,):
      write(bench_generation(batch, args.vs, args.rounds), sys.stdout)
  elif args.side == "flaxlm":
    serve(flaxlm_side(args.batch))
  else:
    from flaxlm.benchmark.generation_peers import PEER_SIDES

    serve(PEER_SIDES[args.side](args.batch))


if __name__ == "__main__":
  main()
