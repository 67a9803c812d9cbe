# SPDX-License-Identifier: Apache-2.0
"""What a run directory is: its files, how a run is found and locked, where it resumes.

Nothing here needs a device or a model; `decoding.loading` makes a model of a run.
"""

import contextlib
import fcntl
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flaxlm.checkpoint import manifest
from flaxlm.checkpoint.manifest import Entry, damage, saved_steps
from flaxlm.config import (
  Config,
  ResolvedConfig,
  check_model,
  difference,
  from_json,
  is_file,
)
from flaxlm.errors import (
  CheckpointError,
  ConfigError,
  DataError,
  first_line,
  write_error,
  writing,
)

CONFIG, TOKENIZER, CHECKPOINTS = "config.json", "tokenizer.json", "checkpoints"
METRICS, LOG, SAMPLE = "metrics.jsonl", "log.txt", "sample.txt"
SAMPLES = "samples.jsonl"  # what the model wrote while it learnt
IMPORTED_FILES = "huggingface"  # the files that came with an imported checkpoint
ORIGIN = "origin.json"  # what a run began from: see origin.py
NEW = ".new-"  # begins the name of a folder of files that are to take their places
# What a run needs besides its checkpoints: config, tokenizer, and what came with an import.
NEEDED = ("*.json", f"{IMPORTED_FILES}/*")

# A run resumes only with the data and the parameters that it began with.
SECTIONS = ("model.", "tokenizer.", "data.", "lora.", "dpo.", "reward.")
FIXED_FIELDS = (*SECTIONS, "seed", "optimizer.kind")
# `model.num_ids` is free because older runs did not record which rows are padding.
FREE_FIELDS = ("data.num_epochs", "lora.dropout", "model.dropout", "model.num_ids")


def find_run(path: str | None, runs_dir: str = "runs") -> Path:
  """The run directory `path`, or the run under `runs_dir` with the newest checkpoint.

  Raises `CheckpointError`, which lists the runs that exist, when there is no such run.
  """
  if path is not None:
    for candidate in (Path(path), Path(runs_dir) / path):
      if is_file(candidate / CONFIG):
        return candidate
    names = ", ".join(sorted(run.name for run in _runs(Path(runs_dir)))) or "none"
    raise CheckpointError(f"{path} is not a run directory", f"runs here: {names}")
  runs = [run for run in _runs(Path(runs_dir)) if saved_steps(run / CHECKPOINTS)]
  if not runs:
    raise CheckpointError(f"no trained run below {runs_dir}/", "python train.py makes one")
  return max(runs, key=lambda run: (run / CHECKPOINTS).stat().st_mtime)


def _runs(runs_dir: Path) -> list[Path]:
  try:
    return [path.parent for path in runs_dir.glob(f"*/{CONFIG}")]
  except OSError:  # the name is too long, or the folder may not be read
    return []


def load_config_of(path: Path) -> ResolvedConfig:
  """The resolved config of a run directory.

  Raises `CheckpointError` if it is unreadable, not as it was written, or no model has it.
  """
  check_unchanged(path, CONFIG)
  try:
    cfg = from_json((path / CONFIG).read_text("utf-8"), str(path / CONFIG))
    check_model(cfg)
    return cfg.resolve()
  except OSError as e:
    raise CheckpointError(f"{path / CONFIG} cannot be read: {first_line(e)}") from e
  except (ValueError, ConfigError) as e:
    if is_a_hubs(path):
      raise CheckpointError(
        f"{path} is a checkpoint of others, not a run", f"flaxlm import {path} RUN"
      ) from e
    raise CheckpointError(f"{path / CONFIG} cannot be read: {e}") from e


def is_a_hubs(folder: Path) -> bool:
  """Whether the config.json of a folder is what a hub has."""
  try:
    config = json.loads((folder / CONFIG).read_bytes())
  except (OSError, ValueError, RecursionError):
    return False
  return isinstance(config, dict) and "model_type" in config


def read_imported(path: Path, kind: type) -> Any:
  """The value of type `kind`, list or dict, in a JSON file that came with an imported
  checkpoint. Raises `DataError`."""
  try:
    value = json.loads(path.read_text("utf-8"))
  except (OSError, ValueError, RecursionError) as e:
    why = first_line(e)
    raise DataError(f"{path} cannot be read: {why}", "import the checkpoint again") from e
  if not isinstance(value, kind):
    name = "a list" if kind is list else "an object"
    raise DataError(f"{path} cannot be read: it is not {name}")
  return value


def newest_whole_step(
  directory: Path, warn: Callable[[str], None] | None = None
) -> int | None:
  """The newest step that matches its manifest, or None if no step was ever saved.

  `directory` holds the checkpoints. `warn` gets a line for each damaged step that is
  skipped. Raises `CheckpointError` when steps were saved and all of them are damaged.
  """
  steps = saved_steps(directory)
  for step in reversed(steps):
    problems = damage(directory / str(step))
    if not problems:
      return step
    if warn is not None:
      warn(f"checkpoint {directory / str(step)} is damaged: {problems[0]}")
  if steps and steps != saved_steps(directory):  # a run that trains has replaced them
    return newest_whole_step(directory, warn)
  if steps:
    raise CheckpointError(
      f"every checkpoint below {directory} is damaged",
      "`flaxlm ckpt verify` lists the files; restore them, or start over with "
      "--checkpoint.resume=never",
    )
  return None


# -- Whether a run is whole ----------------------------------------------------------------


def describe_files(run_dir: Path) -> dict[str, Entry]:
  """The entries of the files that a run needs, besides its checkpoints and its metrics."""
  paths = (path for pattern in NEEDED for path in run_dir.glob(pattern))
  names = (str(p.relative_to(run_dir)) for p in paths if p.is_file())
  return {
    name: manifest.describe(run_dir / name)
    for name in sorted(names)
    if name != manifest.NAME
  }


def files_damage(run_dir: Path) -> list[str]:
  """The differences from the run's manifest, one line per file; checkpoints have their own.

  Of the metrics, which are appended, the lines that the manifest knows count.
  """
  try:
    entries = manifest.read_entries(run_dir)
  except ValueError as e:
    return [str(e)]
  present = describe_files(run_dir).keys()
  problems = [f"{name}: not in the manifest" for name in sorted(present - entries.keys())]
  for name, entry in sorted(entries.items()):
    problems += manifest.difference(run_dir, name, entry, grows=name == METRICS)
  return problems


def check_unchanged(run_dir: Path, *names: str) -> None:
  """Raises `CheckpointError` if one of these files is not as the run's manifest says.

  A run without a manifest passes, as older runs have none: `flaxlm ckpt verify` says so.
  """
  if not (run_dir / manifest.NAME).exists():
    return
  try:
    entries = manifest.read_entries(run_dir)
    known = {name: entries[name] for name in names if name in entries}
    problems = [
      problem
      for name, entry in known.items()
      for problem in manifest.difference(run_dir, name, entry)
    ]
  except ValueError as e:
    problems = [str(e)]
  if problems:
    own = run_dir / manifest.NAME
    raise CheckpointError(
      f"{run_dir} is not as it was written: {'; '.join(problems)}",
      f"restore the file; if you have changed it yourself, remove {own}",
    )


@contextlib.contextmanager
def new_files(run_dir: Path) -> Iterator[Path]:
  """A folder for new versions of the run's files: they take their places together, when the
  block ends, and with them a manifest of all files that the run needs.

  A full disk shows before anything has changed. A kill between two files leaves the run
  without a manifest, rather than with one that does not fit.
  """
  for left in run_dir.glob(f"{NEW}*"):  # by a kill
    shutil.rmtree(left, ignore_errors=True)
  with (
    writing(run_dir),
    tempfile.TemporaryDirectory(prefix=NEW, dir=run_dir) as temporary,
  ):
    folder = Path(temporary)
    yield folder
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    # By its origin a run is known as ours, whatever else a kill leaves out.
    names = sorted((str(p.relative_to(folder)) for p in files), key=lambda n: n != ORIGIN)
    written = {name: manifest.describe(folder / name) for name in names}
    try:
      others = manifest.read_entries(run_dir)
    except ValueError:
      others = describe_files(run_dir)
    manifest.write_entries(folder, others | written)
    for name in (*names, manifest.NAME):
      with (folder / name).open("rb") as file:
        os.fsync(file)
    (run_dir / manifest.NAME).unlink(missing_ok=True)
    for name in (*names, manifest.NAME):
      (run_dir / name).parent.mkdir(parents=True, exist_ok=True)
      (folder / name).replace(run_dir / name)


def lines_until(file: Path, last_step: int) -> bytes:
  """The lines of the run's metrics, or of its samples, up to a step: a resumed run writes
  the later ones again. A line that a kill has cut short is left out."""
  lines = lines_of(file)
  return b"".join(line for line, values in lines if values["step"] <= last_step)


def lines_of(file: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
  """Each whole line of the run's metrics, or of its samples, and what it says; its step is
  a number."""
  try:
    lines = file.read_bytes().splitlines(keepends=True)
  except FileNotFoundError:
    return
  for line in lines:
    with contextlib.suppress(ValueError):
      values = json.loads(line)
      is_whole = line.endswith(b"\n") and isinstance(values, dict)
      if is_whole and type(values.get("step")) in (int, float):
        yield line, values


# -- Training into a run directory ---------------------------------------------------------


@contextlib.contextmanager
def locked(run_dir: Path, process: int = 0) -> Iterator[None]:
  """Holds the run directory for this process of a job; makes it if it does not exist.

  Raises `CheckpointError` at once when another job is training into it.
  """
  try:
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = (run_dir / f".lock-{process}").open("w")
  except OSError as e:
    raise write_error(e, run_dir, "choose --runs-dir") from e
  with lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      raise CheckpointError(
        f"another process trains into {run_dir}",
        "wait for it, or choose another --name",
      ) from None
    yield


def find_resume_step(cfg: Config, warn: Callable[[str], None] | None = None) -> int:
  """The newest whole step of the run, or 0 for a run that starts from the beginning.

  `cfg.checkpoint.resume` decides: with `never` it is 0, and `must` raises
  `CheckpointError` when there is no checkpoint. Changes nothing on disk.
  """
  if cfg.checkpoint.resume == "never":
    return 0
  step = newest_whole_step(cfg.run_dir / CHECKPOINTS, warn)
  if step is None and cfg.checkpoint.resume == "must":
    raise CheckpointError(
      f"{cfg.run_dir} has no checkpoint to resume from",
      "check --name and --runs-dir, or use --checkpoint.resume=auto",
    )
  return step or 0


def check_is_ours(run_dir: Path) -> None:
  """Refuses, by `CheckpointError`, to begin a run where a checkpoint of others is.

  It may have been imported into `run_dir`, or may be what a hub has, which also has a
  config.json. Its config and tokenizer would be overwritten, its weights set aside.
  """
  is_imported = (run_dir / IMPORTED_FILES).exists() and not (run_dir / ORIGIN).exists()
  is_imported |= 0 in saved_steps(run_dir / CHECKPOINTS)  # no training saves step 0
  if is_a_hubs(run_dir) or is_imported:  # if it is damaged, starting over is the cure
    raise CheckpointError(
      f"{run_dir} holds a checkpoint that was not trained here, and training would begin "
      "in its place",
      "choose another --name; with --init RUN a run begins from the weights of another",
    )


def check_same_experiment(
  before: Config, cfg: Config, stored_corpus: str, corpus: str
) -> None:
  """Refuses, by `CheckpointError`, to resume a run with other data or another model.

  `before` is the config that the run directory holds; `stored_corpus` and `corpus` are
  the fingerprints of the text that it was trained on and of the text that is there now.
  """
  cure = "choose another --name, or start over with --checkpoint.resume=never"
  changed = [
    f"{name} was {old}, now {new}"
    for name, (old, new) in difference(before, cfg).items()
    if name.startswith(FIXED_FIELDS) and name not in FREE_FIELDS
  ]
  if changed:
    raise CheckpointError(
      f"{cfg.run_dir} is another experiment: {', '.join(changed)}", cure
    )
  if stored_corpus != corpus:
    text = f"the text of {cfg.data.corpus}"
    if cfg.data.objective == "reward":
      text += f", or the code of reward.function={cfg.reward.function},"
    raise CheckpointError(f"{text} is not what {cfg.run_dir} was trained on", cure)


def make_room_after(directory: Path, step: int) -> None:
  """Clears the way for saves after `step`, from which a run resumes; 0: it starts anew.

  Saves that were interrupted are deleted. Directories of later steps, which do not match
  their manifests or have lost them, are kept under another name, and so are all checkpoints
  of an earlier run.
  """
  if not step and saved_steps(directory):
    names = (f"{directory.name}.{n}" for n in itertools.count(1))
    rename_to_first_free(directory, names)
  for path in sorted(directory.iterdir()) if directory.is_dir() else []:
    number, being_written, _ = path.name.partition(".orbax-checkpoint-tmp")
    if being_written and number.isdecimal():
      shutil.rmtree(path)
    elif not manifest.is_step(path):
      continue
    elif manifest.is_interrupted(path):
      shutil.rmtree(path)
    elif int(path.name) > step:
      again = (f"damaged-{path.name}.{n}" for n in itertools.count(1))
      rename_to_first_free(path, itertools.chain([f"damaged-{path.name}"], again))
  for mark in directory.glob(manifest.mark_of(directory / "*").name):
    mark.unlink()


def rename_to_first_free(path: Path, names: Iterator[str]) -> None:
  """Renames `path`, beside where it is, to the first of `names` that is not taken."""
  free = (path.with_name(name) for name in names)
  path.rename(next(new for new in free if not new.exists()))
