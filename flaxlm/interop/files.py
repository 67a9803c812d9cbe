# SPDX-License-Identifier: Apache-2.0
"""The folder of a checkpoint that others made, or a run's folder: what may be opened in it.

A folder may have been unpacked from anywhere. A link in it could name any file of this
machine, which would then be copied along, and a pipe would be waited for.
"""

import json
import stat
from pathlib import Path

from flaxlm.errors import CheckpointError, first_line

CONFIG = "config.json"
ADAPTER = "adapter_config.json"  # of PEFT, beside an adapter's weights
# What a checkpoint says of itself to people, by name or pattern.
CARD, ABOUT_GGUF = "README.md", "gguf_about.json"
DOCUMENTS = (CARD, "README_BASE*.md", "LICEN[CS]E*", "NOTICE*", "USE_POLICY*", ABOUT_GGUF)
SOURCES = "give a folder with config.json and safetensors, or a GGUF file"
MOST_FILES = 8  # in an error's list
GGUF_MAGIC = b"GGUF"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def has_file(path: Path, root: Path | None = None) -> bool:
  """Whether there is a file of this name, in the folder `root` itself (by default its own).

  Raises `CheckpointError` for a link that leads out of `root`, a pipe, a folder or a
  pointer of Git LFS. Links of the Hugging Face cache are followed: they lead from
  `snapshots/REVISION` into `blobs`.
  """
  try:
    if not path.exists():
      if path.is_symlink():
        raise CheckpointError(f"{path} is a link to a file that does not exist")
      return False
    if not stat.S_ISREG(path.stat().st_mode):
      raise CheckpointError(f"{path} is not a file")
    folder, target = (root or path.parent).resolve(), path.resolve()
    in_cache = folder.parent.name == "snapshots"
    if not target.is_relative_to(folder) and not (
      in_cache and target.parent == folder.parent.parent / "blobs"
    ):
      raise CheckpointError(
        f"{path} is a link out of its folder, to {target}",
        "links are not followed: put the file itself there",
      )
    with path.open("rb") as file:
      if file.read(len(LFS_POINTER)) == LFS_POINTER:
        raise CheckpointError(f"{path} stands for a file in Git LFS", "run git lfs pull")
  except OSError as e:
    raise CheckpointError(f"{path} cannot be read: {first_line(e)}") from e
  return True


def find_gguf(source: Path) -> Path | None:
  """The GGUF file that `source` is, or that a folder without config.json has alone."""
  try:
    if source.is_dir():
      if (source / CONFIG).exists():
        return None
      files = sorted(source.glob("*.gguf"))
      return files[0] if len(files) == 1 else None
    return source if source.is_file() and is_gguf(source) else None
  except OSError:  # its name is too long, or it may not be read
    return None


def is_gguf(path: Path) -> bool:
  """Whether a file is a GGUF file, by its name or its first bytes."""
  if path.suffix == ".gguf":
    return True
  try:
    with path.open("rb") as file:
      return file.read(len(GGUF_MAGIC)) == GGUF_MAGIC
  except OSError:
    return False


def check_source(folder: Path) -> None:
  """Raises `CheckpointError`, with what would work, unless `folder` may be a checkpoint."""
  try:
    if not folder.exists():
      raise CheckpointError(f"{folder} does not exist", SOURCES)
    if not folder.is_dir():
      raise CheckpointError(f"{folder} is not a folder", _cure_for_file(folder))
    names = {path.name for path in folder.iterdir()}
    if ADAPTER in names and CONFIG not in names:
      raise _adapter(folder)
    if CONFIG not in names:
      raise CheckpointError(f"{folder} has no {CONFIG}", _cure_for_folder(folder, names))
  except OSError as e:
    raise CheckpointError(f"{folder} cannot be read: {first_line(e)}") from e


def _cure_for_file(file: Path) -> str:
  if file.suffix in (".safetensors", ".json"):
    return f"give the folder that it is in: {file.parent}"
  return SOURCES


def _cure_for_folder(folder: Path, names: set[str]) -> str:
  if "snapshots" in names:  # a model in the cache of Hugging Face's library
    newest = max((folder / "snapshots").iterdir(), key=lambda path: path.stat().st_mtime)
    return f"give one of its snapshots, as {newest}"
  files = sorted(name for name in names if name.endswith(".gguf"))
  if files:
    return f"give one of its files: {', '.join(files[:MOST_FILES])}"
  return SOURCES


def _adapter(folder: Path) -> CheckpointError:
  base = None
  if has_file(folder / ADAPTER):
    try:
      base = json.loads((folder / ADAPTER).read_bytes()).get("base_model_name_or_path")
    except (ValueError, AttributeError, RecursionError):
      base = None  # it is only for the message
  return CheckpointError(
    f"{folder} is a LoRA adapter" + (f" of {base}" if isinstance(base, str) else ""),
    f"import that model, and then: flaxlm import {folder} RUN --base ITS_RUN",
  )
