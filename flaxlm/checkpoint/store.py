# SPDX-License-Identifier: Apache-2.0
"""Saving and restoring trees of arrays with Orbax, one directory per step.

A step counts as saved only when it has a manifest, and is restored only when its bytes
still match that manifest (`manifest.py`). This is the only module that uses Orbax.
"""

import contextlib
import logging
import os
import shutil
import sys
import threading
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from flaxlm.checkpoint import manifest
from flaxlm.errors import CheckpointError, first_line, writing

# Orbax logs every save, warns of restores that we intend, and logs the stack of an error
# that it also raises. No level would do: TensorFlow Datasets sets it again.
logging.getLogger("absl").addFilter(lambda record: record.levelno >= logging.CRITICAL)


def _is_ours(record: logging.LogRecord) -> bool:
  """False for what asyncio prints of errors of Orbax's tasks beside the one that Orbax has
  raised, and of futures that TensorStore's threads ended (with no Python frame at all)."""
  error = record.exc_info[1] if record.exc_info else None
  if error is None:
    return True
  frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
  return bool(frames) and not any("orbax" in frame.f_code.co_filename for frame in frames)


logging.getLogger("asyncio").addFilter(_is_ours)


def _hide_closed_loops() -> None:
  """Where one write of a save fails, Orbax closes the loop that all share. TensorStore's
  threads then report the others to it, and print each with its stack through
  `sys.unraisablehook`; Python warns of those that had not begun."""
  warnings.filterwarnings("ignore", "coroutine 'async_serialize", RuntimeWarning)
  shown = sys.unraisablehook
  if getattr(shown, "hides_closed_loops", False):
    return

  def hook(unraisable: Any) -> None:
    error = unraisable.exc_value
    if not (type(error) is RuntimeError and str(error) == "Event loop is closed"):
      shown(unraisable)

  hook.hides_closed_loops = True  # type: ignore[attr-defined]
  sys.unraisablehook = hook


ARRAYS = ("params", "opt_state")
PROGRESS = "progress"  # plain JSON: the step, and a fingerprint of the corpus


class CheckpointStore:
  """The checkpoints of one run, below `directory`; the newest `keep` of them stay."""

  def __init__(self, directory: Path, keep: int = 1):
    self.directory, self.keep = directory.absolute(), keep
    handlers: dict[str, Any] = {name: ocp.StandardCheckpointHandler() for name in ARRAYS}
    handlers[PROGRESS] = ocp.JsonCheckpointHandler()
    # If Orbax created directories in the background, a failure would leave threads that
    # wait 300 s for the directory, and the process would wait for the threads.
    now = ocp.options.AsyncOptions(create_directories_asynchronously=False)
    options = ocp.CheckpointManagerOptions(create=True, async_options=now)
    with writing(self.directory):
      self._manager = ocp.CheckpointManager(
        self.directory, item_handlers=handlers, options=options
      )
    self._finisher: threading.Thread | None = None
    self._failure: Exception | None = None

  def save(self, step: int, params: Any, opt_state: Any, progress: dict) -> None:
    """Copies the arrays off the devices, then writes in the background.

    A step without `opt_state` (None) can be decoded from, but training cannot resume from
    it. Raises `CheckpointError` if this or the previous save failed.
    """
    self.wait()
    _hide_closed_loops()
    arrays = {"params": params} | ({} if opt_state is None else {"opt_state": opt_state})
    items = {name: ocp.args.StandardSave(tree) for name, tree in arrays.items()}
    arguments = ocp.args.Composite(**items, progress=ocp.args.JsonSave(progress))
    try:
      self._mark(step)
      if not self._manager.save(step, args=arguments):
        self._unmark(step)
        raise CheckpointError(f"{self.directory}: step {step} is there already")
    except (OSError, ValueError) as e:
      raise self._failed(step, e) from e
    self._finisher = threading.Thread(target=self._finish, args=(step,), name="checkpoint")
    self._finisher.start()

  def wait(self) -> None:
    """Waits until the last save is complete. Raises `CheckpointError` if it failed."""
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
      with contextlib.suppress(Exception):  # `wait` has reported a failed write
        self._manager.close()

  def reload(self) -> None:
    """Reads from disk again which steps exist, after some of them were moved."""
    self._manager.reload()

  def _mark(self, step: int) -> None:
    """Says, until `_unmark`, that what there is of the step is not complete."""
    if jax.process_index() == 0:
      manifest.mark_of(self.directory / str(step)).touch()

  def _unmark(self, step: int) -> None:
    if jax.process_index() == 0:
      manifest.mark_of(self.directory / str(step)).unlink(missing_ok=True)

  def _finish(self, step: int) -> None:
    # Orbax reports a failed write only to a caller that waits.
    try:
      self._manager.wait_until_finished()
      if jax.process_index() == 0:
        manifest.write_manifest(self.directory / str(step))
        self._unmark(step)
        # Orbax itself would delete old steps before the new one has its manifest.
        finished = [
          directory
          for step in manifest.saved_steps(self.directory)
          if manifest.is_finished(directory := self.directory / str(step))
        ]
        for old in finished[: -self.keep]:
          shutil.rmtree(old)
    except Exception as e:  # kept for the thread that trains
      self._failure = self._failed(step, e)

  def _failed(self, step: int, e: Exception) -> CheckpointError:
    """The error of a save, once the writes beside the one that failed have ended."""
    settle(self.directory)
    return CheckpointError(
      f"step {step} could not be saved below {self.directory}: {first_line(e)}",
      "check free space and permissions, or choose another --runs-dir",
    )

  def restore_progress(self, step: int) -> dict:
    """The JSON item of one step. Raises `CheckpointError` when there is none."""
    arguments = ocp.args.Composite(progress=ocp.args.JsonRestore())
    try:
      return self._manager.restore(step, args=arguments)[PROGRESS]
    except (ValueError, KeyError, OSError) as e:
      raise CheckpointError(
        f"{self.directory}/{step} cannot be read: {first_line(e)}"
      ) from e

  def restore(self, step: int, **targets: Any) -> dict[str, Any]:
    """The items named in `targets`, each shaped, typed and sharded like its target.

    Raises `CheckpointError` when the stored trees have other names or shapes.
    """
    standard = ocp.args.StandardRestore
    items = {name: standard(target) for name, target in targets.items()}
    try:
      stored = self._manager.item_metadata(step)
      # Orbax would notice only while it reads, and print the whole tree.
      for name, target in targets.items():
        misfits = differences(shapes(stored[name]), shapes(target))
        if misfits:
          raise ValueError(f"{name}: {'; '.join(misfits)}")
      return dict(self._manager.restore(step, args=ocp.args.Composite(**items)))
    except (ValueError, KeyError, OSError) as e:
      raise CheckpointError(
        f"{self.directory}/{step} does not fit this model: {first_line(e)}",
        "the checkpoint was made by another config",
      ) from e


def settle(directory: Path, quiet: float = 0.3, most: float = 10.0) -> None:
  """Waits until no file below the directory has come or gone for `quiet` seconds; for
  `most` seconds at most.

  Where one write of a save fails, Orbax leaves the others to TensorStore's threads. They
  would make folders again that their owner has removed in the meantime.
  """
  end = time.monotonic() + most
  before, since = None, 0.0
  while (now := time.monotonic()) < end:
    files = [(folder, sorted(names)) for folder, _, names in os.walk(directory)]
    if files != before:
      before, since = files, now
    elif now - since > quiet:
      return
    time.sleep(0.02)


def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  """{path: shape} of every array, of a state or of Orbax's metadata of it alike."""
  part = lambda key: str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", ""))))
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {"/".join(map(part, path)): tuple(leaf.shape) for path, leaf in leaves}


def differences(stored: dict[str, Any], wanted: dict[str, Any], most: int = 5) -> list[str]:
  """The differences between two results of `shapes`: at most `most` lines, and a count of
  the others."""
  lines = []
  for name in sorted(stored.keys() | wanted.keys()):
    if name not in stored:
      lines.append(f"{name} is not stored")
    elif name not in wanted:
      lines.append(f"{name} is stored, but not in the model")
    elif stored[name] != wanted[name]:
      lines.append(f"{name} is {stored[name]}, not {wanted[name]}")
  return lines[:most] + ([f"{len(lines) - most} more"] if len(lines) > most else [])
