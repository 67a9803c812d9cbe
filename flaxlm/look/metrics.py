# SPDX-License-Identifier: Apache-2.0
"""What a run has measured: its metrics, and what people call them."""

import contextlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flaxlm.look.view import heat_map, line_chart, shown

# {metric: (steps, values)}; None where a value is not finite.
Curves = dict[str, tuple[list[int], list[float | None]]]


class Chart(NamedTuple):
  """A chart of some metrics, each with the name that people read."""

  title: str
  y_label: str
  names: Mapping[str, str]  # {metric: name}
  says: str = ""

  def is_told(self, name: str) -> bool:
    """Whether the title says already what one of its curves is called."""
    return name.lower() in self.title.lower()


CHARTS = [
  Chart("Loss", "nats per token", {"train/loss": "training", "eval/loss": "held out"}),
  Chart(
    "Bits per byte",
    "bits",
    {"eval/bits_per_byte": "held out", "eval/gzip_bits_per_byte": "gzip -9"},
  ),
  Chart("Perplexity", "per token", {"eval/perplexity": "held out"}),
  Chart(
    "Right answers",
    "share",
    {"train/accuracy": "training", "eval/accuracy": "held out"},
    "Masks that are filled rightly, pairs in the right order, or answers that are exact.",
  ),
  Chart(
    "Unknown tokens",
    "share of tokens",
    {"eval/unknown": "held out"},
    "Text that the tokenizer does not know.",
  ),
  Chart(
    "Reward", "", {"train/reward": "drawn", "eval/reward": "held out, likeliest answer"}
  ),
  Chart(
    "Rewards of the two answers",
    "nats",
    {
      "train/chosen_reward": "chosen, training",
      "train/rejected_reward": "rejected, training",
      "eval/chosen_reward": "chosen, held out",
      "eval/rejected_reward": "rejected, held out",
    },
  ),
  Chart(
    "Margin of the chosen answer",
    "nats",
    {"train/margin": "training", "eval/margin": "held out"},
  ),
  Chart(
    "Drawn completions",
    "share",
    {
      "train/telling_groups": "groups whose rewards differ, which teach",
      "train/ended_completions": "completions that ended by themselves",
    },
  ),
  Chart("Length of drawn completions", "tokens", {"train/completion_tokens": "mean"}),
  Chart("Learning rate", "", {"train/learning_rate": "learning rate"}),
  Chart("Gradient norm", "", {"train/gradient_norm": "of all parameters, before clipping"}),
  Chart("Speed", "tokens per second", {"perf/tokens_per_sec": "tokens per second"}),
  Chart(
    "MFU, strict",
    "share of the devices' peak",
    {"perf/mfu": "model FLOPs utilization"},
    "FLOPs that the model needs, over those of the devices at their peak.",
  ),
  Chart(
    "Share of time",
    "share",
    {
      "perf/goodput": "in training steps, of all time since the start (goodput)",
      "perf/data_wait_fraction": "waiting for data, of the steps' time",
      "perf/drawing_fraction": "drawing completions, of the steps' time",
    },
  ),
  Chart("Memory", "GB", {"perf/memory_gb": "most in use, of the fullest device"}),
]
UNDRAWN = {"train/tokens", "perf/elapsed_seconds"}  # other charts are drawn by them
# What each layer says (training.log_layers).
LAYERS = {
  "train/gradient_norm/": Chart(
    "Gradient norm by layer",
    "norm",
    {},
    "The length of each layer's gradient, before clipping.",
  ),
  "train/update_size/": Chart(
    "Update size by layer",
    "size",
    {},
    "How far a step moves each layer's parameters, over how long they are.",
  ),
}
LOAD = "eval/expert_load/"
MOST_CURVES = 8  # in one chart: there are so many colours
MOST_COLUMNS = 300  # of a map
# What a line that is none says of itself; a step that is infinite overflows.
NO_RECORD = (ValueError, KeyError, TypeError, AttributeError, OverflowError)


def read_metrics(path: Path) -> Curves:
  """What the lines of a metrics.jsonl say; nothing if there is no such file."""
  curves: Curves = {}
  for step, record in read_lines(path):
    for name, value in record.items():
      is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
      if is_number or value is None:
        steps, values = curves.setdefault(name, ([], []))
        steps.append(step)
        values.append(value if is_number and math.isfinite(value) else None)
  return curves


def read_lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
  """(step, the rest) of each line of JSON; a line that a kill has cut is skipped, of which
  `left_out` tells."""
  try:
    lines = path.read_text("utf-8", "replace").splitlines()
  except OSError:
    return []
  found = []
  for line in lines:
    with contextlib.suppress(*NO_RECORD):
      record = json.loads(line)
      found.append((int(record.pop("step")), record))
  return found


def left_out(path: Path) -> list[str]:
  """What is to be told of a file with lines that are no records; nothing if all are."""
  try:
    lines = [x for x in path.read_text("utf-8", "replace").splitlines() if x.strip()]
  except OSError:
    return []
  number = len(lines) - len(read_lines(path))
  if not number:
    return []
  if number == 1:
    return [f"1 line of {path} is no record, and is left out."]
  return [f"{number:,} lines of {path} are no records, and are left out."]


# -- Charts of one run ---------------------------------------------------------------------


def charts_of(curves: Curves, objective: str = "next_token") -> list[dict[str, Any]]:
  """Every metric in some chart: those with a name first."""
  named = [*CHARTS, *by_source(curves)]
  if objective == "preference":
    named[0] = named[0]._replace(y_label="nats per pair")
  special = (*LAYERS, LOAD)
  known = {metric for chart in named for metric in chart.names} | UNDRAWN
  left = [name for name in curves if name not in known and not name.startswith(special)]
  charts = [lines(chart, curves) for chart in named if chart.names.keys() & curves.keys()]
  for prefix, chart in LAYERS.items():
    parts = {name.removeprefix(prefix): name for name in curves if name.startswith(prefix)}
    if parts:
      charts.append(by_part(chart, curves, parts, "layer"))
  charts += load_charts(curves)
  # Whatever else is there, such as what a program of the user's has added.
  return charts + [lines(Chart(name, "", {name: name}), curves) for name in sorted(left)]


def lines(chart: Chart, curves: Curves, log: str = "") -> dict[str, Any]:
  """The curves of a chart that there are."""
  series = [
    {"name": name, "x": curves[metric][0], "y": curves[metric][1]}
    for metric, name in chart.names.items()
    if metric in curves
  ]
  says = chart.says
  names = [chart.names[metric] for metric in chart.names if metric in curves]
  if len(names) == 1 and not says and not chart.is_told(names[0]):
    says = f"{names[0].capitalize()}."  # one curve has no legend
  return line_chart(chart.title, series, "step", chart.y_label, log, says=says)


def by_source(names: Iterable[str]) -> list[Chart]:
  """Charts of what evaluations say of each source of a mixture, as `eval/loss/stdlib`."""
  charts = []
  for chart in CHARTS:
    for metric, name in chart.names.items():
      of = f"{metric}/"
      found = {x: x.removeprefix(of) for x in names if x.startswith(of)}
      if found and metric.startswith("eval/"):
        title = f"{chart.title} by source, {name}"
        charts.append(Chart(title, chart.y_label, found, chart.says))
  return charts


def load_charts(curves: Curves) -> list[dict[str, Any]]:
  """The load of each expert, a chart for each layer."""
  layers: dict[str, dict[str, str]] = {}
  for name in (x for x in curves if x.startswith(LOAD)):
    layer, _, expert = name.removeprefix(LOAD).rpartition("/")
    layers.setdefault(layer, {})[expert.removeprefix("expert_")] = name
  charts = []
  for layer in sorted(layers, key=in_order):
    title = f"Load of the experts, {spelled(layer)}"
    chart = Chart(
      title, "load", {}, "Held-out tokens that chose it, over an even share: 1 is even."
    )
    charts.append(by_part(chart, curves, layers[layer], "expert"))
  return charts


def by_part(
  chart: Chart, curves: Curves, parts: Mapping[str, str], label: str
) -> dict[str, Any]:
  """A curve for each part, {part: metric}, or of many parts a map."""
  is_layer = label == "layer"
  order = sorted(parts, key=in_order)
  if len(parts) <= MOST_CURVES:
    before = "" if is_layer else "expert "
    names = {parts[part]: before + spelled(part) for part in order}
    return lines(chart._replace(names=names), curves, "y" if is_layer else "")
  steps = sorted({step for name in parts.values() for step in curves[name][0]})
  steps = [steps[n] for n in shown(len(steps), MOST_COLUMNS)]
  values = np.full((len(parts), len(steps)), np.nan)
  for row, part in enumerate(order):
    known = dict(zip(*curves[parts[part]], strict=True))
    values[row] = [np.nan if known.get(s) is None else known[s] for s in steps]
  rows = [spelled(part) for part in order]
  return heat_map(chart.title, values, ("step", steps), (label, rows), chart.says, is_layer)


def spelled(part: str) -> str:
  """`decoder/layer_3` as people say it: decoder layer 3."""
  return part.replace("/", " ").replace("_", " ")


def in_order(part: str) -> tuple:
  """Sorts parts as the model runs them, and numbers by their size."""
  place = 0 if part == "embedding" else 1 if re.search(r"layer_\d|^\d", part) else 2
  return (place, *(int(x) if x.isdigit() else x for x in re.split(r"(\d+)", part)))
