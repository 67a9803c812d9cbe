# SPDX-License-Identifier: Apache-2.0
"""Records of JSON lines and Parquet tables: all of them, and what is no record is told."""

import gzip
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from flaxlm.data.records import Record, Skipped, holds_records, kind_of, read_records
from flaxlm.errors import ConfigError, DataError

ZSTD = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
ROWS: list[dict[str, Any]] = [
  {"text": "é漢🙂\u2028\r\n", "n": 1, "messages": [{"role": "user", "content": "a\0b"}]},
  {"text": "", "n": None, "messages": []},
]


def as_lines(rows: list[Any]) -> bytes:
  return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_table(rows: list[dict[str, Any]]) -> bytes:
  pyarrow = pytest.importorskip("pyarrow")
  file = io.BytesIO()
  pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), file)
  return file.getvalue()


def compressed(content: bytes, suffix: str) -> bytes:
  if suffix == ".zst":
    return pytest.importorskip(ZSTD).compress(content)
  return gzip.compress(content) if suffix == ".gz" else content


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", [".jsonl", ".parquet", ".NDJSON"])
def test_records_are_read_as_they_were_written(tmp_path: Path, kind: str, compression: str):
  content = as_table(ROWS) if kind == ".parquet" else as_lines(ROWS)
  path = tmp_path / f"a.b{kind}{compression}"
  # Several members one behind the other are one file.
  twice = kind != ".parquet" and compression
  path.write_bytes(compressed(content, compression) * (2 if twice else 1))
  expected = ROWS * 2 if twice else ROWS
  unit = "row" if kind == ".parquet" else "line"
  wanted = [Record(n, row, unit) for n, row in enumerate(expected, 1)]
  assert list(read_records(path)) == wanted
  assert kind_of(path) == (kind.lower(), compression) and holds_records(path)


def test_only_columns_that_are_asked_for(tmp_path: Path):
  (tmp_path / "a.parquet").write_bytes(as_table(ROWS))
  records = list(read_records(tmp_path / "a.parquet", columns=["n"]))
  assert records == [Record(1, {"n": 1}, "row"), Record(2, {"n": None}, "row")]
  # Of a table without one of them all are read, so that a message can name them.
  record = next(read_records(tmp_path / "a.parquet", columns=["n", "none"]))
  assert {"n", "text"} <= set(record.fields) and "none" not in record.fields


NO_RECORDS = {
  "not UTF-8 at byte 4": b'{"a\xff": 1}',
  "not Unicode: a text has half of a surrogate pair": rb'{"a": ["x\ud83d"]}',
  "not JSON: Expecting property name enclosed in double quotes at character 2": b"{'a': 1}",
  "not JSON: Expecting value at character 6": b'{"a": ',
  "not JSON: Extra data at character 10": b'{"a": 1} {"a": 2}',
  "not JSON: NaN is not a number of JSON": b'{"a": NaN}',
  "not JSON: 'a' appears twice": b'{"a": 1, "a": 1}',
  "not a JSON object": b'["a"]',
  "nested too deeply": b"[" * 100_000,
}


@pytest.mark.parametrize("cause", NO_RECORDS)
def test_what_is_no_record_is_told_with_its_line(tmp_path: Path, cause: str):
  path = tmp_path / "a.jsonl"
  good = b'{"a": 1}\n'
  path.write_bytes(good + b"\n" + NO_RECORDS[cause] + b"\n" + good + b"{\n" + good[:-1])
  with pytest.raises(DataError, match=cause) as error:
    list(read_records(path))
  assert error.value.cause.startswith(f"{path}, line 3: ")
  skipped = Skipped()
  records = list(read_records(path, skipped))
  assert records == [Record(n, {"a": 1}) for n in (1, 4, 6)]
  assert skipped == Skipped(2, error.value.cause)
  assert str(skipped) == f"2 records skipped, the first is {skipped.first}"


def test_a_whole_surrogate_pair_is_a_character(tmp_path: Path):
  path = tmp_path / "a.jsonl"
  path.write_bytes(rb'{"a": "\ud83d\ude42 \\ud83d"}')
  assert [*read_records(path)] == [Record(1, {"a": "🙂 \\ud83d"})]


def test_a_byte_order_mark_and_other_line_ends(tmp_path: Path):
  path = tmp_path / "a.jsonl"
  path.write_bytes(b'\xef\xbb\xbf{"a": "\xc2\x85"}\r\n \t\r\n{"a": 2}\r\n')
  assert [*read_records(path)] == [Record(1, {"a": "\x85"}), Record(3, {"a": 2})]


@pytest.mark.parametrize(
  ("name", "damage"),
  [
    ("a.jsonl.gz", "cut"),  # garbage in it may be valid, up to the checksum at its end
    ("a.jsonl.zst", "cut"),
    ("a.jsonl.zst", "garbled"),
    ("a.parquet", "cut"),
    ("a.parquet", "garbled"),
  ],
)
def test_damage_is_told_and_what_comes_before_is_read(
  tmp_path: Path, name: str, damage: str
):
  rows = [{"a": n} for n in range(50_000)]
  plain = as_table(rows) if name.endswith("parquet") else as_lines(rows)
  content = compressed(plain, Path(name).suffix)
  half = content[: len(content) // 2]
  garbage = b"\xff" * (len(content) - len(half))
  (tmp_path / name).write_bytes(half + (garbage if damage == "garbled" else b""))
  skipped = Skipped()
  records = list(read_records(tmp_path / name, skipped))
  assert [record.fields for record in records] == rows[: len(records)] != rows
  assert skipped.count == 1
  assert skipped.first.startswith(f"{tmp_path / name}, ")
  assert f" {len(records) + 1}: the " in skipped.first
  assert "cannot be read from here on" in skipped.first and "Errno" not in skipped.first


def test_a_text_in_a_table_that_is_not_utf_8(tmp_path: Path):
  pyarrow = pytest.importorskip("pyarrow")
  raw = pyarrow.array([b"a", b"\xff", b"c"]).cast(pyarrow.string(), safe=False)
  path = tmp_path / "a.parquet"
  pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table({"text": raw}), path)
  skipped = Skipped()
  assert [record.number for record in read_records(path, skipped)] == [1, 3]
  assert skipped.count == 1 and f"{path}, row 2: 'utf-8' codec" in skipped.first


def test_what_is_no_file(tmp_path: Path):
  for path in (tmp_path, tmp_path / "none.jsonl"):
    with pytest.raises(DataError, match="is not a file"):
      list(read_records(path, Skipped()))


@pytest.mark.parametrize(
  ("name", "module"), [("a.parquet", "pyarrow"), ("a.jsonl.zst", ZSTD.partition(".")[0])]
)
def test_a_missing_package_is_named(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str
):
  if module == "compression":
    pytest.skip("a part of Python")
  monkeypatch.setitem(sys.modules, module, None)
  (tmp_path / name).write_bytes(b"x")
  with pytest.raises(ConfigError, match="is not installed") as error:
    list(read_records(tmp_path / name, Skipped()))
  assert error.value.cure.startswith("pip install 'flaxlm[")
