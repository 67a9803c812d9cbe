# SPDX-License-Identifier: Apache-2.0
"""A directory's manifest: the size and SHA-256 of each file that is needed of it.

Orbax keeps no checksum of the arrays' bytes: of 208 bits that were flipped, 185 were
restored wrong without an error. A step's manifest is written last, so a step without one
was either interrupted or has lost it. A mark beside the step, which is there while the step
is being saved, tells which: only what was interrupted may be deleted.
"""

import hashlib
import json
import operator
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from flaxlm.strict_json import to_json

NAME = "MANIFEST.json"
_CHUNK = 2**20


class Entry(NamedTuple):
  """What a manifest says of a file, or of its first `size` bytes."""

  size: int  # in bytes
  sha256: str  # in hex


def write_manifest(step_dir: Path) -> None:
  """Hashes every file below `step_dir` and writes the manifest, atomically."""
  names = {str(path.relative_to(step_dir)): path for path in _files(step_dir)}
  write_entries(step_dir, {name: describe(path) for name, path in names.items()})


def damage(step_dir: Path) -> list[str]:
  """The differences from the manifest, one line per file; empty if the step is whole."""
  try:
    entries = read_entries(step_dir)
  except ValueError as e:
    return [str(e)]
  present = {str(path.relative_to(step_dir)) for path in _files(step_dir)}
  problems = [f"{name}: not in the manifest" for name in sorted(present - entries.keys())]
  for name, entry in sorted(entries.items()):
    problems += difference(step_dir, name, entry)
  return problems


def is_finished(step_dir: Path) -> bool:
  """Whether the step has a manifest. It may have been damaged since."""
  return (step_dir / NAME).is_file()


def is_interrupted(step_dir: Path) -> bool:
  """Whether the save of this step was begun and not completed: nothing depends on it."""
  if is_finished(step_dir):
    return False
  return mark_of(step_dir).exists() or not any(step_dir.iterdir())


def mark_of(step_dir: Path) -> Path:
  """The file that is there while the step is being saved."""
  return step_dir.with_name(f".saving-{step_dir.name}")


def saved_steps(directory: Path) -> list[int]:
  """The steps whose save was not interrupted, oldest first. Some may be damaged, as one is
  that has lost its manifest."""
  if not directory.is_dir():
    return []
  steps = (path for path in directory.iterdir() if is_step(path))
  return sorted(int(path.name) for path in steps if not is_interrupted(path))


def is_step(path: Path) -> bool:
  """Whether a path is named as the directory of a step is, and is one."""
  return re.fullmatch("0|[1-9][0-9]*", path.name) is not None and path.is_dir()


# -- Entries -------------------------------------------------------------------------------


def write_entries(directory: Path, entries: Mapping[str, Entry]) -> None:
  """Writes a manifest with these entries, by their paths below the directory."""
  files = {name: {"bytes": e.size, "sha256": e.sha256} for name, e in entries.items()}
  write_atomically(directory / NAME, to_json({"files": files}, indent=1) + "\n")


def read_entries(directory: Path) -> dict[str, Entry]:
  """What the manifest of a directory says. Raises `ValueError` if it cannot be read."""
  try:
    files = json.loads((directory / NAME).read_text("utf-8"))["files"]
    return {
      name: Entry(operator.index(file["bytes"]), str(file["sha256"]))
      for name, file in files.items()
    }
  except FileNotFoundError:
    raise ValueError(f"{NAME}: missing") from None
  except OSError as e:
    raise ValueError(f"{NAME}: {e.strerror}") from e
  except (ValueError, KeyError, TypeError, AttributeError) as e:
    raise ValueError(f"{NAME}: {type(e).__name__}: {e}") from e


def describe(path: Path) -> Entry:
  return Entry(path.stat().st_size, digest(path))


def difference(directory: Path, name: str, entry: Entry, grows: bool = False) -> list[str]:
  """A line that says how a file differs from its entry, or none.

  Of a file that grows only the bytes that the manifest knows count.
  """
  path = directory / name
  try:
    size = path.stat().st_size
    if size < entry.size or (size > entry.size and not grows):
      return [f"{name}: {size} bytes, not {entry.size}"]
    if digest(path, entry.size) != entry.sha256:
      return [f"{name}: damaged (SHA-256 differs)"]
  except FileNotFoundError:
    return [f"{name}: missing"]
  except OSError as e:
    return [f"{name}: {e.strerror}"]
  return []


def digest(path: Path, size: int | None = None) -> str:
  """SHA-256, in hex, of a file's first `size` bytes, or of all of them."""
  with path.open("rb") as file:
    if size is None:
      return hashlib.file_digest(file, "sha256").hexdigest()
    sha256 = hashlib.sha256()
    while size and (chunk := file.read(min(size, _CHUNK))):
      sha256.update(chunk)
      size -= len(chunk)
    return sha256.hexdigest()


def write_atomically(path: Path, text: str) -> None:
  """Replaces `path` by a file with this text. A reader sees the old file or the new one."""
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    with temporary.open("w", encoding="utf-8") as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    temporary.replace(path)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise


def _files(step_dir: Path) -> list[Path]:
  # Unlike `rglob`, it passes over folders that are deleted meanwhile.
  paths = (Path(folder, name) for folder, _, names in os.walk(step_dir) for name in names)
  return sorted(p for p in paths if p.is_file() and p != step_dir / NAME)
