# SPDX-License-Identifier: Apache-2.0
"""What a run begins from: the parameters, architecture and tokenizer of another run.

The other run is its *origin*. It may be one that was trained or imported. What a run began
from is in its directory, in `ORIGIN`, so that it resumes without its origin.
"""

import dataclasses
import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from flaxlm.chat.templates import CHAT
from flaxlm.checkpoint import manifest
from flaxlm.config import (
  Config,
  ModelConfig,
  ResolvedModel,
  TokenizerConfig,
  check_types,
  difference,
  flag,
)
from flaxlm.errors import CheckpointError, ConfigError, first_line
from flaxlm.runs import (
  CHECKPOINTS,
  FREE_FIELDS,
  IMPORTED_FILES,
  ORIGIN,
  TOKENIZER,
  check_unchanged,
  find_run,
  load_config_of,
  newest_whole_step,
)
from flaxlm.tokenizers.imported import SPECIALS

# Why a run cannot do without its origin.
HAS_ADAPTERS, COMPARES = "has adapters of", "compares its preferences with"


class Origin(NamedTuple):
  """A checkpoint that a run began from."""

  path: Path  # of its run, absolute
  step: int
  digest: str  # SHA-256 of the checkpoint's manifest, in hex

  def __str__(self) -> str:
    return f"{self.path} at step {self.step} (SHA-256 {self.digest[:12]}...)"


def adopt(cfg: Config, given: Collection[str] = ()) -> Config:
  """`cfg` with the architecture and the tokenizer of the run that it begins from.

  They are those of `cfg.init`; for a run that resumes, its own. Without either, `cfg` is
  returned as it is. What `cfg` itself says of them, where it differs from the defaults or
  is `given` by name, has to agree; only `model.dropout` may differ. Raises `ConfigError`,
  which names the field, and `CheckpointError`.
  """
  check_types(cfg)
  if cfg.name is None:
    return cfg
  if resumes(cfg):
    source = cfg.run_dir
    before = load_config_of(source)
    check_same_origin(cfg, read_origin(source))
    cfg = dataclasses.replace(cfg, init=before.init)
  elif cfg.init is not None:
    source = find_run(cfg.init, cfg.runs_dir)
    if same_path(source, cfg.run_dir):
      raise ConfigError(f"init={cfg.init} is the run that is trained", "choose a --name")
    before = load_config_of(source)
  elif cfg.init_optimizer:
    raise ConfigError("init_optimizer needs a run to take it from", "add --init RUN")
  else:
    return cfg
  check_agrees(cfg, before, source, given)
  dropout = cfg.model.dropout
  if dropout == ModelConfig().dropout:
    dropout = before.model.dropout
  model = dataclasses.replace(before.model, dropout=dropout)
  return dataclasses.replace(cfg, model=model, tokenizer=before.tokenizer)


def resumes(cfg: Config) -> bool:
  """Whether `cfg` goes on with a run that began from another."""
  if cfg.checkpoint.resume == "never" or read_origin(cfg.run_dir) is None:
    return False
  return any(manifest.saved_steps(cfg.run_dir / CHECKPOINTS))  # step 0 is an import's


def check_same_origin(cfg: Config, own: Origin | None) -> None:
  """Refuses, by `CheckpointError`, to resume a run that began from another than `init`."""
  if cfg.init is None or own is None:
    return
  named = (Path(cfg.init), Path(cfg.runs_dir) / cfg.init)
  if not any(same_path(path, own.path) for path in named):
    raise CheckpointError(
      f"{cfg.run_dir} began from {own.path}, not from {cfg.init}",
      "choose another --name, or start over with --checkpoint.resume=never",
    )


def check_agrees(
  cfg: Config, before: Config, source: Path, given: Collection[str] = ()
) -> None:
  """Raises `ConfigError` for what `cfg` says of model or tokenizer and `source` has not."""
  for section in ("model", "tokenizer"):
    own = getattr(cfg, section)
    defaults = {"model": ModelConfig(), "tokenizer": TokenizerConfig()}[section]
    prefix = f"{section}."
    said = difference(defaults, own, prefix)
    known = isinstance(own, ResolvedModel)  # then what is the default was said as well
    for name, (has, wants) in difference(getattr(before, section), own, prefix).items():
      if (known or name in said or name in given) and name not in FREE_FIELDS:
        raise ConfigError(
          f"{name}={wants}, but {source}, from which the run begins, has {has}",
          f"leave {flag(name)} out",
        )


def find_origin(cfg: Config) -> Origin:
  """The checkpoint that `cfg.init` names: the newest whole one of that run.

  Raises `CheckpointError` if there is none, or its tokenizer is not as it was written.
  """
  assert cfg.init is not None
  path = find_run(cfg.init, cfg.runs_dir)
  step = newest_whole_step(path / CHECKPOINTS)
  if step is None:
    raise CheckpointError(f"{path} has no checkpoint to begin from", "train it first")
  check_unchanged(path, TOKENIZER, SPECIALS)
  return checkpoint_of(path, step)


def checkpoint_of(path: Path, step: int) -> Origin:
  """A whole checkpoint of a run."""
  own = path / CHECKPOINTS / str(step) / manifest.NAME
  return Origin(path.resolve(), step, manifest.digest(own))


def located(run_dir: Path, why: str = HAS_ADAPTERS) -> Origin:
  """What a run began from that cannot do without, where it is now: at the path of the
  record or, if the two have moved together, beside `run_dir`.

  Raises `CheckpointError` if it is gone, or not what it was; `why` it is needed is said.
  """
  origin = read_origin(run_dir)
  if origin is None:
    raise CheckpointError(f"{run_dir} {why} a run, and has no {ORIGIN}", "restore the file")
  problem = "it is gone"
  for path in (origin.path, run_dir.resolve().parent / origin.path.name):
    directory = path / CHECKPOINTS / str(origin.step)
    if not manifest.is_finished(directory):
      continue
    if manifest.digest(directory / manifest.NAME) != origin.digest:
      problem = "another checkpoint is there"
    elif problems := manifest.damage(directory):
      problem = f"it is damaged: {problems[0]}"
    else:
      return origin._replace(path=path)
  raise CheckpointError(
    f"{run_dir} {why} {origin}, and {problem}",
    f"restore that run there or beside {run_dir}",
  )


def read_origin(run_dir: Path) -> Origin | None:
  """What a run began from; None for one that began at random.

  Raises `CheckpointError` for a record that is not as it was written.
  """
  path = run_dir / ORIGIN
  if not path.is_file():
    return None
  check_unchanged(run_dir, ORIGIN)
  try:
    values = json.loads(path.read_text("utf-8"))
    step = values["step"]
    if type(step) is not int:
      raise TypeError("step is not a number")
    return Origin(Path(values["path"]), step, str(values["digest"]))
  except (OSError, ValueError, TypeError, KeyError, RecursionError) as e:
    raise CheckpointError(f"{path} cannot be read: {first_line(e)}") from e


def write_origin(folder: Path, origin: Origin) -> None:
  """Writes the record, and copies what an import brought along, and the chat template if
  `folder`, the run's, has none yet."""
  values: dict[str, Any] = origin._asdict() | {"path": str(origin.path)}
  (folder / ORIGIN).write_text(
    json.dumps(values, indent=2, allow_nan=False) + "\n", "utf-8"
  )
  brought = origin.path / IMPORTED_FILES
  if brought.is_dir():
    shutil.copytree(brought, folder / IMPORTED_FILES)
  if (origin.path / CHAT).is_file() and not (folder / CHAT).exists():
    shutil.copyfile(origin.path / CHAT, folder / CHAT)


def forget(run_dir: Path) -> None:
  """Deletes what an earlier run has left that began from another: a run begins anew."""
  if (run_dir / ORIGIN).exists():  # the last to go: without it the files are an import's
    shutil.rmtree(run_dir / IMPORTED_FILES, ignore_errors=True)
  for name in (manifest.NAME, SPECIALS, CHAT, ORIGIN):
    (run_dir / name).unlink(missing_ok=True)


def same_path(one: Path, other: Path) -> bool:
  return one.resolve() == other.resolve()
