# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of others that are used as they are: each is imported once, out of sight."""

import hashlib
from pathlib import Path

from jax.sharding import Mesh

from flaxlm.data.storage import data_dir, locked, to_stderr
from flaxlm.interop.transfer import import_run
from flaxlm.runs import CONFIG


def import_once(source: Path, mesh: Mesh) -> tuple[Path, list[str]]:
  """The run directory of a checkpoint, a folder or a GGUF file, and notes for the user.

  It is below the data directory, and is made anew when a file of the checkpoint has another
  size or time. Raises what `import_run` raises.
  """
  files = [source] if source.is_file() else sorted(filter(Path.is_file, source.iterdir()))
  known = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
  about = repr((str(source.resolve()), known))
  root = data_dir() / "imported"
  run_dir = root / hashlib.sha256(about.encode("utf-8", "surrogateescape")).hexdigest()[:24]
  with locked(root, to_stderr):
    notes: list[str] = []
    if not (run_dir / CONFIG).is_file():
      _, notes = import_run(source, run_dir, mesh)
  return run_dir, notes
