# SPDX-License-Identifier: Apache-2.0
"""What others measured, against what `flaxlm plan` says of the same configs.

    python -m benchmarks.published            # the rows of published.toml
    python -m benchmarks.published --write    # the table of docs/planning.md

No accelerator is needed: both sides are figures. Rows that are held out were never looked
at when a constant of the device table was chosen.
"""

import argparse
import dataclasses
import math
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from flaxlm.config import ResolvedConfig, load_config, mesh_shape, override, parse_mesh
from flaxlm.devices import Device, find_device
from flaxlm.planning.decoding import Stored, plan_decoding
from flaxlm.planning.planner import resolve
from flaxlm.planning.roofline import Plan, narrow_rate, plan_training

ROOT = Path(__file__).parents[1]
ROWS, PAGE = ROOT / "benchmarks/published.toml", ROOT / "docs/planning.md"
BEGIN = "<!-- published: written by `python -m benchmarks.published --write` -->"
END = "<!-- published: end -->"
NEAR = (0.87, 1.15)  # predicted / published time that counts as agreement

# Without a compiler each operation between products reads and writes memory: their traffic
# is 2.9 times as much. From one pair that is no row: Llama 3.1 8B on 8 H100 at 500 W, 5,762
# tokens/s without torch.compile and 6,667 with it (torchtitan, 2024-12).
EAGER = 2.9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """A published figure, and the config, mesh and device that it belongs to."""

  name: str
  config: str
  mesh: str
  device: str
  figure: float
  unit: str
  source: str
  date: str
  guessed: str
  flags: str = ""
  network: float | None = None  # GB/s
  power: float | None = None  # W
  eager: bool = False  # the program was not compiled
  selective: bool = False  # every second product of a layer is computed again
  decode: dict[str, Any] | None = None
  held_out: bool = False

  @property
  def resolved(self) -> ResolvedConfig:
    cfg = resolve(override(load_config(self.config), self.flags.split()))
    return dataclasses.replace(cfg, mesh=dict(parse_mesh(self.mesh)))

  @property
  def sizes(self) -> dict[str, int]:
    return mesh_shape(parse_mesh(self.mesh))

  @property
  def hardware(self) -> Device:
    device = find_device(self.device)
    if self.network is not None:
      device = dataclasses.replace(device, network_bandwidth=self.network * 1e9)
    if self.power is not None:
      device = device.at_power(self.power)
    if self.eager:
      assert device.attainable_bandwidth is not None
      slow = {"activations": device.attainable_bandwidth / EAGER}
      device = dataclasses.replace(device, pass_bandwidths=slow)
    return device


@dataclasses.dataclass(frozen=True)
class Agreement:
  """Seconds of a row's step or decoded token, published and predicted, and the MFUs."""

  row: Row
  published: float
  predicted: float
  strict_mfu: float | None = None  # of the published time
  loose_mfu: float | None = None

  @property
  def ratio(self) -> float:
    return self.predicted / self.published

  @property
  def is_near(self) -> bool:
    return NEAR[0] <= self.ratio <= NEAR[1]


def read_rows() -> list[Row]:
  return [Row(**row) for row in tomllib.loads(ROWS.read_text())["row"]]


def compare(row: Row) -> Agreement:
  """Plans a row. Raises `ConfigError` where its config cannot be laid out."""
  if row.decode is not None:
    return compare_decoding(row, **row.decode)
  plan = plan_training(row.resolved, row.sizes, row.hardware)
  times = plan.times
  if row.selective:
    assert times.compute is not None
    more = times.compute + selective_seconds(row.resolved, plan)
    times = dataclasses.replace(times, compute=more)
  published, predicted = published_seconds(row, plan), times.seconds
  peak = plan.device.flops(plan.cfg.training.dtype)
  assert predicted is not None and peak is not None
  capacity = published * plan.num_devices * peak
  cost = plan.cost
  mfus = (cost.strict_flops / capacity, cost.loose_flops / capacity)
  return Agreement(row, published, predicted, *mfus)


def selective_seconds(cfg: ResolvedConfig, plan: Plan) -> float:
  """Seconds of what torchtitan's selective checkpointing computes again: of a layer's
  products, in the order q, k, v, o, w1, w3, w2, every second one, which is k, o and w3
  (`_custom_policy` of torchtitan/parallelisms/parallelize_llama.py at 3faaa1a0d)."""
  model = cfg.model
  heads = model.num_kv_heads + model.num_heads
  weights = model.width * (heads * model.head_dim + model.ffn_width)
  full = plan.device.attainable_flops(cfg.training.dtype)
  rate = narrow_rate(cfg, plan.device) or full
  assert rate is not None
  return 2.0 * plan.cost.tokens * model.depth * weights / rate / plan.num_devices


def compare_decoding(
  row: Row, batch: int, context: int, weights: str | None = None, cache: str | None = None
) -> Agreement:
  stored = Stored(weights, cache)
  point = plan_decoding(row.resolved, row.sizes, row.hardware, batch, context, stored)
  assert row.unit in ("tokens/s", "tokens/s/row") and point.seconds is not None
  rows = batch if row.unit == "tokens/s" else 1
  return Agreement(row, rows / row.figure, point.seconds)


def published_seconds(row: Row, plan: Plan) -> float:
  """Seconds of a step by the published figure."""
  number, cost = plan.num_devices, plan.cost
  peak = find_device(row.device).flops(plan.cfg.training.dtype) or math.nan
  return {
    "ms": row.figure / 1e3,
    "tokens/s/device": cost.tokens / number / row.figure,
    "loose MFU": cost.loose_flops / number / (row.figure / 100 * peak),
    "loose TFLOP/s": cost.loose_flops / number / (row.figure * 1e12),
  }[row.unit]


# -- The table -----------------------------------------------------------------------------

COLUMNS = ("run", "mesh", "published", "MFU, strict", "loose", "predicted / published")


def table(found: Iterable[Agreement]) -> str:
  lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
  percent = lambda share: "" if share is None else f"{share:.1%}"
  for one in found:
    row = one.row
    ratio = f"{one.ratio:.2f}" if one.is_near else f"**{one.ratio:.2f}**"
    published = (row.name, f"`{row.mesh}`", f"{row.figure:,g} {row.unit}")
    cells = (*published, percent(one.strict_mfu), percent(one.loose_mfu), ratio)
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


def summary(found: Sequence[Agreement]) -> str:
  near = sum(one.is_near for one in found)
  return f"{near} of {len(found)} within {NEAR[0]} to {NEAR[1]}"


def page(found: Sequence[Agreement]) -> str:
  """The part of docs/planning.md that this script writes."""
  held = [one for one in found if one.row.held_out]
  seen = [one for one in found if not one.row.held_out]
  return (
    f"{BEGIN}\n\nHeld out: {summary(held)}.\n\n{table(held)}\n\n"
    f"The others: {summary(seen)}.\n\n{table(seen)}\n\n{END}"
  )


def replaced(text: str, part: str) -> str:
  """A page with its written part replaced."""
  before, rest = text.split(BEGIN)
  return before + part + rest.split(END)[1]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--write", action="store_true", help="into docs/planning.md")
  args = parser.parse_args()
  part = page([compare(row) for row in read_rows()])
  if args.write:
    PAGE.write_text(replaced(PAGE.read_text(), part))
  else:
    print(part)


if __name__ == "__main__":
  main()
