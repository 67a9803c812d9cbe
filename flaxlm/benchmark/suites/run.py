# SPDX-License-Identifier: Apache-2.0
"""Runs suites one after the other, and compares every figure with the machine's limits."""

import dataclasses
import importlib.util
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from flaxlm.benchmark.ceilings import Ceilings, ceilings_of, judge, this_device
from flaxlm.benchmark.compare import read_lines
from flaxlm.benchmark.measure import BenchOptions, Size, run_python
from flaxlm.benchmark.report import Result
from flaxlm.benchmark.suites.attention import bench_attention
from flaxlm.benchmark.suites.collectives import bench_collectives
from flaxlm.benchmark.suites.compile import bench_compile
from flaxlm.benchmark.suites.data import bench_data
from flaxlm.benchmark.suites.decode import bench_decode
from flaxlm.benchmark.suites.loss import bench_loss
from flaxlm.benchmark.suites.matmul import bench_matmul
from flaxlm.benchmark.suites.memory import bench_memory
from flaxlm.benchmark.suites.optimizer import bench_optimizer
from flaxlm.benchmark.suites.train import bench_train
from flaxlm.errors import ConfigError

Suite = Callable[[BenchOptions], list[Result]]

SUITES: dict[str, Suite] = {
  "matmul": bench_matmul,
  "memory": bench_memory,
  "collectives": bench_collectives,
  "attention": bench_attention,
  "loss": bench_loss,
  "optimizer": bench_optimizer,
  "train": bench_train,
  "decode": bench_decode,
  "data": bench_data,
  "compile": bench_compile,
}
# The suites that each peer takes part in, and the modules that it needs.
PEERS = {
  "torch": ("matmul", "attention", "train", "decode"),
  "llama.cpp": ("decode",),
}
MODULES = {"torch": ("torch",), "llama.cpp": ("llama_cpp", "gguf")}
NEEDS_CEILINGS = ("attention", "loss", "optimizer", "train", "decode")


def run_suites(
  names: Sequence[str], options: BenchOptions, log: Callable[[str], None]
) -> tuple[list[Result], Ceilings]:
  """The results of all suites in order, with their fractions, and the ceilings.

  Raises `ConfigError` if no suite knows the peer, or if it is not installed.
  """
  check_peer(names, options.peer)
  results: list[Result] = []
  for name in names:
    log(f"{name} ...")
    start = time.perf_counter()
    peer = options.peer if name in PEERS.get(options.peer or "", ()) else None
    own = dataclasses.replace(options, peer=peer)
    if name == "collectives" and len(names) > 1 and jax.device_count() == 1:
      results += collectives_in_a_process(own, log)
    else:
      results += SUITES[name](own)
    log(f"  {time.perf_counter() - start:.0f} s")
  ceilings = find_ceilings(results, names, options, log)
  judge(results, ceilings, this_device())
  return results, ceilings


def find_ceilings(
  results: Sequence[Result],
  names: Sequence[str],
  options: BenchOptions,
  log: Callable[[str], None],
) -> Ceilings:
  """The ceilings from this run's own results, or measured for it if a suite needs them."""
  measured = ceilings_of(results)
  if {"matmul", "memory"} <= set(names) or not set(names) & set(NEEDS_CEILINGS):
    return measured
  log("ceilings ...")
  short = dataclasses.replace(options, rounds=min(3, options.rounds), peer=None)
  return ceilings_of([*bench_matmul(short, square_only=True), *bench_memory(short)])


def check_peer(names: Sequence[str], peer: str | None) -> None:
  if peer is None:
    return
  if not set(names) & set(PEERS[peer]):
    raise ConfigError(
      f"{peer} has no part in {', '.join(names)}",
      f"it takes part in {', '.join(PEERS[peer])}; or leave --vs out",
    )
  for module in MODULES[peer]:
    if importlib.util.find_spec(module) is None:
      package = {"torch": "'flaxlm[parity]'", "llama.cpp": "llama-cpp-python gguf"}[peer]
      raise ConfigError(f"{peer} is not installed", f"pip install {package}")


def collectives_in_a_process(
  options: BenchOptions, log: Callable[[str], None]
) -> list[Result]:
  """A CPU is one device, so another process measures among eight simulated ones."""
  if jax.default_backend() != "cpu":
    log("  one device: no collectives")
    return []
  with tempfile.TemporaryDirectory() as folder:
    output = Path(folder) / "collectives.jsonl"
    arguments = ["-m", "flaxlm.cli", "bench", "collectives", "--simulated-devices=8"]
    arguments += [f"--size={options.size}", f"--rounds={options.rounds}", "--processes=1"]
    run_python(*arguments, f"--output={output}", environment={"JAX_PLATFORMS": "cpu"})
    return read_lines(output)


def default_size() -> Size:
  return "small" if jax.default_backend() == "cpu" else "large"
