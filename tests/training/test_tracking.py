# SPDX-License-Identifier: Apache-2.0
"""A run is tracked elsewhere, too, and no tracker can stop it. The libraries are stand-ins
that record what they are told."""

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from conftest import tiny

from flaxlm.config import Config, ResolvedConfig
from flaxlm.devices import Device
from flaxlm.errors import PREEMPTED, ConfigError
from flaxlm.training.trackers import MLFLOW_DEFAULTS, SINKS, check_tracker
from flaxlm.training.tracking import IDS, Tracker, start_tracking, without_secrets

KEY = "0123456789abcdef-the-key"
Calls = list[tuple[str, Any]]


def recorder(calls: Calls, **answers: Any) -> SimpleNamespace:
  """An object whose methods record their arguments and give `answers`."""

  def method(name: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
      calls.append((name, (*args, kwargs)))
      return answers[name](*args, **kwargs) if callable(answers[name]) else answers[name]

    return call

  return SimpleNamespace(**{name: method(name) for name in answers})


def fake_wandb(calls: Calls) -> dict[str, ModuleType]:
  module: Any = ModuleType("wandb")

  def init(**kwargs: Any) -> Any:
    calls.append(("init", kwargs))
    run = recorder(calls, define_metric=None, log=None, finish=None, mark_preempting=None)
    run.id, run.offline, run.dir = kwargs["id"] or "id-1", True, "runs/t/wandb/run-1/files"
    return run

  module.init, module.Settings = init, lambda **kwargs: kwargs
  return {"wandb": module}


def fake_trackio(calls: Calls) -> dict[str, ModuleType]:
  module: Any = ModuleType("trackio")

  def init(**kwargs: Any) -> Any:
    calls.append(("init", kwargs))
    print("* Trackio project initialized")
    run = recorder(calls, log=None, finish=None)
    run.name = kwargs["name"]
    return run

  module.init = init
  return {"trackio": module}


def fake_mlflow(calls: Calls) -> dict[str, ModuleType]:
  module: Any = ModuleType("mlflow")
  entities: Any = ModuleType("mlflow.entities")
  module.MlflowClient = lambda: recorder(
    calls,
    get_experiment_by_name=None,
    create_experiment="7",
    create_run=SimpleNamespace(info=SimpleNamespace(run_id="id-1")),
    log_batch=None,
    update_run=None,
    set_terminated=None,
  )
  module.get_tracking_uri = lambda: "https://ada:lovelace@tracker.example"
  entities.Metric, entities.Param = lambda *x: x, lambda *x: x
  return {"mlflow": module, "mlflow.entities": entities}


FAKES = {"wandb": fake_wandb, "trackio": fake_trackio, "mlflow": fake_mlflow}


def install(name: str, monkeypatch: pytest.MonkeyPatch) -> Calls:
  calls: Calls = []
  for module_name, module in FAKES[name](calls).items():
    monkeypatch.setitem(sys.modules, module_name, module)
  # What the sinks set themselves is put back, too.
  for variable in ("WANDB_ERROR_REPORTING", *MLFLOW_DEFAULTS):
    monkeypatch.setenv(variable, "as set")
  for variable in ("WANDB_PROJECT", "WANDB_DIR", "MLFLOW_EXPERIMENT_NAME"):
    monkeypatch.delenv(variable, raising=False)
  return calls


def tracked(name: Any, folder: Path) -> ResolvedConfig:
  (folder / "t").mkdir(exist_ok=True)
  return Config(name="t", runs_dir=str(folder), track=name).resolve(300)


def named(calls: Calls, name: str) -> list[Any]:
  return [arguments for called, arguments in calls if called == name]


@pytest.mark.parametrize("name", SINKS)
def test_a_tracker_gets_every_line_and_a_resumed_run_goes_on_in_its_place(
  name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
  calls, said = install(name, monkeypatch), []
  cfg = tracked(name, tmp_path)
  tracker = start_tracking(cfg, 0, said.append)
  assert tracker is not None
  tracker.log(1, {"train/loss": 3.0, "perf/mfu": 0.5})
  tracker.log(1, {"eval/loss": 2.5, "eval/perplexity": float("inf")})
  tracker.finish(0)
  (line,) = said
  assert line.startswith(f"tracked by {name}: ") and "lovelace" not in line
  own = json.loads((tmp_path / "t" / IDS).read_text())[name]
  if name == "wandb":
    (begun,) = named(calls, "init")
    assert (begun["project"], begun["name"], begun["id"]) == ("flaxlm", "t", None)
    assert begun["config"]["model"]["depth"] == cfg.model.depth
    assert begun["dir"] == str(cfg.run_dir)
    lines = [values for values, _ in named(calls, "log")]
    assert lines == [
      {"step": 1, "train/loss": 3.0, "perf/mfu": 0.5},
      {"step": 1, "eval/loss": 2.5},
    ]
    assert named(calls, "define_metric") == [("*", {"step_metric": "step"})]
    assert named(calls, "finish") == [({"exit_code": 0},)]
  elif name == "trackio":
    (begun,) = named(calls, "init")
    assert (begun["project"], begun["resume"]) == ("flaxlm", "never")
    assert begun["name"] == own and own.startswith("t-")
    lines = [({"train/loss": 3.0, "perf/mfu": 0.5}, {"step": 1})]
    assert named(calls, "log") == [*lines, ({"eval/loss": 2.5}, {"step": 1})]
    assert named(calls, "finish")
  else:
    assert named(calls, "create_experiment") == [("flaxlm", {})]
    assert named(calls, "create_run") == [("7", {"run_name": "t"})]
    batches = [kwargs for _, kwargs in named(calls, "log_batch")]
    params = {key: value for batch in batches for key, value in batch.get("params", [])}
    assert params["model.depth"] == str(cfg.model.depth) and params["track"] == "mlflow"
    assert all(len(batch.get("params", [])) <= 100 for batch in batches)
    points = [metric for batch in batches for metric in batch.get("metrics", [])]
    assert [(key, value, step) for key, value, _, step in points] == [
      ("train/loss", 3.0, 1),
      ("perf/mfu", 0.5, 1),
      ("eval/loss", 2.5, 1),
    ]
    assert named(calls, "set_terminated") == [("id-1", "FINISHED", {})]

  calls.clear()
  again = start_tracking(cfg, 20, said.append)
  assert again is not None
  again.finish(PREEMPTED)
  if name == "mlflow":
    assert not named(calls, "create_run")
    assert named(calls, "update_run") == [("id-1", {"status": "RUNNING"})]
    assert named(calls, "set_terminated") == [("id-1", "KILLED", {})]
  else:
    (begun,) = named(calls, "init")
    assert begun["resume"] == "allow" and own in (
      begun["id" if name == "wandb" else "name"],
    )
    assert bool(named(calls, "mark_preempting")) == (name == "wandb")
  assert json.loads((tmp_path / "t" / IDS).read_text()) == {name: own}
  calls.clear()
  start_tracking(cfg, 0, said.append).finish(0)  # type: ignore[union-attr]
  fresh = named(calls, "create_run") or [x for x in named(calls, "init") if not x.get("id")]
  assert len(fresh) == 1, "a run that begins anew is another"
  assert capsys.readouterr().out == ""


class Down:
  """A sink without a network."""

  id = place = "somewhere"

  def __init__(self) -> None:
    self.asked: list[int] = []

  def log(self, step: int, values: Any) -> None:
    self.asked.append(step)
    raise ConnectionError(f"no route to https://ada:lovelace@tracker.example?key={KEY}")

  def finish(self, exit_code: int) -> None: ...


def test_a_tracker_that_fails_is_told_once_and_asked_again():
  sink, said = Down(), []
  tracker = Tracker("mlflow", sink, said.append)  # type: ignore[arg-type]
  for step in range(5):
    tracker.log(step, {"train/loss": 1.0})
  tracker.finish(0)
  assert sink.asked == [0, 1, 2, 3, 4]
  told, missing = said
  assert told.startswith("mlflow fails, and training goes on: no route to https://***@")
  assert KEY not in told and "metrics.jsonl has it" in missing


def test_a_tracker_that_hangs_holds_up_nothing():
  goes_on, said = threading.Event(), []
  sink: Any = SimpleNamespace(log=lambda *_: goes_on.wait(60), finish=lambda _: None)
  tracker = Tracker("wandb", sink, said.append, finish_seconds=0.01)
  for step in range(20_000):  # more than may wait
    tracker.log(step, {})
  tracker.finish(0)
  goes_on.set()
  assert said == ["wandb has not got all of the run: metrics.jsonl has it"]


def test_what_is_told_has_no_secrets(monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setenv("WANDB_API_KEY", KEY)
  text = f"{KEY} at http://u:p@host/x?write_token=abc&n=1"
  assert without_secrets(text) == "*** at http://***@host/x?write_token=***&n=1"


@pytest.mark.parametrize("name", SINKS)
def test_a_tracker_that_cannot_start(
  name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
  """Is an error where somebody looks on, and a line where a run resumes."""
  install(name, monkeypatch)

  def refuse(*args: Any, **kwargs: Any) -> Any:
    raise PermissionError("log in first")

  module = sys.modules[name]
  monkeypatch.setattr(module, "MlflowClient" if name == "mlflow" else "init", refuse)
  cfg, said = tracked(name, tmp_path), []
  with pytest.raises(ConfigError, match=f"{name} cannot be started: log in first"):
    start_tracking(cfg, 0, said.append)
  assert start_tracking(cfg, 20, said.append) is None
  assert said == [f"{name} cannot be started: log in first; training goes on"]
  assert start_tracking(tracked("none", tmp_path), 0, said.append) is None


@pytest.mark.parametrize("name", SINKS)
def test_an_absent_tracker_is_named_with_its_extra(
  name: Any, monkeypatch: pytest.MonkeyPatch
):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  monkeypatch.delitem(sys.modules, name, raising=False)
  with pytest.raises(ConfigError, match="not installed") as caught:
    check_tracker(Config(track=name))
  assert caught.value.exit_code == 2
  assert caught.value.cure == f"pip install 'flaxlm[{name}]'"
  check_tracker(Config())


@pytest.mark.slow
def test_a_run_is_tracked_and_resumed_and_its_files_have_no_secret(
  in_process: Any, corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
  """On a device whose peak is known, so that there is an MFU to be sent."""
  calls = install("wandb", monkeypatch)
  monkeypatch.setenv("WANDB_API_KEY", KEY)
  known = Device(name="known", kind="cpu", peak_flops={"float32": 1e15})
  monkeypatch.setattr("flaxlm.training.clock.device_of", lambda kind: known)

  def train(num_steps: int) -> Any:
    knobs = tiny(corpus, name="t", training__num_steps=num_steps)
    return in_process("train", *knobs, "--track", "wandb")

  first = train(3)
  assert first.returncode == 0, first.stderr
  assert "  MFU 0." in first.stderr and "no perf/mfu" not in first.stderr
  sent = [values for values, _ in named(calls, "log")]
  text = (tmp_path / "runs/t/metrics.jsonl").read_text()
  assert sent == [json.loads(line) for line in text.splitlines()]
  assert 0 < sent[2]["perf/mfu"] < 1 and "perf/mfu" not in sent[0]
  again = train(4)
  assert again.returncode == 0, again.stderr
  begun, resumed = named(calls, "init")
  assert (begun["id"], resumed["id"], resumed["resume"]) == (None, "id-1", "allow")
  assert named(calls, "finish") == [({"exit_code": 0},)] * 2
  steps = [values["step"] for values, _ in named(calls, "log")]
  assert steps == [1, 2, 3, 3, 4, 4]
  files = [path for path in (tmp_path / "runs/t").rglob("*") if path.is_file()]
  assert files and not [path for path in files if KEY.encode() in path.read_bytes()]
  check = in_process("ckpt", "verify", "runs/t")
  assert check.returncode == 0, check.stdout
