# SPDX-License-Identifier: Apache-2.0
"""The memory that the planner finds, against the compiler's, of the points of a grid.

    python -m benchmarks.agreement              # planned now / compiled then
    python -m benchmarks.agreement --compile    # compiles what the raw file lacks

The compiler's figures stand in `RAW`, since each takes half a minute or more: compiling
needs `pip install 'flaxlm[tpu]'`, and no TPU. What the planner says is computed anew.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flaxlm.config import ResolvedConfig, load_config, mesh_shape, override, parse_mesh
from flaxlm.devices import Device, find_device
from flaxlm.planning.compile import CompiledStep, compile_step
from flaxlm.planning.decoding import Decoding, Stored
from flaxlm.planning.memory import decoding_memory, training_memory
from flaxlm.planning.planner import resolve
from flaxlm.planning.roofline import with_path
from flaxlm.strict_json import to_json

RAW = Path(__file__).parents[1] / "docs/benchmarks/2026-11-29-agreement-libtpu.jsonl"
NEAR = 0.1  # of the compiler's memory: the difference that counts as agreement

# Cards, and sizes between them.
MODELS = {
  "llama_1b": "llama3_8b --model.depth=16 --model.width=2048 --model.num-heads=16 "
  "--model.ffn-width=8192 --model.vocab-size=65536",
  "llama_7b": "llama_7b --model.context=4096",
  "llama_8x1024": "llama3_8b --model.depth=8 --model.width=1024 --model.num-heads=8 "
  "--model.ffn-width=4096 --model.vocab-size=32000",
}
# A point in a line: model, device, mesh, rows x tokens of a row, remat, other flags.
GRID = """
gpt2_124m v5e data=8 32x1024 none
gpt2_124m v5e data=8 32x1024 dots
gpt2_124m v5e data=8 32x1024 full
gpt2_124m v5e data=1 4x1024 dots
gpt2_124m v5e data=8 64x1024 dots accumulation-steps=4
gpt2_124m v5e fsdp=4 16x1024 none
gpt2_124m v5e fsdp=4 16x1024 dots
gpt2_124m v6e fsdp=8 32x1024 none
gpt2_124m v6e fsdp=8 32x1024 full
llama_1b v5p fsdp=4,tensor=2 16x2048 dots
llama_1b v5p fsdp=4,tensor=2 16x2048 full
llama_1b v5e fsdp=2,tensor=4 8x2048 dots
llama_1b v5e fsdp=2,tensor=4 8x2048 full
llama_1b v5e fsdp=2,tensor=4 8x2048 dots sequence-parallel=true
llama_1b v5e fsdp=2,tensor=4 8x2048 full sequence-parallel=true
llama_1b v5e fsdp=8 8x1024 full optimizer.kind=muon
llama_1b v5e fsdp=8 8x1024 full optimizer.kind=adafactor
llama_1b v5e fsdp=8 16x2048 full data.objective=preference
llama_1b v5p stage=4,fsdp=2 16x2048 full
llama_1b v5e fsdp=8 16x2048 offload
llama_1b v5e fsdp=8 16x2048 attention
llama_1b v5e fsdp=8 16x2048 none
llama_1b v5e fsdp=8 16x2048 dots
llama_1b v5e fsdp=8 16x2048 full
llama3_8b v5p fsdp=16 16x8192 full loss-chunks=8
llama3_8b v5p fsdp=16 16x16384 full
llama3_8b v5p fsdp=16 16x32768 full
llama3_8b v5e fsdp=8 8x2048 full lora.rank=16
llama3_8b v5e fsdp=4 4x2048 full lora.rank=16 lora.base-weights=int8
llama3_8b v5p fsdp=8,context=2 8x32768 full
llama3_8b v5p fsdp=16 16x8192 full
mistral_7b v5p fsdp=16 16x8192 full
mixtral_8x7b v5p fsdp=64 64x2048 full
mixtral_8x7b v5p fsdp=2,expert=4 8x2048 full model.depth=4
mixtral_8x7b v5p fsdp=2,expert=4 8x1024 none model.depth=4
bert_large v5e fsdp=8 64x512 none
gpt2_124m v5e data=1 64x1024 decode
gpt2_124m v5e fsdp=4 64x1024 decode model.depth=4 cache=int8
llama3_8b v5e tensor=8 8x8192 decode model.depth=4
llama3_8b v5e tensor=8 64x2048 decode model.depth=4 weights=int8 cache=int8
llama3_8b v5p fsdp=8 64x2048 decode model.depth=4
llama3_70b v5e tensor=16 8x2048 decode model.depth=4
mistral_7b v6e tensor=4 32x32768 decode model.depth=4
gemma2_9b v5p tensor=4 16x8192 decode model.depth=4
mixtral_8x7b v5p tensor=8 8x2048 decode model.depth=4
gpt2_1558m v6e tensor=5 32x1024 decode model.depth=4
llama_8x1024 v5e fsdp=2,tensor=4 16x2048 dots
llama_7b v5p fsdp=8 8x2048 full optimizer.kind=muon
"""


@dataclasses.dataclass(frozen=True)
class Point:
  """A step on a mesh of devices, as a line of the grid has it."""

  name: str

  @property
  def device(self) -> Device:
    return find_device(self.name.split()[1])

  @property
  def sizes(self) -> dict[str, int]:
    return mesh_shape(parse_mesh(self.name.split()[2]))

  @property
  def options(self) -> list[str]:
    return self.name.split()[5:]

  @property
  def shape(self) -> tuple[int, int]:
    """Rows, and the tokens of each."""
    rows, _, tokens = self.name.split()[3].partition("x")
    return int(rows), int(tokens)

  @property
  def decoding(self) -> Decoding | None:
    if self.name.split()[4] != "decode":
      return None
    dtypes = dict(one.split("=") for one in self.options if "." not in one)
    return Decoding(*self.shape, Stored(**dtypes))

  @property
  def cfg(self) -> ResolvedConfig:
    """With the attention path that such devices take."""
    model, _, mesh, _, remat, *others = self.name.split()
    card, *flags = MODELS.get(model, model).split()
    flags += [f"--{one}" for one in others if "." in one]
    if self.decoding is None:
      rows, tokens = self.shape
      flags += [f"--data.batch-size={rows}", f"--data.seq-len={tokens}"]
      flags += [f"--training.remat={remat}", "--training.scanned=true"]
      flags += [f"--training.{one}" for one in others if "." not in one]
    cfg = resolve(override(load_config(card), flags))
    cfg = dataclasses.replace(cfg, mesh=dict(parse_mesh(mesh)))
    cfg = dataclasses.replace(cfg, model=cfg.model.padded(self.sizes["tensor"]))
    return with_path(cfg, self.sizes, self.device)[0]

  def planned(self) -> tuple[int, str]:
    """Bytes of a device, and the moment that needs most."""
    if (asked := self.decoding) is not None:
      stored = dataclasses.asdict(asked.stored) | {"lanes": self.device.lanes}
      parts = decoding_memory(self.cfg, self.sizes, asked.rows, asked.context, **stored)
      return sum(parts.values()), "decoding"
    memory = training_memory(self.cfg, self.sizes, self.device.lanes)
    return memory.total, memory.peak

  def compiled(self) -> CompiledStep:
    return compile_step(self.cfg, self.sizes, self.device, self.decoding)


# -- The compiler's figures, and the table -------------------------------------------------


def grid() -> list[Point]:
  return [Point(line) for line in GRID.strip().splitlines()]


def read_raw() -> dict[str, dict[str, Any]]:
  """What was compiled, by the names of points."""
  lines = RAW.read_text().splitlines() if RAW.exists() else []
  return {one["point"]: one for one in map(json.loads, lines)}


def compile_missing() -> None:
  """Compiles the points that the raw file lacks, and adds them to it one by one."""
  versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
  done = read_raw()
  for point in grid():
    if point.name in done:
      continue
    step = dataclasses.asdict(point.compiled()) | {"collectives": None}
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    with RAW.open("a") as file:
      print(to_json({"point": point.name, "date": day, **versions, **step}), file=file)
    print(point.name, file=sys.stderr)


def table() -> Iterator[str]:
  """A line for each point: planned and compiled GB, planned / compiled, and the moment."""
  yield f"{'GB:':4} planned compiled  planned / compiled, at"
  done = read_raw()
  for point in grid():
    (planned, moment), compiled = point.planned(), done[point.name]["peak_bytes"]
    far = " " if abs(planned / compiled - 1) < NEAR else "*"
    figures = f"{planned / 1e9:12.2f} {compiled / 1e9:8.2f} {planned / compiled:6.3f}{far}"
    yield f"{figures} {moment:9} {point.name}"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--compile", action="store_true", help="what the raw file lacks")
  if parser.parse_args().compile:
    compile_missing()
  for line in table():
    print(line)


if __name__ == "__main__":
  main()
