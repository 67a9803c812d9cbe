# SPDX-License-Identifier: Apache-2.0
"""Where the metrics of a run can be sent besides its own files: W&B, trackio, MLflow.

Each has its own settings, which are its environment variables: who one is, where the server
is. They are the user's, and nothing here reads or keeps a key.
"""

import contextlib
import importlib.util
import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from secrets import token_hex
from typing import Any, Protocol

from flax.traverse_util import flatten_dict

from flaxlm.config import Config, ResolvedConfig, to_json
from flaxlm.errors import INTERRUPTED, PREEMPTED, ConfigError

PROJECT = "flaxlm"  # unless something names another
# No telemetry; and a server that is gone is known to be within a minute or two, not ten.
MLFLOW_DEFAULTS = {
  "MLFLOW_DISABLE_TELEMETRY": "true",
  "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
  "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}


class Sink(Protocol):
  """A run as a tracker has it. Any call may raise, and may wait for a network."""

  id: str  # by which the tracker finds the run again
  place: str  # where a person does

  def __init__(self, cfg: ResolvedConfig, id: str | None):
    """Begins a run or, with an `id`, goes on with one."""

  def log(self, step: int, values: Mapping[str, float]) -> None: ...

  def finish(self, exit_code: int) -> None: ...


class Wandb:
  """Weights & Biases. Its files are in the run's folder `wandb/`."""

  def __init__(self, cfg: ResolvedConfig, id: str | None):
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # to its makers
    import wandb

    self._run = wandb.init(
      project=cfg.track_project or os.environ.get("WANDB_PROJECT") or PROJECT,
      name=cfg.name,
      id=id,
      resume=None if id is None else "allow",
      config=settings(cfg),
      dir=os.environ.get("WANDB_DIR") or str(cfg.run_dir),
      # What is printed stays what it is, and no source is copied.
      settings=wandb.Settings(console="off", quiet=True, save_code=False),
    )
    # Its own steps may only grow, and steps that were lost are done again.
    self._run.define_metric("*", step_metric="step")
    self.id = self._run.id
    folder = str(self._run.dir).removesuffix("/files")
    self.place = folder if self._run.offline else self._run.url

  def log(self, step: int, values: Mapping[str, float]) -> None:
    self._run.log({"step": step, **values})

  def finish(self, exit_code: int) -> None:
    if exit_code == PREEMPTED:
      self._run.mark_preempting()
    self._run.finish(exit_code=exit_code)


class Trackio:
  """trackio of Hugging Face: a database on this machine, or a Space."""

  def __init__(self, cfg: ResolvedConfig, id: str | None):
    import trackio

    project = cfg.track_project or PROJECT
    self._run = trackio.init(
      project=project,
      name=id or f"{cfg.name}-{token_hex(3)}",  # it finds a run by its name
      config=settings(cfg),
      resume="never" if id is None else "allow",
      embed=False,
    )
    self.id, self.place = self._run.name, f"trackio show --project {project}"

  def log(self, step: int, values: Mapping[str, float]) -> None:
    self._run.log(dict(values), step=step)

  def finish(self, exit_code: int) -> None:
    with contextlib.redirect_stdout(sys.stderr):
      self._run.finish()


class Mlflow:
  """MLflow: a server, or a database on this machine."""

  def __init__(self, cfg: ResolvedConfig, id: str | None):
    for name, value in MLFLOW_DEFAULTS.items():
      os.environ.setdefault(name, value)
    import mlflow
    from mlflow.entities import Metric, Param

    # What fails is told, once: not each time that something tries again.
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    self._metric, self._client = Metric, mlflow.MlflowClient()
    name = cfg.track_project or os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
    if id is None:
      found = self._client.get_experiment_by_name(name)
      place = found.experiment_id if found else self._client.create_experiment(name)
      id = self._client.create_run(place, run_name=cfg.name).info.run_id
      flat = flatten_dict(settings(cfg), sep=".")
      params = [Param(key, str(value)) for key, value in flat.items()]
      for first in range(0, len(params), 100):  # the most that a server takes at once
        self._client.log_batch(id, params=params[first : first + 100])
    else:
      self._client.update_run(id, status="RUNNING")
    self.id, self.place = id, f"{mlflow.get_tracking_uri()}, experiment {name}"

  def log(self, step: int, values: Mapping[str, float]) -> None:
    now = int(1000 * time.time())
    metrics = [self._metric(name, value, now, step) for name, value in values.items()]
    self._client.log_batch(self.id, metrics=metrics)

  def finish(self, exit_code: int) -> None:
    ends = {0: "FINISHED", PREEMPTED: "KILLED", INTERRUPTED: "KILLED"}
    self._client.set_terminated(self.id, ends.get(exit_code, "FAILED"))


SINKS: dict[str, type[Sink]] = {"wandb": Wandb, "trackio": Trackio, "mlflow": Mlflow}


def check_tracker(cfg: Config) -> None:
  """Raises `ConfigError` if the tracker that is asked for is not installed."""
  name = cfg.track
  if name != "none" and name not in sys.modules and importlib.util.find_spec(name) is None:
    raise ConfigError(
      f"track={name} needs {name}, which is not installed", f"pip install 'flaxlm[{name}]'"
    )


def settings(cfg: ResolvedConfig) -> dict[str, Any]:
  """Every field of the config, by section."""
  return json.loads(to_json(cfg))
