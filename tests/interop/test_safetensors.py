# SPDX-License-Identifier: Apache-2.0
"""Safetensors files: what is written is read back, and only whole files are read."""

import json
import math
import struct
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flaxlm.errors import CheckpointError
from flaxlm.interop.safetensors import (
  INDEX,
  MAX_HEADER_BYTES,
  open_checkpoint,
  plan_files,
  read_header,
  write_files,
)

SHAPES = {"a": (3, 4), "b.c": (), "d": (0, 5), "e": (7,)}


def written(folder: Path, dtype: Any = np.float32, most: int = 10**6) -> dict[str, Any]:
  rng = np.random.default_rng(0)
  arrays = {n: rng.normal(size=shape).astype(dtype) for n, shape in SHAPES.items()}
  write_files(folder, SHAPES, np.dtype(dtype), most, arrays.__getitem__)
  return arrays


def raw(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
  return path


def entry(first: int, last: int, **changes: Any) -> dict[str, Any]:
  shape = [(last - first) // 4]
  return {"dtype": "F32", "shape": shape, "data_offsets": [first, last]} | changes


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
@pytest.mark.parametrize("most", [1, 30, 10**6])
def test_what_is_written_is_read(tmp_path: Path, dtype: Any, most: int):
  arrays = written(tmp_path, dtype, most)
  tensors = open_checkpoint(tmp_path)
  assert tensors.keys() == arrays.keys()
  for name, array in arrays.items():
    found = tensors[name].read()
    assert found.dtype == array.dtype and found.tobytes() == array.tobytes()
    assert found.shape == array.shape
  assert (tmp_path / INDEX).exists() == (most < 10**6)


def test_other_readers_read_it(tmp_path: Path):
  library = pytest.importorskip("safetensors.numpy")
  arrays = written(tmp_path)
  found = library.load_file(tmp_path / "model.safetensors")
  assert {name: x.tolist() for name, x in found.items()} == {
    name: x.tolist() for name, x in arrays.items()
  }


@given(
  st.dictionaries(st.text(max_size=3), st.integers(0, 50), min_size=1), st.integers(1, 99)
)
def test_files_are_filled_in_order_and_none_too_far(sizes: dict[str, int], most: int):
  files = plan_files(sizes, most)
  assert [name for names in files for name in names] == list(sizes)
  for names in files:
    assert len(names) == 1 or sum(sizes[name] for name in names) <= most


# -- What is no safetensors file -----------------------------------------------------------

BROKEN: dict[str, tuple[Any, bytes]] = {
  "not JSON": (b"{", b""),
  "not an object": (b"[]", b""),
  "a name twice": (b'{"a": {}, "a": {}}', b""),
  "no dtype": ({"a": {"shape": [1], "data_offsets": [0, 4]}}, b"1234"),
  "an entry that is a number": ({"a": 1}, b""),
  "an unknown dtype": ({"a": entry(0, 4, dtype="F7")}, b"1234"),
  "a shape too large": ({"a": entry(0, 4, shape=[2])}, b"1234"),
  "a negative size": ({"a": entry(0, 4, shape=[-1])}, b"1234"),
  "two negative sizes": ({"a": entry(0, 4, shape=[-1, -1])}, b"1234"),
  "a size that is true": ({"a": entry(0, 4, shape=[True])}, b"1234"),
  "too many dims": ({"a": entry(0, 4, shape=[1] * 9)}, b"1234"),
  "bytes past the end": ({"a": entry(0, 8)}, b"1234"),
  "bytes left over": ({"a": entry(0, 4)}, b"12345678"),
  "a hole": ({"a": entry(4, 8)}, b"12345678"),
  "an overlap": ({"a": entry(0, 8), "b": entry(4, 8)}, b"12345678"),
  "ends before it begins": ({"a": entry(0, 4, data_offsets=[4, 0])}, b"1234"),
  "nested too deep": (b"[" * 100_000, b""),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_file_is_refused(tmp_path: Path, broken: str):
  header, data = BROKEN[broken]
  with pytest.raises(CheckpointError):
    read_header(raw(tmp_path / "x.safetensors", header, data))


@pytest.mark.parametrize("length", [2**63, 10**6, MAX_HEADER_BYTES + 1])
def test_a_header_may_not_be_longer_than_its_file_or_the_cap(tmp_path: Path, length: int):
  path = raw(tmp_path / "x.safetensors", {}, length=length)
  with pytest.raises(CheckpointError, match="cut short"):
    read_header(path)
  with path.open("r+b") as file:
    file.truncate(MAX_HEADER_BYTES + 100)  # sparse
  with pytest.raises(CheckpointError):
    read_header(path)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path):
  written(tmp_path)
  whole = (tmp_path / "model.safetensors").read_bytes()
  for size in range(len(whole)):
    (tmp_path / "cut.safetensors").write_bytes(whole[:size])
    with pytest.raises(CheckpointError):
      read_header(tmp_path / "cut.safetensors")


def test_a_header_as_long_as_a_pickle_begins_is_none(tmp_path: Path):
  text = json.dumps({"a": entry(0, 4)}).encode()
  path = raw(tmp_path / "x.safetensors", text + b" " * (0x0280 - len(text)), b"1234")
  assert path.read_bytes().startswith(b"\x80\x02")
  assert read_header(path).keys() == {"a"}


@pytest.mark.parametrize("start", [b"PK\x03\x04", b"\x80\x02", b"\x80\x04\x95"])
def test_a_pickle_is_refused_with_the_reason(tmp_path: Path, start: bytes):
  (tmp_path / "model.safetensors").write_bytes(start + b"\0" * 64)
  with pytest.raises(CheckpointError, match="run any code"):
    open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "x.ckpt", "x.pth"])
def test_a_folder_of_pickles_is_refused_by_name(tmp_path: Path, name: str):
  (tmp_path / name).write_bytes(b"")
  with pytest.raises(CheckpointError, match="run any code"):
    open_checkpoint(tmp_path)


@settings(max_examples=300)
@given(st.data())
def test_no_file_does_more_than_fail(tmp_path_factory, data: Any):
  """A valid file with bytes changed, inserted or removed is either read or refused."""
  folder = tmp_path_factory.getbasetemp() / "fuzz"
  folder.mkdir(exist_ok=True)
  written(folder)
  path = folder / "model.safetensors"
  content = bytearray(path.read_bytes())
  for _ in range(data.draw(st.integers(1, 4))):
    at = data.draw(st.integers(0, min(len(content), 300)))
    content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
  path.write_bytes(content)
  try:
    tensors = open_checkpoint(folder)
    for tensor in tensors.values():
      assert tensor.read().nbytes <= len(content)
      assert math.prod(tensor.shape) <= len(content)
  except CheckpointError:
    pass


# -- The index -----------------------------------------------------------------------------


def index(folder: Path, weight_map: Any) -> None:
  (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


TRICKS = ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "", ".", 5]
TRICKS += ["a\\model.safetensors", "model.safetensors\0", None, ["model.safetensors"], {}]


@pytest.mark.parametrize("trick", TRICKS, ids=repr)
def test_an_index_names_only_files_beside_it(tmp_path: Path, trick: Any):
  written(tmp_path)
  (tmp_path / "in").mkdir()
  index(tmp_path / "in", {"a": trick})
  with pytest.raises(CheckpointError, match="names the file"):
    open_checkpoint(tmp_path / "in")


def test_an_index_may_not_name_a_pickle(tmp_path: Path):
  index(tmp_path, {"a": "pytorch_model-00001-of-00002.bin"})
  with pytest.raises(CheckpointError, match="run any code"):
    open_checkpoint(tmp_path)


def test_an_index_and_its_files_agree(tmp_path: Path):
  written(tmp_path)
  (tmp_path / "model.safetensors").rename(tmp_path / "part.safetensors")
  everything = dict.fromkeys(SHAPES, "part.safetensors")
  index(tmp_path, everything)
  assert open_checkpoint(tmp_path).keys() == SHAPES.keys()
  index(tmp_path, everything | {"more": "part.safetensors"})
  with pytest.raises(CheckpointError, match="more is not in"):
    open_checkpoint(tmp_path)
  index(tmp_path, {"a": "part.safetensors"})
  with pytest.raises(CheckpointError, match="does not list"):
    open_checkpoint(tmp_path)
  index(tmp_path, {"a": "gone.safetensors"})
  with pytest.raises(CheckpointError, match="does not exist"):
    open_checkpoint(tmp_path)


def test_one_file_counts_beside_an_index(tmp_path: Path):
  """As in transformers, which leaves the index of an earlier save where it is."""
  written(tmp_path)
  index(tmp_path, {"a": "gone.safetensors"})
  assert open_checkpoint(tmp_path).keys() == SHAPES.keys()


JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
  lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
  max_leaves=5,
)


@given(JSON)
def test_any_index_is_read_or_refused(tmp_path_factory, weight_map: Any):
  folder = tmp_path_factory.getbasetemp() / "index"
  folder.mkdir(exist_ok=True)
  index(folder, weight_map)
  with pytest.raises(CheckpointError):
    open_checkpoint(folder)
