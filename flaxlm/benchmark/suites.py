# SPDX-License-Identifier: Apache-2.0
"""Runs suites in turn, and holds every figure against the machine's ceilings."""

import dataclasses
import functools
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from flaxlm.benchmark.attention import bench_attention
from flaxlm.benchmark.ceilings import (
  Ceilings,
  ceilings_of,
  judge,
  measure_ceilings,
  this_device,
)
from flaxlm.benchmark.collectives import bench_collectives
from flaxlm.benchmark.compare import read_lines
from flaxlm.benchmark.compile import bench_compile
from flaxlm.benchmark.data import bench_data
from flaxlm.benchmark.decode import bench_decode
from flaxlm.benchmark.families import bench_families
from flaxlm.benchmark.loss import bench_loss
from flaxlm.benchmark.matmul import bench_matmul
from flaxlm.benchmark.measure import Setting
from flaxlm.benchmark.memory import bench_memory
from flaxlm.benchmark.optimizer import bench_optimizer
from flaxlm.benchmark.predictions import bench_predictions
from flaxlm.benchmark.report import Result
from flaxlm.benchmark.train import bench_train
from flaxlm.errors import ConfigError, FlaxLMError

Suite = Callable[[Setting], list[Result]]

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
  "predictions": bench_predictions,
  "families": bench_families,
}
APART = ("families",)  # not part of `all`: it trains for minutes
# Which peers a suite knows, and what has to be importable for each.
PEERS = {
  "torch": ("matmul", "attention", "train", "decode"),
  "llama.cpp": ("decode",),
}
MODULES = {"torch": ("torch",), "llama.cpp": ("llama_cpp", "gguf")}
NEEDS_CEILINGS = ("attention", "loss", "optimizer", "train", "decode")


def run_suites(
  names: Sequence[str], setting: Setting, log: Callable[[str], None]
) -> tuple[list[Result], Ceilings]:
  """The results of all, in order, judged, and the ceilings that they were held against.

  Raises `ConfigError` for a peer that no suite of these knows, or that is not installed.
  """
  check_peer(names, setting.peer)
  results: list[Result] = []
  for name in names:
    log(f"{name} ...")
    start = time.perf_counter()
    peer = setting.peer if name in PEERS.get(setting.peer or "", ()) else None
    mine = dataclasses.replace(setting, peer=peer)
    if name == "collectives" and len(names) > 1 and jax.device_count() == 1:
      results += collectives_apart(mine, log)
    else:
      results += SUITES[name](mine)
    log(f"  {time.perf_counter() - start:.0f} s")
  ceilings = find_ceilings(results, names, setting, log)
  judge(results, ceilings, this_device())
  return results, ceilings


def find_ceilings(
  results: Sequence[Result],
  names: Sequence[str],
  setting: Setting,
  log: Callable[[str], None],
) -> Ceilings:
  """Those that this run measured anyway, else measured for it."""
  measured = ceilings_of(results)
  if {"matmul", "memory"} <= set(names) or not set(names) & set(NEEDS_CEILINGS):
    return measured
  log("ceilings ...")
  return measure_ceilings(setting)


def check_peer(names: Sequence[str], peer: str | None) -> None:
  if peer is None:
    return
  if not set(names) & set(PEERS[peer]):
    raise ConfigError(
      f"{peer} has no part in {', '.join(names)}",
      f"it is a peer of {', '.join(PEERS[peer])}; or leave --vs out",
    )
  for module in MODULES[peer]:
    if importlib.util.find_spec(module) is None:
      package = {"torch": "'flaxlm[parity]'", "llama.cpp": "llama-cpp-python gguf"}[peer]
      raise ConfigError(f"{peer} is not installed", f"pip install {package}")


def collectives_apart(setting: Setting, log: Callable[[str], None]) -> list[Result]:
  """A CPU is one device: collectives among eight simulated ones, in another process."""
  if jax.default_backend() != "cpu":
    log("  one device: no collectives")
    return []
  with tempfile.TemporaryDirectory() as folder:
    output = Path(folder) / "collectives.jsonl"
    command = [sys.executable, "-m", "flaxlm.cli", "bench", "collectives"]
    command += [f"--size={setting.size}", f"--rounds={setting.rounds}"]
    command += ["--simulated-devices=8", f"--output={output}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
      command, capture_output=True, text=True, env=environment, check=False
    )
    if run.returncode:
      raise FlaxLMError(f"collectives failed: {run.stderr.strip()[-400:]}")
    return read_lines(output)


@functools.cache
def default_size() -> str:
  return "small" if jax.default_backend() == "cpu" else "large"
