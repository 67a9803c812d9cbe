# SPDX-License-Identifier: Apache-2.0
"""Several runs on one page: their curves together, what differs in their configs, and what
came of it."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flaxlm.checkpoint.manifest import digest
from flaxlm.config import Config, ResolvedConfig, knobs
from flaxlm.cost import parameters
from flaxlm.errors import ConfigError
from flaxlm.look.metrics import CHARTS, Curves, left_out
from flaxlm.look.runs import chosen_fields, figures_of, measured, value_of
from flaxlm.look.view import View, line_chart
from flaxlm.runs import METRICS, TOKENIZER, load_config_of

MOST_RUNS = 8  # there are so many colours
BITS, GZIP = "eval/bits_per_byte", "eval/gzip_bits_per_byte"
PER_TOKEN = ("Loss", "Perplexity")  # charts whose numbers depend on the tokenizer
UNIQUE = ("name", "runs_dir")  # fields in which all runs differ anyway
NOT_COMPARABLE = "Per token, and the tokens differ: these numbers do not compare."
UNITS = (("hours", 3600.0, 7200.0), ("minutes", 60.0, 120.0), ("seconds", 1.0, 0.0))


class RunData(NamedTuple):
  """A run as the page tells of it."""

  name: str
  path: Path
  cfg: ResolvedConfig
  curves: Curves
  tokenizer: str | None  # SHA-256 of its file; None if it is not there


class Figure(NamedTuple):
  """A row of the table of what came out: a number of each run, and which is the best."""

  name: str
  of: Callable[[RunData, Mapping[str, Any]], float | None]
  best: Callable[[Sequence[float]], float] | None = None
  per_token: bool = False


def last(metric: str) -> Callable[[RunData, Mapping[str, Any]], float | None]:
  return lambda run, figures: figures["last"].get(metric)


def lowest(metric: str) -> Callable[[RunData, Mapping[str, Any]], float | None]:
  return lambda run, figures: figures["best"].get(metric)


FIGURES = [
  Figure("parameters", lambda run, figures: sum(parameters(run.cfg.model).values())),
  Figure("steps", lambda run, figures: figures["last_step"]),
  Figure("steps asked for", lambda run, figures: figures["num_steps"]),
  Figure(
    "tokens read", lambda run, figures: tokens_at(run.curves, [figures["last_step"]])[0]
  ),
  Figure("seconds since the start", last("perf/elapsed_seconds")),
  Figure("training loss, last", last("train/loss"), min, per_token=True),
  Figure("held-out loss, last", last("eval/loss"), min, per_token=True),
  Figure("held-out loss, lowest", lowest("eval/loss"), min, per_token=True),
  Figure("held-out bits per byte, last", last(BITS), min),
  Figure("held-out bits per byte, lowest", lowest(BITS), min),
  Figure("held-out right answers, share", last("eval/accuracy"), max),
  Figure("held-out reward", last("eval/reward"), max),
  Figure("tokens per second, last", last("perf/tokens_per_sec"), max),
  Figure("MFU, strict, last", last("perf/mfu"), max),
  Figure("memory, GB, most in use on a device", last("perf/memory_gb")),
  Figure("share of all time in steps (goodput)", last("perf/goodput"), max),
  Figure("share of the steps' time waiting for data", last("perf/data_wait_fraction")),
]


def look_runs(paths: Sequence[Path]) -> View:
  """The curves of several runs. Raises `ConfigError` for a run that is named twice and for
  too many, `CheckpointError` for one without metrics."""
  check_runs(paths)
  runs = [open_data(name, path) for name, path in zip(names_of(paths), paths, strict=True)]
  comparable = len({run.tokenizer for run in runs}) == 1 and runs[0].tokenizer is not None
  figures = [figures_of(run.cfg, run.curves) for run in runs]
  rows = table_of(runs, figures, comparable)
  differences = differing(runs)
  unit, seconds = unit_of(runs)
  data = {
    "runs": [run.name for run in runs],
    "charts": charts_of(runs, comparable, seconds),
    "across": {"x": "step", "tokens": "tokens read", "time": f"{unit} since the start"},
    "rows": rows,
    "config": differences,
  }
  told = {
    "runs": [
      {"name": run.name, "path": str(run.path), "tokenizer": run.tokenizer, **one}
      for run, one in zip(runs, figures, strict=True)
    ],
    "losses_compare": comparable,
    "differences": {row["name"]: row["values"] for row in differences},
  }
  title = f"The runs {spoken([run.name for run in runs])}"
  cuts = notes_of(runs, comparable)
  cuts += [line for run in runs for line in left_out(run.path / METRICS)]
  return View("runs", title, cuts, origins(runs), told, data)


def spoken(words: Sequence[str]) -> str:
  """a, b and c."""
  return " and ".join(x for x in (", ".join(words[:-1]), words[-1]) if x)


def check_runs(paths: Sequence[Path]) -> None:
  """Raises `ConfigError` for a run that is named twice, and for too many."""
  if len(paths) > MOST_RUNS:
    raise ConfigError(
      f"{len(paths)} runs on one page", f"{MOST_RUNS} can be told apart: leave some out"
    )
  places = [path.resolve() for path in paths]
  for n, place in enumerate(places):
    if place in places[:n]:
      raise ConfigError(f"{paths[n]} is named twice", "leave one of them out")


def names_of(paths: Sequence[Path]) -> list[str]:
  """The name of each run; its path, where two have the same."""
  names = [path.resolve().name for path in paths]
  return [
    str(path) if names.count(name) > 1 else name
    for name, path in zip(names, paths, strict=True)
  ]


def open_data(name: str, path: Path) -> RunData:
  file = path / TOKENIZER
  tokenizer = digest(file) if file.is_file() else None
  return RunData(name, path, load_config_of(path), measured(path), tokenizer)


def origins(runs: Sequence[RunData]) -> list[str]:
  """Where the numbers come from, and what is not on the page."""
  return [
    ", ".join(str(run.path) for run in runs),
    "What a run says of each of its layers, experts or sources is on its own page.",
  ]


def notes_of(runs: Sequence[RunData], comparable: bool) -> list[str]:
  """What keeps the numbers of these runs from being compared."""
  notes = []
  if not comparable:
    note = "The runs have different tokenizers: losses per token do not compare."
    without = [run.name for run in runs if BITS not in run.curves]
    if without:
      note += f" Bits per byte would, but there are none of {spoken(without)}."
    else:
      note += " Bits per byte do, and stand first."
    notes.append(note)
  for field, what in (
    ("corpus", "read different texts"),
    ("objective", "learn different things"),
  ):
    values = {getattr(run.cfg.data, field): None for run in runs}
    if len(values) > 1:
      notes.append(
        f"The runs {what} (data.{field}: {spoken([*values])}): what is held out differs."
      )
  limits = {x: None for x in (run.cfg.training.eval_batches for run in runs)}
  sizes = {(run.tokenizer, run.cfg.data.seq_len, run.cfg.data.batch_size) for run in runs}
  if len(limits) > 1 or (len(sizes) > 1 and None not in limits):
    notes.append(
      "training.eval_batches limits what is evaluated, and here to different parts of the "
      "text that is held out."
    )
  return notes


# -- Curves --------------------------------------------------------------------------------


def charts_of(
  runs: Sequence[RunData], comparable: bool, seconds: float
) -> list[dict[str, Any]]:
  """A chart of each metric, with a curve of each run that has it."""
  order = [*CHARTS]
  if not comparable:  # what does compare comes first
    order.sort(key=lambda chart: BITS not in chart.names)
  charts = []
  for chart in order:
    says = NOT_COMPARABLE if chart.title in PER_TOKEN and not comparable else chart.says
    for metric, name in chart.names.items():
      if metric == GZIP or not any(metric in run.curves for run in runs):
        continue
      series = [
        series_of(run, number, metric, seconds)
        for number, run in enumerate(runs)
        if metric in run.curves
      ]
      title = chart.title if chart.is_told(name) else f"{chart.title}: {name}"
      marks = gzip_mark(runs) if metric == BITS else []
      charts.append(
        line_chart(title, series, "step", chart.y_label, marks=marks, says=says)
      )
  return charts


def series_of(run: RunData, number: int, metric: str, seconds: float) -> dict[str, Any]:
  """The curve of a run, in its colour, over steps, tokens and time."""
  steps, values = run.curves[metric]
  times = times_at(run.curves, steps)
  return {
    "name": run.name,
    "colour": number,
    "x": steps,
    "y": values,
    "tokens": tokens_at(run.curves, steps),
    "time": [None if time is None else time / seconds for time in times],
  }


def tokens_at(curves: Curves, steps: Sequence[int]) -> list[int | None]:
  """Tokens that had been read after each step: those of each logged step stand for the
  steps since the line before."""
  logged, tokens = curves.get("train/tokens", ([], []))
  if not logged or None in tokens:
    return [None for _ in steps]
  after = np.array([0, *logged, max([*steps, logged[-1]])], float)
  rates = np.array([*tokens, tokens[-1]], float)
  read = np.concatenate([[0.0], np.cumsum(np.diff(after) * rates)])
  return [round(count) for count in np.interp(steps, after, read).tolist()]


def times_at(curves: Curves, steps: Sequence[int]) -> list[float | None]:
  """Seconds since the start after each step, between the lines of metrics by interpolation;
  after the last line, that line's."""
  known, seconds = curves.get("perf/elapsed_seconds", ([], []))
  if not known or None in seconds:
    return [None for _ in steps]
  return np.interp(steps, known, np.array(seconds, float)).tolist()


def unit_of(runs: Sequence[RunData]) -> tuple[str, float]:
  """The unit of time that suits the longest of the runs, and its seconds."""
  ends = [run.curves.get("perf/elapsed_seconds", ([], [0.0]))[1][-1] or 0.0 for run in runs]
  return next((name, size) for name, size, least in UNITS if max(ends) >= least)


def gzip_mark(runs: Sequence[RunData]) -> list[dict[str, Any]]:
  """A line at what gzip makes of the text, if all runs hold out the same."""
  values = {run.curves[GZIP][1][-1] for run in runs if GZIP in run.curves}
  at = values.pop() if len(values) == 1 else None
  return [] if at is None else [{"name": "gzip -9", "at": at, "axis": "y"}]


# -- Tables --------------------------------------------------------------------------------


def table_of(
  runs: Sequence[RunData], figures: Sequence[Mapping[str, Any]], comparable: bool
) -> list[dict[str, Any]]:
  """What came out, {name, values, best}: `best` numbers the runs that are."""
  rows = []
  for figure in FIGURES:
    values = [figure.of(run, one) for run, one in zip(runs, figures, strict=True)]
    known = [value for value in values if value is not None]
    if not known:
      continue
    can_win = figure.best is not None and len(set(known)) > 1
    if figure.per_token and not comparable:
      can_win = False
    top = figure.best(known) if can_win and figure.best is not None else None
    best = [n for n, value in enumerate(values) if top is not None and value == top]
    rows.append({"name": figure.name, "values": values, "best": best})
  return rows


def differing(runs: Sequence[RunData]) -> list[dict[str, Any]]:
  """The fields in which the configs differ: {name, help, values, chosen}, the last two by
  run. What nobody chose, and only follows from the rest, comes last."""
  chosen = [chosen_fields(run.cfg) for run in runs]
  rows = []
  for name, _, field in knobs(Config):
    values = [value_of(run.cfg, name) for run in runs]
    if len(set(values)) > 1 and name not in UNIQUE:
      by_run = [name in some for some in chosen]
      text = field.metadata["help"]
      rows.append({"name": name, "help": text, "values": values, "chosen": by_run})
  return sorted(rows, key=lambda row: not any(row["chosen"]))
