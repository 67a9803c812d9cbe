# SPDX-License-Identifier: Apache-2.0
"""Names on the Hugging Face hub: which folder or file of the local cache they mean.

`huggingface_hub`, which tokenizers needs anyway, knows where the cache is and how it is
laid out. Nothing is downloaded unless the user asks for it, and then only what an import
reads: never pickles.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flaxlm.errors import CheckpointError, ConfigError, first_line
from flaxlm.interop.files import CONFIG, DOCUMENTS, MOST_FILES
from flaxlm.interop.values import shortened

# org/name, or org/name/FILE.gguf for one of several files.
PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
NAME = re.compile(rf"({PART}/{PART})(?:/((?:{PART}/)*{PART}\.gguf))?")
SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model")  # of a repository's top folder
OF_OTHERS = ("consolidated*", "original/*")  # the same weights, for other programs


def find_source(name: str, download: bool = False, revision: str | None = None) -> Path:
  """The path of a checkpoint: `name` itself if that exists, else what it is in the cache.

  `revision` is a branch, a tag or a commit. With `download` the hub is asked, else there is
  no network. Raises `CheckpointError` for a name that the cache does not have, or that
  cannot be downloaded.
  """
  path = Path(name)
  try:
    is_here = path.exists()
  except OSError:  # its name is too long
    is_here = False
  if is_here:
    if revision is not None:
      raise ConfigError(f"{name} is a path here, which has no revisions", "leave it out")
    return path
  match = NAME.fullmatch(name)
  if match is None:
    if download or revision is not None:
      raise ConfigError(f"{name} is no name on the hub", "as in org/name")
    return path  # which is said not to exist
  repository, file = match.groups()
  return (_download if download else _cached)(repository, file, revision)


def _cached(repository: str, file: str | None, revision: str | None) -> Path:
  import huggingface_hub
  from huggingface_hub import constants

  cache = Path(constants.HF_HUB_CACHE)
  title = " of ".join(filter(None, [file, repository]))
  at = f" at {revision}" if revision is not None else ""
  missing = CheckpointError(
    f"there is no path {repository}, and {title}{at} is not in {cache}",
    "flaxlm import --download ... gets it from the Hugging Face hub",
  )
  options = dict(repo_id=repository, revision=revision, local_files_only=True)
  try:
    if file is not None:
      return Path(huggingface_hub.hf_hub_download(filename=file, **options))  # type: ignore[arg-type]
    # An import does not need all files of a repository: which are there is looked at below.
    folder = Path(huggingface_hub.snapshot_download(allow_patterns=[], **options))  # type: ignore[arg-type]
  except (OSError, ValueError) as e:  # not in the cache, or the cache is damaged
    raise missing from e
  names = [path.name for path in folder.iterdir()]
  if CONFIG in names and any(name.endswith(".safetensors") for name in names):
    return folder
  files = [name for name in names if name.endswith(".gguf")]
  if not names:
    raise missing
  if not files:
    raise CheckpointError(
      f"{repository} is in {cache} without safetensors and config.json, or GGUF files",
      "flaxlm import --download ... gets them, if the Hugging Face hub has them",
    )
  return folder / _only(repository, files)


def _download(repository: str, file: str | None, revision: str | None) -> Path:
  import huggingface_hub

  api = huggingface_hub.HfApi()
  if file is None:
    names = _asked(repository, api.list_repo_files, revision=revision)
    top = [name for name in names if "/" not in name]
    weights = [name for name in top if name.endswith(".safetensors")]
    if CONFIG in top and weights:
      patterns = [
        *SMALL_FILES,
        *DOCUMENTS,
        "*.safetensors",
        "additional_chat_templates/*.jinja",
      ]
      return Path(
        _asked(
          repository,
          api.snapshot_download,
          revision=revision,
          allow_patterns=patterns,
          ignore_patterns=[*OF_OTHERS],
        )
      )
    files = [name for name in names if name.endswith(".gguf")]
    if not files:
      raise CheckpointError(f"{repository} has neither safetensors nor GGUF files")
    file = _only(repository, files)
  get = api.hf_hub_download
  return Path(_asked(repository, get, filename=file, revision=revision))


def _asked(repository: str, ask: Callable, **options: Any) -> Any:
  """What a function of `huggingface_hub` answers. Its errors become one line, and its
  attempts none."""
  from huggingface_hub.utils import logging

  before = logging.get_verbosity()
  logging.set_verbosity_error()
  try:
    return ask(repo_id=repository, **options)
  # Errors of the hub, of whichever HTTP library its version uses, and of the disk.
  except Exception as e:
    raise CheckpointError(
      f"{repository} cannot be downloaded: {shortened(first_line(e))}",
      "see that the name is right, the network is up, and that you have access "
      "(hf auth login)",
    ) from e
  finally:
    logging.set_verbosity(before)


def _only(repository: str, files: list[str]) -> str:
  if len(files) > 1:
    listed = ", ".join(sorted(files)[:MOST_FILES])
    more = f" and {len(files) - MOST_FILES} more" if len(files) > MOST_FILES else ""
    raise CheckpointError(
      f"{repository} has {len(files)} GGUF files: {listed}{more}",
      f"name one, as in {repository}/{min(files)}",
    )
  return files[0]
