# SPDX-License-Identifier: Apache-2.0
"""A run's curves, what it wrote, and its config: the files of its directory."""

import operator
from pathlib import Path
from typing import Any

from flaxlm.config import Config, ModelConfig, ResolvedConfig, difference, knobs, override
from flaxlm.errors import CheckpointError
from flaxlm.look.metrics import Curves, charts_of, left_out, read_lines, read_metrics
from flaxlm.look.view import View
from flaxlm.runs import LOG, METRICS, SAMPLE, SAMPLES, load_config_of

MOST_LINES = 40
LOWER_IS_BETTER = ("train/loss", "eval/loss", "eval/bits_per_byte")


def look_run(path: Path) -> View:
  """The curves of a run. Raises `CheckpointError` if it has not written any."""
  cfg, curves = load_config_of(path), measured(path)
  figures = figures_of(cfg, curves)
  charts = charts_of(curves, cfg.data.objective)
  notes = [f"{path}, step {figures['last_step']:,} of {cfg.training.num_steps:,}"]
  data = {
    "charts": charts,
    "samples": read_samples(path),
    "sample": "\n".join(last_lines(path / SAMPLE)),
    "config": config_rows(cfg),
    "log": last_lines(path / LOG),
  }
  cuts = [line for name in (METRICS, SAMPLES) for line in left_out(path / name)]
  return View("run", f"The run {cfg.name}", cuts, notes, figures, data)


def measured(path: Path) -> Curves:
  """The metrics of a run. Raises `CheckpointError` if there are none."""
  curves = read_metrics(path / METRICS)
  if not curves:
    raise CheckpointError(f"{path} has no metrics yet", "train it first")
  return curves


def figures_of(cfg: ResolvedConfig, curves: Curves) -> dict[str, Any]:
  """How far a run has come, its last metrics, and the lowest of those that should fall."""
  return {
    "last_step": max(steps[-1] for steps, _ in curves.values()),
    "num_steps": cfg.training.num_steps,
    "last": {name: values[-1] for name, (_, values) in curves.items()},
    "best": {
      name: min(finite)
      for name in LOWER_IS_BETTER
      if name in curves and (finite := [y for y in curves[name][1] if y is not None])
    },
  }


def read_samples(path: Path) -> list[dict[str, Any]]:
  """What the run wrote while it learnt: a `sample` for each `step`, the last if it wrote
  twice after the same."""
  lines = read_lines(path / SAMPLES)
  samples = {step: line["sample"] for step, line in lines if "sample" in line}
  return [{"step": step, "sample": str(samples[step])} for step in sorted(samples)]


def config_rows(cfg: ResolvedConfig) -> list[dict[str, Any]]:
  """Every field of the config, with its meaning and whether somebody chose it."""
  chosen = chosen_fields(cfg)
  rows = []
  for name, _, field in knobs(Config):
    row = {"name": name, "value": value_of(cfg, name), "chosen": name in chosen}
    rows.append(row | {"help": field.metadata["help"]})
  return rows


def value_of(cfg: Config, name: str) -> str:
  """The value of a field, `section.field`, as a command line spells it."""
  value = operator.attrgetter(name)(cfg)
  if isinstance(value, dict):
    return ",".join(f"{axis}={size}" for axis, size in value.items())
  return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def chosen_fields(cfg: ResolvedConfig) -> set[str]:
  """The fields that the config file or the command line has set.

  They differ from their defaults, and no rule has filled them in. A run that begins from
  another has the model and the tokenizer of that one. Its name every run has.
  """
  chosen = difference(Config(), cfg).keys() - {"name"}
  if cfg.init is not None:
    adopted = ("model.", "tokenizer.")
    return {x for x in chosen if not x.startswith(adopted) or x == "model.dropout"}
  return {name for name in chosen if not is_filled_in(cfg, name)}


def is_filled_in(cfg: ResolvedConfig, name: str) -> bool:
  """Whether `ModelConfig.resolve` gives a field the value that it has, when it is unset."""
  if name == "model.num_ids" or (name == "model.vocab_size" and cfg.model.is_padded):
    return True  # the tokenizer's; of a vocabulary that is set, all rows are ids
  if operator.attrgetter(name)(Config()) is not None or not name.startswith("model."):
    return False
  getter = operator.attrgetter(name.removeprefix("model."))
  unset = override(cfg, [f"--{field}=none" for field in (name, "model.num_ids")])
  model = ModelConfig(**vars(unset.model)).resolve(cfg.model.num_ids)
  return getter(model) == getter(cfg.model)


def last_lines(path: Path) -> list[str]:
  """The last lines of a file that the run has written; none if it does not exist."""
  try:
    return path.read_text("utf-8", "replace").splitlines()[-MOST_LINES:]
  except OSError:
    return []
