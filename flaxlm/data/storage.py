# SPDX-License-Identifier: Apache-2.0
"""The folder where prepared data are kept: for one process at a time, and whole or not."""

import contextlib
import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from flaxlm.data.corpus import Log
from flaxlm.errors import DataError, first_line


def to_stderr(line: str) -> None:
  print(line, file=sys.stderr)


def data_dir() -> Path:
  """Where prepared data are kept. It may be deleted: data are then prepared again.

  A variable that is set but empty counts as one that is not set, as in the XDG rules.
  """
  if named := os.environ.get("FLAXLM_DATA_DIR"):
    return Path(named)
  if cache := os.environ.get("XDG_CACHE_HOME"):
    return Path(cache) / "flaxlm"
  try:
    return Path.home() / ".cache" / "flaxlm"
  except RuntimeError as e:  # as in a container whose user has no name
    raise DataError(
      f"there is no folder for data: {first_line(e)}", "set FLAXLM_DATA_DIR"
    ) from e


@contextlib.contextmanager
def locked(root: Path, log: Log) -> Iterator[None]:
  """Lets one process at a time work in `root`; the system frees the lock of a dead process.

  Raises `DataError` for every `OSError`, also in the body: then `root` cannot be written.
  """
  try:
    root.mkdir(parents=True, exist_ok=True)
    with (root / "lock").open("w") as file:
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        log(f"another process is preparing data in {root}; waiting for it")
        fcntl.flock(file, fcntl.LOCK_EX)
      yield
  except OSError as e:
    raise DataError(
      f"cannot prepare data in {root}: {first_line(e)}",
      "free some space, or set FLAXLM_DATA_DIR to another folder",
    ) from e


@contextlib.contextmanager
def new_folder(folder: Path, resumed: bool = False) -> Iterator[Path]:
  """A folder that gets its name once it is complete, and then replaces a damaged one.

  If it is `resumed`, what an interrupted or killed process left is in it.
  """
  partial = folder.with_suffix(".partial")  # no other process writes to it: see `locked`
  if not resumed:
    shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True, exist_ok=True)
  try:
    yield partial
  except BaseException as e:
    if not resumed or isinstance(e, Exception):
      shutil.rmtree(partial, ignore_errors=True)  # the disk may be full of it
    raise
  shutil.rmtree(folder, ignore_errors=True)
  partial.rename(folder)
