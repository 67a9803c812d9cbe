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


def check_source(folder: Path) -> None:
  """Raises `CheckpointError`, with what would work, unless `folder` may be a checkpoint."""
  try:
    if not folder.exists():
      cure = "give the path of a folder with config.json and safetensors"
      if len(folder.parts) == 2 and not folder.is_absolute() and folder.parts[0] != "..":
        cure = (
          "if this is a name on the Hugging Face hub, download it first, as nothing is "
          f"downloaded here: hf download {folder} --local-dir {folder.name}"
        )
      raise CheckpointError(f"{folder} does not exist", cure)
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
  if file.suffix == ".gguf":
    return "GGUF files are only written: import the safetensors that it was made from"
  if file.suffix in (".safetensors", ".json"):
    return f"give the folder that it is in: {file.parent}"
  return "give a folder with config.json and safetensors"


def _cure_for_folder(folder: Path, names: set[str]) -> str:
  if "snapshots" in names:  # a model in the cache of Hugging Face's library
    newest = max((folder / "snapshots").iterdir(), key=lambda path: path.stat().st_mtime)
    return f"give one of its snapshots, as {newest}"
  if any(name.endswith(".gguf") for name in names):
    return "GGUF files are only written: import the safetensors that they were made from"
  return "give a folder with config.json and safetensors"


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
