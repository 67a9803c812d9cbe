# SPDX-License-Identifier: Apache-2.0
"""Reads the container of llama.cpp: a GGUF file's values, and where its tensors are.

The `gguf` package has a reader, too. It maps the file into memory, believes every count
that it finds, and keeps an array for each string (docs/LOG.md has figures). Here what a
count asks for is limited before it is read, and tensors are read one at a time with plain
reads, as those of safetensors are. The package knows the types, and dequantises.
"""

import dataclasses
import functools
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from flaxlm.errors import CheckpointError, ConfigError, first_line
from flaxlm.interop.files import GGUF_MAGIC, has_file
from flaxlm.interop.layouts import Shape
from flaxlm.interop.safetensors import DTYPES, MAX_TENSORS, Tensor
from flaxlm.interop.values import shortened

VERSIONS = (2, 3)
MAX_HEADER_BYTES = 128 * 2**20
MAX_ITEMS = (
  4 * 2**20
)  # of all arrays together; a vocabulary and its merges have 0.5 million
MAX_KEYS = 10_000
MAX_RANK = 4
MAX_DEPTH = 4  # of arrays within arrays
ALIGNMENT = "general.alignment"
CHUNK = 2**20  # bytes that are read at once
STRIPE = 2**22  # values that are dequantised at once

# The types of values; numbers by how `struct` has them.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q"}
NUMBERS |= {11: "q", 12: "d"}
STRING, ARRAY = 8, 9


@dataclasses.dataclass(frozen=True)
class StoredTensor(Tensor):
  """Where a tensor of a GGUF file is; `shape` is that of what `read` returns.

  stored: the shape in the file, (outputs, inputs).
  size: in bytes.
  change: what becomes of the stored values before they are returned.
  """

  stored: Shape = ()
  size: int = 0
  change: Callable[[np.ndarray], np.ndarray] | None = None

  @property
  def num_bytes(self) -> int:
    return self.size

  @property
  def is_readable(self) -> bool:
    return True  # others are refused when the file is opened

  def read(self) -> np.ndarray:
    """The values: as they are stored if they are floats, else float32."""
    if self.dtype in DTYPES:
      values = np.empty(self.stored, DTYPES[self.dtype])
      self._fill(values.reshape(-1).view(np.uint8), self.start)
    else:
      values = self._dequantised()
    return values if self.change is None else self.change(values)

  def _dequantised(self) -> np.ndarray:
    """Row by row, so that only the result is ever large."""
    import gguf

    kind = gguf.GGMLQuantizationType[self.dtype]
    values = np.empty((math.prod(self.stored[:-1]), self.stored[-1]), np.float32)
    row_bytes = self.size // max(1, len(values))
    stride = max(1, STRIPE // self.stored[-1])
    buffer = np.empty((min(stride, len(values)), row_bytes), np.uint8)
    for first in range(0, len(values), stride):
      rows = values[first : first + stride]
      piece = buffer[: len(rows)]
      self._fill(piece.reshape(-1), self.start + first * row_bytes)
      with np.errstate(all="ignore"):  # damaged scales: what is not finite is refused later
        rows[:] = gguf.quants.dequantize(piece, kind)
    return values.reshape(self.stored)

  def _fill(self, buffer: np.ndarray, start: int) -> None:
    try:
      with self.path.open("rb") as file:
        file.seek(start)
        count = file.readinto(buffer.data)
    except OSError as e:
      raise CheckpointError(f"{self.path} cannot be read: {first_line(e)}") from e
    if count < buffer.size:
      raise CheckpointError(f"{self.path} was cut short while it was read")


class GGUF(NamedTuple):
  """An opened file: values by their keys, and tensors by llama.cpp's names."""

  path: Path
  values: dict[str, Any]
  tensors: dict[str, StoredTensor]


def read_gguf(path: Path) -> GGUF:
  """Everything but the tensors' values.

  Raises `CheckpointError` for a file that is damaged or of an unsupported kind, and
  `ConfigError` without the gguf package.
  """
  try:
    import gguf  # noqa: F401 - here rather than when the first tensor is read
  except ImportError as e:
    raise ConfigError("GGUF needs the gguf package", "pip install 'flaxlm[gguf]'") from e
  try:
    if not has_file(path):
      raise CheckpointError(f"{path} does not exist")
    with path.open("rb") as file:
      return _Reader(path, file).read()
  except OSError as e:
    raise CheckpointError(f"{path} cannot be read: {first_line(e)}") from e


class _Reader:
  """Reads a file from its start to the end of its header."""

  def __init__(self, path: Path, file: BinaryIO):
    self.path, self.file = path, file
    self.size = path.stat().st_size
    self.data = bytearray()  # the header, as far as it has been read
    self.at = 0
    self.items = 0  # of arrays, so far

  def read(self) -> GGUF:
    if self.take(4) != GGUF_MAGIC:
      raise CheckpointError(f"{self.path} is not a GGUF file")
    version = self.number("I")
    if version not in VERSIONS:
      if int.from_bytes(version.to_bytes(4, "big"), "little") in VERSIONS:
        raise CheckpointError(f"{self.path} is a big-endian GGUF file", "convert it again")
      raise CheckpointError(
        f"{self.path} is of GGUF version {version}",
        f"flaxlm reads {' and '.join(map(str, VERSIONS))}",
      )
    num_tensors, num_keys = self.number("Q"), self.number("Q")
    for count, most, what in (
      (num_tensors, MAX_TENSORS, "tensors"),
      (num_keys, MAX_KEYS, "values"),
    ):
      if count > most:
        raise CheckpointError(f"{self.path}: {count} {what}", f"at most {most}")
    values: dict[str, Any] = {}
    for _ in range(num_keys):
      key = self.text()
      if key in values:
        raise CheckpointError(f"{self.path} has {shortened(key)} twice")
      values[key] = self.value(self.number("I"), key)
    return GGUF(self.path, values, self.tensors(num_tensors, self.alignment(values)))

  def alignment(self, values: dict[str, Any]) -> int:
    alignment = values.get(ALIGNMENT, 32)
    if type(alignment) is not int or not 8 <= alignment <= 2**16 or alignment % 8:
      raise CheckpointError(f"{self.path}: {ALIGNMENT} is not a multiple of 8 to 65536")
    return alignment

  # -- Values

  def take(self, count: int) -> bytes:
    """The next bytes of the header."""
    end = self.at + count
    if end > self.size:
      raise CheckpointError(f"{self.path} is cut short, or not a GGUF file")
    if end > MAX_HEADER_BYTES:
      raise CheckpointError(
        f"{self.path}: its header has more than {MAX_HEADER_BYTES} bytes"
      )
    while len(self.data) < end:
      piece = self.file.read(CHUNK)
      if not piece:
        raise CheckpointError(f"{self.path} was cut short while it was read")
      self.data += piece
    taken = bytes(self.data[self.at : end])
    self.at = end
    return taken

  def number(self, code: str) -> Any:
    return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

  def text(self) -> str:
    taken = self.take(self.number("Q"))
    try:
      return taken.decode("utf-8")
    except UnicodeDecodeError as e:
      raise CheckpointError(f"{self.path} has a text that is not UTF-8: {e}") from e

  def value(self, kind: int, key: str, depth: int = 0) -> Any:
    if kind in NUMBERS:
      number = self.number(NUMBERS[kind])
      # The shortest number that is the same in float32: 1e-05.
      return float(str(np.float32(number))) if NUMBERS[kind] == "f" else number
    if kind == STRING:
      return self.text()
    if kind != ARRAY or depth == MAX_DEPTH:
      raise CheckpointError(
        f"{self.path}: the type of {shortened(key)} is {kind}, which GGUF has not"
      )
    inner, count = self.number("I"), self.number("Q")
    self.items += count
    if self.items > MAX_ITEMS:
      raise CheckpointError(
        f"{self.path}: {shortened(key)} has {count} values",
        f"at most {MAX_ITEMS} in all of a file",
      )
    if inner in NUMBERS:
      code = NUMBERS[inner]
      taken = self.take(count * struct.calcsize(f"<{code}"))
      return [*struct.unpack(f"<{count}{code}", taken)]
    return [self.value(inner, key, depth + 1) for _ in range(count)]

  # -- Tensors

  def tensors(self, count: int, alignment: int) -> dict[str, StoredTensor]:
    import gguf

    entries = [self.entry() for _ in range(count)]
    padded = lambda offset: -(-offset // alignment) * alignment
    base = padded(self.at)
    end, found = 0, dict[str, StoredTensor]()
    for name, shape, kind, offset in entries:
      title = shortened(name)
      if name in found:
        raise CheckpointError(f"{self.path} has {title} twice")
      dtype = _dtype(self.path, title, kind)
      block, num_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[dtype]]
      if shape[-1] % block:
        raise CheckpointError(
          f"{self.path}: {title} has rows of {shape[-1]} values, {dtype} blocks of {block}"
        )
      size = math.prod(shape) // block * num_bytes
      if offset != padded(end):
        raise CheckpointError(
          f"{self.path}: {title} does not begin where the tensor before ends"
        )
      end = offset + size
      if base + end > self.size:
        raise CheckpointError(f"{self.path} is cut short: {title} would end after it")
      found[name] = StoredTensor(
        self.path, dtype, shape, base + offset, stored=shape, size=size
      )
    if count and self.size > base + padded(end):
      raise CheckpointError(
        f"{self.path}: {self.size - base - end} bytes after the last tensor"
      )
    return found

  def entry(self) -> tuple[str, Shape, int, int]:
    """A tensor's name, its shape from the outermost dim on, its type and its offset."""
    name, rank = self.text(), self.number("I")
    if not 1 <= rank <= MAX_RANK:
      raise CheckpointError(f"{self.path}: {shortened(name)} has {rank} dims")
    dims = struct.unpack(f"<{rank}Q", self.take(8 * rank))
    if not all(0 < dim < 2**48 for dim in dims):
      raise CheckpointError(f"{self.path}: {shortened(name)} has the shape {[*dims]}")
    return name, dims[::-1], self.number("I"), self.number("Q")


@functools.cache
def _is_known(dtype: str) -> bool:
  """Whether the gguf package dequantises a type."""
  import gguf

  kind = gguf.GGMLQuantizationType[dtype]
  try:
    gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
  except NotImplementedError:
    return False
  return True


def _dtype(path: Path, name: str, kind: int) -> str:
  """The name of a tensor's type. Raises `CheckpointError` for one that cannot be read."""
  import gguf

  kinds = {member.value: member.name for member in gguf.GGMLQuantizationType}
  dtype = kinds.get(kind)
  if dtype is None or not (dtype in DTYPES or _is_known(dtype)):
    raise CheckpointError(
      f"{path}: {name} is stored as {dtype or f'the unknown type {kind}'}",
      "get the model in a more usual quantization",
    )
  return dtype
