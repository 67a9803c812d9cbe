# SPDX-License-Identifier: Apache-2.0
"""Saving and restoring trees of arrays with Orbax, one directory per step.

A step counts as saved only when its manifest lies beside it, and is restored only when
its bytes still match (`manifest.py`). This is the one module that knows Orbax.
"""

import contextlib
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
logging.getLogger("absl").setLevel(logging.CRITICAL)

ARRAYS = ("params", "opt_state")
PROGRESS = "progress"  # plain JSON: the step, and a fingerprint of the corpus


class CheckpointStore:
  """The checkpoints of one run, below `directory`."""

  def __init__(self, directory: Path, keep: int = 1):
    self.directory, self.keep = directory.absolute(), keep
    handlers: dict[str, Any] = {name: ocp.StandardCheckpointHandler() for name in ARRAYS}
    handlers[PROGRESS] = ocp.JsonCheckpointHandler()
    # Made in the background, a directory that cannot be made leaves threads that wait for
    # it for 300 s, and the process with them.
    now = ocp.options.AsyncOptions(create_directories_asynchronously=False)
    options = ocp.CheckpointManagerOptions(create=True, async_options=now)
    self._manager = ocp.CheckpointManager(
      self.directory, item_handlers=handlers, options=options
    )
    self._finisher: threading.Thread | None = None
    self._failure: Exception | None = None

  def save(self, step: int, params: Any, opt_state: Any, progress: dict) -> None:
    """Copies the arrays off the devices, then writes in the background.

    Without `opt_state` (None) the step can be decoded from, not trained on.
    Raises `CheckpointError` if this or the previous save failed.
    """
    self.wait()
    arrays = {"params": params} | ({} if opt_state is None else {"opt_state": opt_state})
    items = {name: ocp.args.StandardSave(tree) for name, tree in arrays.items()}
    arguments = ocp.args.Composite(**items, progress=ocp.args.JsonSave(progress))
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
      with contextlib.suppress(Exception):  # a failed write, of which `wait` has told
        self._manager.close()

  def reload(self) -> None:
    """Reads from disk again which steps exist, after others have moved some of them."""
    self._manager.reload()

  def _finish(self, step: int) -> None:
    # Orbax reports a failed write only to those who wait.
    try:
      self._manager.wait_until_finished()
      if jax.process_index() == 0:
        manifest.write_manifest(self.directory / str(step))
        # Orbax would delete before the manifest says that the new step is whole.
        for old in manifest.saved_steps(self.directory)[: -self.keep]:
          shutil.rmtree(self.directory / str(old))
    except Exception as e:  # kept for the thread that trains
      self._failure = self._unwritable(step, e)

  def _unwritable(self, step: int, e: Exception) -> CheckpointError:
    first_line = next(iter(str(e).splitlines()), type(e).__name__)
    return CheckpointError(
      f"step {step} could not be saved below {self.directory}: {first_line}",
      "check free space and permissions, or choose another --runs-dir",
    )

  def restore_progress(self, step: int) -> dict:
    """The JSON item of one step. Raises `CheckpointError` when there is none."""
    arguments = ocp.args.Composite(progress=ocp.args.JsonRestore())
    try:
      return self._manager.restore(step, args=arguments)[PROGRESS]
    except (ValueError, KeyError, OSError) as e:
      raise CheckpointError(f"{self.directory}/{step} cannot be read: {e}") from e

  def restore(self, step: int, **targets: Any) -> dict[str, Any]:
    """The items named in `targets`, each shaped, typed and sharded like its target.

    Raises `CheckpointError` when the stored trees have other names or shapes.
    """
    standard = ocp.args.StandardRestore
    items = {name: standard(target) for name, target in targets.items()}
    try:
      stored = self._manager.item_metadata(step)
      for name, target in targets.items():  # Orbax finds out while it reads, with a dump
        misfits = differences(shapes(stored[name]), shapes(target))
        if misfits:
          raise ValueError(f"{name}: {'; '.join(misfits)}")
      return dict(self._manager.restore(step, args=ocp.args.Composite(**items)))
    except (ValueError, KeyError, OSError) as e:
      first_line = next(iter(str(e).splitlines()), type(e).__name__)
      raise CheckpointError(
        f"{self.directory}/{step} does not fit this model: {first_line}",
        "the checkpoint was made by another config",
      ) from e


def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  """{path: shape} of every array, the same for a state and for what Orbax says of it."""
  part = lambda key: str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", ""))))
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {"/".join(map(part, path)): tuple(leaf.shape) for path, leaf in leaves}


def differences(stored: dict[str, Any], wanted: dict[str, Any], most: int = 5) -> list[str]:
  """What differs between two results of `shapes`, at most so many lines, and a count."""
  lines = []
  for name in sorted(stored.keys() | wanted.keys()):
    if name not in stored:
      lines.append(f"{name} is not stored")
    elif name not in wanted:
      lines.append(f"{name} is stored, but not in the model")
    elif stored[name] != wanted[name]:
      lines.append(f"{name} is {stored[name]}, not {wanted[name]}")
  return lines[:most] + ([f"{len(lines) - most} more"] if len(lines) > most else [])
