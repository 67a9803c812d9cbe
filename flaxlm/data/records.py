# SPDX-License-Identifier: Apache-2.0
"""Records of files: JSON lines and the rows of Parquet tables, compressed or not.

A name says what is in a file: `.jsonl` or `.ndjson`, `.parquet`, or else text; `.gz` or
`.zst` behind it says how that is compressed. JSON is strict: one object a line, in UTF-8,
no name twice in an object, no NaN, and no half of a surrogate pair (RFC 8259).
Only a line feed ends a line.
"""

import dataclasses
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from flaxlm.config import unique_keys
from flaxlm.errors import ConfigError, DataError, first_line, one_line

JSON_LINES = (".jsonl", ".ndjson")
PARQUET = ".parquet"
COMPRESSIONS = (".gz", ".zst")
MOST_LINE_BYTES = 2**28  # a longer line is no record, but something else
ROWS_AT_A_TIME = 256
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Record(NamedTuple):
  """The values of a line, or of a row, by their names."""

  number: int  # of the line or the row, from 1
  fields: dict[str, Any]
  unit: str = "line"  # or "row"

  def at(self, path: Path) -> str:
    """Where it is, for errors: the file and the line."""
    return one_line(f"{path}, {self.unit} {self.number}")


@dataclasses.dataclass
class Skipped:
  """Records that could not be read: how many, and where and why the first."""

  count: int = 0
  first: str = ""

  def add(self, where: str, cause: str) -> None:
    self.count += 1
    self.first = self.first or one_line(f"{where}: {cause}")

  def __str__(self) -> str:
    return f"{self.count:,} records skipped, the first is {self.first}"


def read_records(
  path: Path, skipped: Skipped | None = None, columns: list[str] | None = None
) -> Iterator[Record]:
  """The records of a `.jsonl` or `.parquet` file, in order; empty lines are none.

  A record that is malformed is counted in `skipped`; without that the first one raises
  `DataError`, which names the file and the line. What follows damage of a compressed file
  or of a table is counted as one. Of Parquet only `columns` are read, if they are given.
  Raises `DataError` for what is no file, and `ConfigError` where a package is missing.
  """
  if not path.is_file():  # a pipe would be waited for
    raise DataError(f"{path} is not a file")
  is_table = kind_of(path)[0] == PARQUET
  read = _read_table(path, columns) if is_table else _read_lines(path)
  what = "row" if is_table else "line"
  for number, found in read:
    if isinstance(found, dict):
      yield Record(number, found, what)
      continue
    where = f"{path}, {what} {number}"
    if skipped is None:
      raise DataError(one_line(f"{where}: {found}"))
    skipped.add(where, found)


def kind_of(path: Path) -> tuple[str, str]:
  """(format, compression) by a file's name: (`.jsonl`, `.gz`) of `a.JSONL.gz`; no
  compression is ""."""
  suffix = path.suffix.lower()
  if suffix in COMPRESSIONS:
    return Path(path.stem).suffix.lower(), suffix
  return suffix, ""


def holds_records(path: Path) -> bool:
  """Whether `read_records` reads it, by its name."""
  return kind_of(path)[0] in (*JSON_LINES, PARQUET)


def open_plain(path: Path) -> BinaryIO:
  """The bytes of a file as they were before it was compressed.

  Raises `ConfigError` if the package that reads the compression is missing, and reading
  from it what is in `damage_errors`.
  """
  compression = kind_of(path)[1]
  if compression == ".gz":
    return cast(BinaryIO, gzip.open(path))
  if compression == ".zst":
    return cast(BinaryIO, _zstd(path).open(path))
  return path.open("rb")


def damage_errors(path: Path) -> tuple[type[Exception], ...]:
  """What reading from `open_plain` raises if the file is damaged, or the disk is."""
  zstd_errors = (_zstd(path).ZstdError,) if kind_of(path)[1] == ".zst" else ()
  return (OSError, EOFError, zlib.error, *zstd_errors)


def _zstd(path: Path) -> Any:
  """Python's own module from 3.14 on, and before that its backport."""
  if sys.version_info >= (3, 14):
    from compression import zstd
  else:
    try:
      from backports import zstd
    except ImportError as e:
      raise ConfigError(
        f"{path} is compressed by zstd, and backports.zstd is not installed",
        "pip install 'flaxlm[zstd]'",
      ) from e
  return zstd


# -- Each reader gives (number, record or what is wrong with it) ---------------------------


def _read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
  errors = damage_errors(path)
  number = 1
  try:
    with open_plain(path) as file:
      while line := file.readline(MOST_LINE_BYTES):
        if len(line) == MOST_LINE_BYTES:
          yield number, f"a line of {MOST_LINE_BYTES >> 20} MiB or more"
          return
        if number == 1:
          line = line.removeprefix(BYTE_ORDER_MARK)
        if line.strip():
          yield number, _object(line)
        number += 1
  except errors as e:
    yield number, f"the file cannot be read from here on: {first_line(e)}"


def _object(line: bytes) -> dict[str, Any] | str:
  """The JSON object of a line, or why it is none."""
  try:
    # Given bytes, `json.loads` would guess at UTF-16 too.
    values = json.loads(
      line.decode("utf-8").rstrip(), object_pairs_hook=unique_keys, parse_constant=_refuse
    )
    if b"\\u" in line:
      json.dumps(values, ensure_ascii=False).encode("utf-8")
  except UnicodeDecodeError as e:
    return f"not UTF-8 at byte {e.start + 1}"
  except UnicodeEncodeError:
    return "not Unicode: a text has half of a surrogate pair"
  except RecursionError:
    return "nested too deeply"
  except json.JSONDecodeError as e:  # its own words count lines from 1 on in this one
    return f"not JSON: {e.msg} at character {e.pos + 1}"
  except ValueError as e:
    return f"not JSON: {first_line(e)}"
  return values if isinstance(values, dict) else "not a JSON object"


def _refuse(constant: str) -> None:
  raise ValueError(f"{constant} is not a number of JSON")


def _read_table(
  path: Path, columns: list[str] | None
) -> Iterator[tuple[int, dict[str, Any] | str]]:
  try:
    import pyarrow
    from pyarrow import parquet
  except ImportError as e:
    raise ConfigError(
      f"{path} is a table, and pyarrow is not installed", "pip install 'flaxlm[parquet]'"
    ) from e
  errors = (*damage_errors(path), pyarrow.ArrowException)
  number = 1
  try:
    with open_plain(path) as file:
      # A table is read from its end, and a compressed file from its beginning.
      source = io.BytesIO(file.read()) if kind_of(path)[1] else file
      table = parquet.ParquetFile(source)
      if not set(columns or ()) <= set(table.schema_arrow.names):
        columns = None  # all are read, so that a message can name them
      for batch in table.iter_batches(ROWS_AT_A_TIME, columns=columns):
        for row in _rows(batch):
          yield number, row
          number += 1
  except errors as e:
    yield number, f"the table cannot be read from here on: {first_line(e)}"


def _rows(batch: Any) -> list[dict[str, Any] | str]:
  """The values of each row of a batch, or why a row has none."""
  try:
    return batch.to_pylist()
  except ValueError as e:  # a text that is not UTF-8, a time that Python does not have
    if batch.num_rows == 1:
      return [first_line(e)]
  return [row for n in range(batch.num_rows) for row in _rows(batch.slice(n, 1))]
