# SPDX-License-Identifier: Apache-2.0
"""What a run directory is: its files, how a run is found and locked, where it resumes.

Nothing here needs a device or a model; `decoding.loading` makes a model of a run.
"""

import contextlib
import fcntl
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from flaxlm.checkpoint.manifest import damage, is_finished, saved_steps
from flaxlm.config import Config, ResolvedConfig, difference, from_json
from flaxlm.errors import CheckpointError, ConfigError

CONFIG, TOKENIZER, CHECKPOINTS = "config.json", "tokenizer.json", "checkpoints"
METRICS, LOG, SAMPLE = "metrics.jsonl", "log.txt", "sample.txt"
IMPORTED_FILES = "huggingface"  # the files that came with an imported checkpoint

# A run resumes only with the data and the parameters that it began with.
FIXED_FIELDS = ("model.", "tokenizer.", "data.", "seed", "optimizer.kind")
# `model.num_ids` is free because older runs did not record which rows are padding.
FREE_FIELDS = ("data.num_epochs", "model.dropout", "model.num_ids")


def find_run(path: str | None, runs_dir: str = "runs") -> Path:
  """The run directory `path`, or the run under `runs_dir` with the newest checkpoint.

  Raises `CheckpointError`, which lists the runs that exist, when there is no such run.
  """
  if path is not None:
    for candidate in (Path(path), Path(runs_dir) / path):
      if (candidate / CONFIG).is_file():
        return candidate
    names = ", ".join(sorted(run.name for run in _runs(Path(runs_dir)))) or "none"
    raise CheckpointError(f"{path} is not a run directory", f"runs here: {names}")
  runs = [run for run in _runs(Path(runs_dir)) if saved_steps(run / CHECKPOINTS)]
  if not runs:
    raise CheckpointError(f"no trained run below {runs_dir}/", "python train.py makes one")
  return max(runs, key=lambda run: (run / CHECKPOINTS).stat().st_mtime)


def _runs(runs_dir: Path) -> list[Path]:
  return [path.parent for path in runs_dir.glob(f"*/{CONFIG}")]


def load_config_of(path: Path) -> ResolvedConfig:
  """The resolved config of a run directory; `CheckpointError` if it is unreadable."""
  try:
    return from_json((path / CONFIG).read_text("utf-8"), str(path / CONFIG)).resolve()
  except (OSError, ValueError, ConfigError) as e:
    raise CheckpointError(f"{path / CONFIG} cannot be read: {e}") from e


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
  if steps:
    raise CheckpointError(
      f"every checkpoint below {directory} is damaged",
      "`flaxlm ckpt verify` lists the files; restore them, or start over with "
      "--checkpoint.resume=never",
    )
  return None


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
    raise CheckpointError(f"{run_dir} cannot be written: {e}", "choose --runs-dir") from e
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
  try:
    config = json.loads((run_dir / CONFIG).read_bytes())
  except (OSError, ValueError, RecursionError):
    config = None  # missing, or damaged: then starting over is the cure
  is_a_hubs = isinstance(config, dict) and "model_type" in config
  if is_a_hubs or (run_dir / IMPORTED_FILES).exists():
    raise CheckpointError(
      f"{run_dir} holds a checkpoint that was not trained here, and training would begin "
      "from random weights in its place",
      "choose another --name; training from its weights (--init) is not there yet",
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
    raise CheckpointError(
      f"the text of {cfg.data.corpus} is not what {cfg.run_dir} was trained on", cure
    )


def make_room_after(directory: Path, step: int) -> None:
  """Clears the way for saves after `step`, from which a run resumes; 0: it starts anew.

  Saves that were interrupted are deleted. Complete directories of later steps, which
  did not match their manifests, are kept under another name, and so are all checkpoints
  of an earlier run.
  """
  if not step and saved_steps(directory):
    names = (f"{directory.name}.{n}" for n in itertools.count(1))
    rename_to_first_free(directory, names)
  for path in sorted(directory.iterdir()) if directory.is_dir() else []:
    name = path.name.split(".")[0]
    if not name.isdecimal() or not path.is_dir():
      continue
    if not is_finished(path):
      shutil.rmtree(path)
    elif int(name) > step:
      again = (f"damaged-{name}.{n}" for n in itertools.count(1))
      rename_to_first_free(path, itertools.chain([f"damaged-{name}"], again))


def rename_to_first_free(path: Path, names: Iterator[str]) -> None:
  """Renames `path`, beside where it is, to the first of `names` that is not taken."""
  free = (path.with_name(name) for name in names)
  path.rename(next(new for new in free if not new.exists()))
