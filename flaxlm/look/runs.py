# SPDX-License-Identifier: Apache-2.0
"""A run's curves and its config: what metrics.jsonl and config.json hold."""

import contextlib
import json
import math
from pathlib import Path
from typing import Any

from flaxlm.config import Config, difference, knobs
from flaxlm.errors import CheckpointError
from flaxlm.look.view import View, line_chart
from flaxlm.runs import LOG, METRICS, SAMPLE, load_config_of

# (title, y label, {metric: name}). Other metrics are drawn after these.
CHARTS = [
  ("Loss", "nats per token", {"train/loss": "training", "eval/loss": "held out"}),
  (
    "Bits per byte",
    "bits",
    {"eval/bits_per_byte": "held out", "eval/gzip_bits_per_byte": "gzip -9"},
  ),
  ("Reward", "", {"train/reward": "drawn", "eval/reward": "held out, likeliest answer"}),
  ("Learning rate", "", {"train/learning_rate": "learning rate"}),
  ("Speed", "tokens per second", {"perf/tokens_per_sec": "tokens/s"}),
  ("MFU, strict", "share of the devices' peak", {"perf/mfu": "MFU"}),
  (
    "Time",
    "share",
    {
      "perf/goodput": "in steps, of all since the start",
      "perf/data_wait_fraction": "waiting for data, of the steps'",
      "perf/drawing_fraction": "drawing completions, of the steps'",
    },
  ),
  ("Memory", "GB", {"perf/memory_gb": "most in use, of the fullest device"}),
  ("Gradient norm", "", {"train/gradient_norm": "gradient norm"}),
]
UNDRAWN = {"train/tokens", "perf/elapsed_seconds"}
MOST_LINES = 40


def look_run(path: Path) -> View:
  """The curves of a run. Raises `CheckpointError` if it has not written any."""
  cfg = load_config_of(path)
  curves = read_metrics(path / METRICS)
  if not curves:
    raise CheckpointError(f"{path} has no metrics yet", "train it first")
  charts = []
  listed = {name for _, _, names in CHARTS for name in names} | UNDRAWN
  others = [(name, "", {name: name}) for name in sorted(curves.keys() - listed)]
  for title, label, names in [*CHARTS, *others]:
    series = [
      {"name": names[name], "x": curves[name][0], "y": curves[name][1]}
      for name in names
      if name in curves
    ]
    if series:
      charts.append(line_chart(title, series, "step", label))
  last_step = max(steps[-1] for steps, _ in curves.values())
  figures = {
    "last_step": last_step,
    "num_steps": cfg.training.num_steps,
    "last": {name: values[-1] for name, (_, values) in curves.items()},
    "best": {
      name: min(finite)
      for name in ("train/loss", "eval/loss", "eval/bits_per_byte")
      if name in curves and (finite := [y for y in curves[name][1] if y is not None])
    },
  }
  notes = [f"{path}, step {last_step:,} of {cfg.training.num_steps:,}"]
  data = {
    "charts": charts,
    "sample": "\n".join(last_lines(path / SAMPLE)),
    "config": config_rows(cfg),
    "log": last_lines(path / LOG),
  }
  return View("run", f"The run {cfg.name}", [], notes, figures, data)


def read_metrics(path: Path) -> dict[str, tuple[list[int], list[float | None]]]:
  """{metric: (steps, values)}; None where a value is not finite."""
  curves: dict[str, tuple[list[int], list[float | None]]] = {}
  try:
    lines = path.read_text("utf-8", "replace").splitlines()
  except OSError:
    return {}
  for line in lines:
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
      record = json.loads(line)  # a line that a kill has cut is skipped
      step = int(record.pop("step"))
      for name, value in record.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number or value is None:
          steps, values = curves.setdefault(name, ([], []))
          steps.append(step)
          values.append(value if is_number and math.isfinite(value) else None)
  return curves


def config_rows(cfg: Config) -> list[dict[str, Any]]:
  """Every field of the config, with its meaning and whether it differs from the default."""
  changed = difference(Config(), cfg)
  rows = []
  for name, _, field in knobs(Config):
    value: Any = cfg
    for part in name.split("."):
      value = getattr(value, part)
    if isinstance(value, dict):
      value = ",".join(f"{axis}={size}" for axis, size in value.items())
    text = str(value).lower() if value is None or isinstance(value, bool) else str(value)
    row = {"name": name, "value": text, "changed": name in changed}
    rows.append(row | {"help": field.metadata["help"]})
  return rows


def last_lines(path: Path) -> list[str]:
  """The last lines of a file that the run has written; none if it does not exist."""
  try:
    return path.read_text("utf-8", "replace").splitlines()[-MOST_LINES:]
  except OSError:
    return []
