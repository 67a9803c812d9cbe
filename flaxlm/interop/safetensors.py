# SPDX-License-Identifier: Apache-2.0
"""Safetensors files, read and written one tensor at a time.

A file begins with the length of its JSON header in eight bytes; the header has the dtype,
shape and place of each tensor in the data that follow. The header's size is limited before
it is parsed, and all of it is checked before data are read, so that it cannot ask for more
than the file has. Tensors are read with plain reads, not from a memory map: with a map the
process dies if the file shrinks, and the pages that were read stay in memory.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from flaxlm.errors import CheckpointError, first_line
from flaxlm.interop.files import has_file
from flaxlm.interop.layouts import Shape
from flaxlm.interop.values import parse_json, read_json, shortened, shown

MAX_HEADER_BYTES = 32 * 2**20
MAX_TENSORS = 200_000
MAX_RANK = 8
PIECE = 2**20  # values that are looked at together: few enough to stay in a cache

DTYPES: Mapping[str, np.dtype] = {
  "F32": np.dtype(np.float32),
  "BF16": np.dtype(jnp.bfloat16),
  "F16": np.dtype(np.float16),
  "F64": np.dtype(np.float64),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Sizes of other dtypes. Such tensors are buffers, which are skipped, but they have a place.
OTHER_SIZES = {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "U16": 2}
OTHER_SIZES |= {"U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1}

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# How the files of torch.save begin: a zip archive, or a pickle of some protocol.
PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
PICKLE_NAMES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt")


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Where a tensor is: `start` is the offset in the file, in bytes."""

  path: Path
  dtype: str
  shape: Shape
  start: int

  @property
  def is_readable(self) -> bool:
    """Whether the dtype is one that a parameter can have."""
    return self.dtype in DTYPES

  @property
  def num_bytes(self) -> int:
    """What a readable tensor takes in its file."""
    return DTYPES[self.dtype].itemsize * math.prod(self.shape)

  def read(self) -> np.ndarray:
    """The values. Raises `CheckpointError` for a dtype that no parameter can have."""
    if not self.is_readable:
      raise CheckpointError(
        f"{self.path} has tensors of {self.dtype}", f"flaxlm reads {', '.join(DTYPES)}"
      )
    dtype, count = DTYPES[self.dtype], math.prod(self.shape)
    try:
      values = np.fromfile(self.path, dtype, count, offset=self.start)
    except OSError as e:
      raise CheckpointError(f"{self.path} cannot be read: {first_line(e)}") from e
    if values.size < count:
      raise CheckpointError(f"{self.path} was cut short while it was read")
    return values.reshape(self.shape)


def is_finite(values: np.ndarray) -> bool:
  """Whether floats (float32 at most) have neither NaN nor infinity: their exponents say."""
  if values.dtype == np.float64:
    with np.errstate(over="ignore"):
      values = values.astype(np.float32)
  kind = jnp.finfo(values.dtype)
  exponent = ((1 << kind.nexp) - 1) << kind.nmant
  bits = values.reshape(-1).view(f"u{values.dtype.itemsize}")
  pieces = (bits[at : at + PIECE] for at in range(0, bits.size, PIECE))
  return all((piece & exponent).max() < exponent for piece in pieces)


# -- Reading -------------------------------------------------------------------------------


def open_checkpoint(folder: Path) -> dict[str, Tensor]:
  """Every tensor of a directory, from one file or from those that its index names.

  Of both, the one file counts, as in transformers: an index may be left of an earlier save.
  Raises `CheckpointError`, also if there are only pickles.
  """
  if not folder.is_dir():
    raise CheckpointError(f"{folder} is not a directory")
  if has_file(folder / SINGLE):
    return read_header(folder / SINGLE)
  if has_file(folder / INDEX):
    return _open_index(folder)
  pickles = sorted(path.name for name in PICKLE_NAMES for path in folder.glob(name))
  if pickles:
    raise _pickled(folder / pickles[0])
  raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}")


def _open_index(folder: Path) -> dict[str, Tensor]:
  where = read_json(folder / INDEX).get("weight_map")
  if not isinstance(where, dict) or not where:
    raise CheckpointError(f"{folder / INDEX} has no weight_map")
  files: dict[str, dict[str, Tensor]] = {}
  for name, file in where.items():
    if not isinstance(file, str) or file not in files:
      files[file] = read_header(_inside(folder, file))
    if name not in files[file]:
      raise CheckpointError(f"{folder / INDEX}: {shortened(name)} is not in {file}")
  for file, tensors in files.items():
    stray = [name for name in tensors if where.get(name) != file]
    if stray:
      raise CheckpointError(
        f"{folder / INDEX} does not list {shortened(stray[0])} of {file}"
      )
  return {name: files[file][name] for name, file in where.items()}


def _inside(folder: Path, file: Any) -> Path:
  """The file of an index entry, which must be in `folder` itself."""
  plain = isinstance(file, str) and file == Path(file).name and "\\" not in file
  if not plain or "\0" in file or not file.endswith(".safetensors"):
    if isinstance(file, str) and any(Path(file).match(name) for name in PICKLE_NAMES):
      raise _pickled(folder / Path(file).name)
    raise CheckpointError(
      f"{folder / INDEX} names the file {shown(file)}",
      "use the plain name of a .safetensors file beside the index",
    )
  return folder / file


def _pickled(path: Path) -> CheckpointError:
  return CheckpointError(
    f"{path} is a pickle, which can run any code when it is opened; flaxlm never does",
    "convert it to safetensors in a sandbox, or get the repository's safetensors files",
  )


def read_header(path: Path) -> dict[str, Tensor]:
  """The tensors of one file. Raises `CheckpointError` if anything in it is wrong."""
  try:
    if not has_file(path):
      raise CheckpointError(f"{path} does not exist")
    size = path.stat().st_size
    with path.open("rb") as file:
      start = file.read(8)
      length = int.from_bytes(start, "little")
      # The length 640 has the same first bytes as a pickle, but then a brace follows.
      if start.startswith(PICKLES) and file.read(1) != b"{":
        raise _pickled(path)
      file.seek(8)
      if size < 8 or length > size - 8:
        raise CheckpointError(f"{path} is cut short, or not a safetensors file")
      if length > MAX_HEADER_BYTES:
        raise CheckpointError(
          f"{path}: a header of {length} bytes", f"at most {MAX_HEADER_BYTES}"
        )
      header = file.read(length)
  except OSError as e:
    raise CheckpointError(f"{path} cannot be read: {first_line(e)}") from e
  except ValueError as e:
    raise CheckpointError(f"{path} cannot be read: {e}") from e
  entries = parse_json(header, str(path))
  entries.pop("__metadata__", None)
  if len(entries) > MAX_TENSORS:
    raise CheckpointError(f"{path}: {len(entries)} tensors", f"at most {MAX_TENSORS}")
  end = 0
  tensors, places = {}, []
  for name, entry in entries.items():
    tensors[name], first, last = _entry(path, name, entry, 8 + length)
    places.append((first, last, name))
  for first, last, name in sorted(places):
    if first != end:
      raise CheckpointError(
        f"{path}: {shortened(name)} does not begin where the tensor before ends"
      )
    end = last
  if end != size - 8 - length:
    raise CheckpointError(f"{path}: {size - 8 - length} bytes of data, {end} in the header")
  return tensors


def _entry(path: Path, name: str, entry: Any, base: int) -> tuple[Tensor, int, int]:
  """A tensor, and the range of bytes that the header gives it."""
  name = shortened(name)
  try:
    dtype, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
    whole = all(type(number) is int and number >= 0 for number in (first, last, *shape))
    if not whole or len(shape) > MAX_RANK or not isinstance(dtype, str):
      raise ValueError("sizes")
  except (KeyError, TypeError, ValueError) as e:
    raise CheckpointError(f"{path}: the entry of {name} is wrong ({e})") from e
  known = DTYPES[dtype].itemsize if dtype in DTYPES else OTHER_SIZES.get(dtype)
  if known is None:
    raise CheckpointError(f"{path}: {name} has the unknown dtype {shown(dtype)}")
  if last - first != known * math.prod(shape):
    raise CheckpointError(
      f"{path}: {name} has {last - first} bytes for {dtype} {shown(shape)}"
    )
  return Tensor(path, dtype, tuple(shape), base + first), first, last


# -- Writing -------------------------------------------------------------------------------


def plan_files(sizes: Mapping[str, int], most: int) -> list[list[str]]:
  """The names in each file, of at most `most` bytes; a larger tensor has its own file."""
  files: list[list[str]] = [[]]
  filled = 0
  for name, size in sizes.items():
    if files[-1] and filled + size > most:
      files.append([])
      filled = 0
    files[-1].append(name)
    filled += size
  return files


def write_header(file: BinaryIO, shapes: Mapping[str, Shape], dtype: np.dtype) -> None:
  """Writes all that comes before the tensors, which must follow in the same order."""
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers requires it
  end = 0
  for name, shape in shapes.items():
    start, end = end, end + math.prod(shape) * dtype.itemsize
    header[name] = {
      "dtype": NAMES[dtype],
      "shape": list(shape),
      "data_offsets": [start, end],
    }
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)  # so that data are aligned
  file.write(len(text).to_bytes(8, "little") + text)


def write_files(
  folder: Path,
  shapes: Mapping[str, Shape],
  dtype: np.dtype,
  most: int,
  values: Callable[[str], np.ndarray],
) -> None:
  """Writes `values(name)` for every name of `shapes`, in files of at most `most` bytes.

  Only one tensor is in memory at a time. Several files get an index.
  """
  sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
  files = plan_files(sizes, most)
  where: dict[str, str] = {}
  for number, names in enumerate(files, 1):
    file = f"model-{number:05}-of-{len(files):05}.safetensors"
    if len(files) == 1:
      file = SINGLE
    where |= dict.fromkeys(names, file)
    with (folder / file).open("wb") as out:
      write_header(out, {name: shapes[name] for name in names}, dtype)
      for name in names:
        array = np.asarray(values(name), dtype, order="C")
        assert array.shape == shapes[name], name
        out.write(array.reshape(-1).view(np.uint8).data)
      out.flush()
      os.fsync(out.fileno())
  if len(files) > 1:
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
    (folder / INDEX).write_text(
      json.dumps(index, indent=2, allow_nan=False) + "\n", "utf-8"
    )
