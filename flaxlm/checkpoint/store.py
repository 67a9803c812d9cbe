# SPDX-License-Identifier: Apache-2.0
"""Saving and restoring trees of arrays with Orbax, one directory per step.

A step counts as saved only when its manifest lies beside it, and is restored only when
its bytes still match (`manifest.py`). This is the one module that knows Orbax.
"""

import logging
import shutil
import threading
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from flaxlm.checkpoint import manifest
from flaxlm.errors import CheckpointError

# Orbax reports every save at this level, and restores that we mean with a warning.
logging.getLogger("absl").setLevel(logging.ERROR)

ARRAYS = ("params", "opt_state")
PROGRESS = "progress"  # plain JSON: the step, and a fingerprint of the corpus


class CheckpointStore:
  """The checkpoints of one run, below `directory`."""

  def __init__(self, directory: Path, keep: int = 1):
    self.directory = directory.absolute()
    handlers: dict[str, Any] = {name: ocp.StandardCheckpointHandler() for name in ARRAYS}
    handlers[PROGRESS] = ocp.JsonCheckpointHandler()
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    self._manager = ocp.CheckpointManager(
      self.directory, item_handlers=handlers, options=options
    )
    self._finisher: threading.Thread | None = None
    self._failure: Exception | None = None

  def save(self, step: int, params: Any, opt_state: Any, progress: dict) -> None:
    """Copies the arrays off the devices, then writes in the background.

    Raises `CheckpointError` if this or the previous save failed.
    """
    self.wait()
    standard = ocp.args.StandardSave
    arguments = ocp.args.Composite(
      params=standard(params),
      opt_state=standard(opt_state),
      progress=ocp.args.JsonSave(progress),
    )
    try:
      if not self._manager.save(step, args=arguments):
        raise CheckpointError(f"{self.directory}: step {step} is there already")
    except (OSError, ValueError) as e:
      raise self._unwritable(step, e) from e
    self._finisher = threading.Thread(target=self._finish, args=(step,), name="checkpoint")
    self._finisher.start()

  def wait(self) -> None:
    """Returns when the last save is whole on disk. Raises `CheckpointError`."""
    if self._finisher is not None:
      self._finisher.join()
      self._finisher = None
    if self._failure is not None:
      failure, self._failure = self._failure, None
      raise failure

  def close(self) -> None:
    try:
      self.wait()
    finally:
      self._manager.close()

  def _finish(self, step: int) -> None:
    # Orbax reports a failed write only to those who wait.
    try:
      self._manager.wait_until_finished()
      if jax.process_index() == 0:
        manifest.write_manifest(self.directory / str(step))
    except Exception as e:  # kept for the thread that trains
      self._failure = self._unwritable(step, e)

  def _unwritable(self, step: int, e: Exception) -> CheckpointError:
    first_line = next(iter(str(e).splitlines()), type(e).__name__)
    return CheckpointError(
      f"step {step} could not be saved below {self.directory}: {first_line}",
      "check free space and permissions, or choose another --runs_dir",
    )

  def restore_progress(self, step: int) -> dict:
    """The JSON item of one step."""
    arguments = ocp.args.Composite(progress=ocp.args.JsonRestore())
    return self._manager.restore(step, args=arguments)[PROGRESS]

  def restore(self, step: int, **targets: Any) -> dict[str, Any]:
    """The items named in `targets`, each shaped, typed and sharded like its target.

    Raises `CheckpointError` when the stored trees have other names or shapes.
    """
    standard = ocp.args.StandardRestore
    items = {name: standard(target) for name, target in targets.items()}
    try:
      return dict(self._manager.restore(step, args=ocp.args.Composite(**items)))
    except (ValueError, KeyError, OSError) as e:
      first_line = next(iter(str(e).splitlines()), type(e).__name__)
      raise CheckpointError(
        f"{self.directory}/{step} does not fit this model: {first_line}",
        "the checkpoint was made by another config",
      ) from e


def make_room_after(directory: Path, step: int) -> None:
  """Clears the way for new saves after `step`, from which a run goes on.

  Saves that were cut off are deleted; whole directories of later steps, which did not
  verify, are kept under another name.
  """
  for path in sorted(directory.iterdir()) if directory.is_dir() else []:
    name = path.name.split(".")[0]
    if not name.isdecimal():
      continue
    if not manifest.is_finished(path):
      shutil.rmtree(path)
    elif int(name) > step:
      path.rename(path.with_name(f"damaged-{name}"))
