# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: reading gives exactly what was written, or an error."""

import functools
import gc
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flaxlm.checkpoint.manifest import (
  NAME,
  damage,
  is_finished,
  is_interrupted,
  mark_of,
  saved_steps,
  write_manifest,
)
from flaxlm.checkpoint.store import CheckpointStore, settle
from flaxlm.config import CheckpointConfig, Config
from flaxlm.errors import CheckpointError
from flaxlm.runs import find_resume_step, make_room_after, newest_whole_step
from flaxlm.sharding import make_mesh

ROOT = Path(__file__).parent.parent.parent


def bits(seed: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
  """Random bits as numbers: NaNs of all payloads, infinities and subnormals too."""
  dtype = np.dtype(dtype)
  count = int(np.prod(shape)) * dtype.itemsize
  raw = np.random.default_rng(seed).integers(0, 256, count, np.uint8)
  return raw.view(dtype).reshape(shape)


def special_floats() -> np.ndarray:
  """-0.0, infinities, the least subnormal, and NaNs quiet and signalling, as float32."""
  words = [0x80000000, 0x7F800000, 0xFF800000, 0x00000001, 0x7FC00000, 0x7FC12345]
  return np.array([*words, 0xFF800001, 0x7F812345], np.uint32).view(np.float32)


def trees(seed: int) -> dict[str, Any]:
  """Host arrays as they may lie in a training state."""
  params = {
    "embedding": {"table": bits(seed, (64, 16), np.float32)},
    "half": {"kernel": bits(seed + 1, (16, 8), jnp.bfloat16)},
    "special": special_floats(),
    "scalar": np.float32(-0.0),
  }
  opt_state = (
    {"count": np.int32(seed), "mu": bits(seed + 2, (8, 8), np.int32)},
    [bits(seed + 3, (16,), jnp.bfloat16)],
  )
  return {"params": params, "opt_state": opt_state}


def placed(tree: Any, mesh: Mesh) -> Any:
  """On the mesh: what divides is cut over its rows, then over both dims, else copied."""

  def place(x: Any) -> jax.Array:
    if mesh.shape["tensor"] > 1 and np.ndim(x) == 2:
      spec = PartitionSpec("data", "tensor")
    elif np.ndim(x) and x.shape[0] % mesh.shape["fsdp"] == 0:
      spec = PartitionSpec("fsdp")
    else:
      spec = PartitionSpec()
    return jax.device_put(x, NamedSharding(mesh, spec))

  return jax.tree.map(place, tree)


def abstract(tree: Any) -> Any:
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
  )


def assert_same_bits(a: Any, b: Any) -> None:
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    x, y = np.asarray(x), np.asarray(y)
    assert (x.dtype, x.shape) == (y.dtype, y.shape)
    assert x.tobytes() == y.tobytes()


@pytest.fixture(scope="module")
def fsdp() -> Mesh:
  return make_mesh({"fsdp": 8})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, fsdp: Mesh) -> Path:
  """A directory with the whole steps 2 and 4; tests copy it before they break it."""
  directory = tmp_path_factory.mktemp("saved") / "checkpoints"
  store = CheckpointStore(directory, keep=2)
  for step in (2, 4):
    store.save(step, **placed(trees(step), fsdp), progress={"step": step, "a": ["é", None]})
  store.close()
  return directory


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
  return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


@pytest.fixture
def store(copied: Path) -> Iterator[CheckpointStore]:
  store = CheckpointStore(copied, keep=2)
  yield store
  store.close()


def files_of(step_dir: Path) -> list[Path]:
  return sorted(path for path in step_dir.rglob("*") if path.is_file())


# -- What is read is what was written ------------------------------------------------------


@pytest.mark.parametrize("step", [2, 4])
def test_every_bit_comes_back(store: CheckpointStore, fsdp: Mesh, step: int):
  state = placed(trees(step), fsdp)
  restored = store.restore(step, **{name: abstract(tree) for name, tree in state.items()})
  assert_same_bits(restored, state)
  assert_same_bits(restored, trees(step))
  assert restored.keys() == state.keys()
  for new, old in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
    assert new.sharding == old.sharding
  assert store.restore_progress(step) == {"step": step, "a": ["é", None]}


def test_a_part_can_be_read_alone(store: CheckpointStore, fsdp: Mesh):
  params = placed(trees(4)["params"], fsdp)
  restored = store.restore(4, params=abstract(params))
  assert restored.keys() == {"params"}
  assert_same_bits(restored["params"], params)


def test_every_bit_comes_back_on_another_mesh(store: CheckpointStore):
  mesh = make_mesh({"data": 2, "tensor": 4})
  state = placed(trees(4), mesh)
  restored = store.restore(4, **{name: abstract(tree) for name, tree in state.items()})
  assert_same_bits(restored, trees(4))
  table = restored["params"]["embedding"]["table"]
  assert table.sharding.shard_shape(table.shape) == (32, 4)


@pytest.mark.parametrize(
  "change",
  [
    lambda tree, mesh: tree | {"extra": tree["scalar"]},
    lambda tree, mesh: {name: x for name, x in tree.items() if name != "scalar"},
    lambda tree, mesh: tree | {"special": tree["special"].reshape(2, 4)},
    lambda tree, mesh: tree | {"special": tree["special"][:4]},
    lambda tree, mesh: tree | {"special": np.tile(tree["special"], 2)},
    lambda tree, mesh: tree | {"half": tree["half"]["kernel"]},
  ],
  ids=["extra", "missing", "other rank", "shorter", "longer", "flatter"],
)
def test_a_tree_that_does_not_fit_is_refused(store, fsdp: Mesh, change: Any):
  tree = change(trees(4)["params"], fsdp)
  mesh = make_mesh({"data": 8})
  target = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      np.shape(x), x.dtype, sharding=NamedSharding(mesh, PartitionSpec())
    ),
    tree,
  )
  with pytest.raises(CheckpointError, match="does not fit this model") as caught:
    store.restore(4, params=target)
  assert any(name in caught.value.cause for name in ("extra", "scalar", "special", "half"))
  # Orbax's coroutines, cut off while reading, would complain here. A full collection takes
  # three seconds of a process with many compiled programs.
  gc.collect(1)


def test_a_step_that_is_not_there_is_a_checkpoint_error(store: CheckpointStore, fsdp: Mesh):
  with pytest.raises(CheckpointError, match="3"):
    store.restore(3, params=abstract(placed(trees(4)["params"], fsdp)))
  with pytest.raises(CheckpointError, match="3"):
    store.restore_progress(3)


# -- Damage --------------------------------------------------------------------------------


def test_a_whole_step_has_no_damage(saved: Path):
  assert saved_steps(saved) == [2, 4]
  assert damage(saved / "2") == damage(saved / "4") == []
  assert newest_whole_step(saved, warn=pytest.fail) == 4


def test_the_manifest_knows_every_file(saved: Path):
  listed = json.loads((saved / "4" / NAME).read_text())["files"]
  present = {str(path.relative_to(saved / "4")) for path in files_of(saved / "4")}
  assert present - set(listed) == {NAME}
  assert set(listed) <= present
  assert len(listed) > 10  # arrays and their metadata, not the progress alone


def test_every_flipped_bit_is_found(copied: Path):
  """40 bits, each somewhere in all the bytes of a step, the manifest's own included."""
  step_dir = copied / "4"
  files = files_of(step_dir)
  sizes = [path.stat().st_size for path in files]
  rng = random.Random(0)
  for _ in range(40):
    (path,) = rng.choices(files, sizes)
    whole = path.read_bytes()
    broken = bytearray(whole)
    at = rng.randrange(len(whole))
    broken[at] ^= 1 << rng.randrange(8)
    path.write_bytes(broken)
    found = damage(step_dir)
    assert found, f"{path}: byte {at}"
    if path.name != NAME:
      assert found == [f"{path.relative_to(step_dir)}: damaged (SHA-256 differs)"]
    path.write_bytes(whole)
  assert damage(step_dir) == []


def test_every_file_that_is_cut_lost_or_added_is_found(copied: Path):
  step_dir = copied / "4"
  for path in files_of(step_dir):
    name, whole = str(path.relative_to(step_dir)), path.read_bytes()
    if whole:
      path.write_bytes(whole[: len(whole) // 2])
      assert any(name in line for line in damage(step_dir)), name
    path.unlink()
    assert any(name in line for line in damage(step_dir)), name
    path.write_bytes(whole)
    extra = path.with_name("stranger")
    extra.write_bytes(b"")
    relative = str(extra.relative_to(step_dir))
    assert damage(step_dir) == [f"{relative}: not in the manifest"]
    extra.unlink()
  assert damage(step_dir) == []


def test_a_second_manifest_deeper_down_is_a_stranger_too(copied: Path):
  extra = copied / "4" / "params" / NAME
  extra.write_text("{}")
  assert damage(copied / "4") == [f"params/{NAME}: not in the manifest"]


def test_files_swapped_between_steps_are_found(copied: Path):
  (old,), (new,) = ([*(copied / step / "progress").glob("metadata")] for step in "24")
  assert old.read_bytes() != new.read_bytes()
  shutil.copy(old, new)
  assert damage(copied / "4") == ["progress/metadata: damaged (SHA-256 differs)"]


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"files": 3}', '{"files": {"a": 3}}'])
def test_a_manifest_of_another_shape_is_damage(copied: Path, text: str):
  (copied / "4" / NAME).write_text(text)
  assert damage(copied / "4")[0].startswith(NAME)


def flip(step_dir: Path) -> None:
  path = max(files_of(step_dir / "params"), key=lambda path: path.stat().st_size)
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def test_the_older_step_stands_in_for_a_damaged_one(copied: Path):
  flip(copied / "4")
  warnings: list[str] = []
  assert newest_whole_step(copied, warnings.append) == 2
  assert len(warnings) == 1
  assert str(copied / "4") in warnings[0]
  assert newest_whole_step(copied) == 2
  flip(copied / "2")
  with pytest.raises(CheckpointError, match="every checkpoint") as caught:
    newest_whole_step(copied, warnings.append)
  assert "--checkpoint.resume=never" in caught.value.cure


def test_nothing_saved_is_no_step(tmp_path: Path):
  assert newest_whole_step(tmp_path) is None
  assert newest_whole_step(tmp_path / "absent") is None
  (tmp_path / "7").mkdir()  # empty
  (tmp_path / "notes.txt").write_text("")
  assert newest_whole_step(tmp_path) is None


# -- Going on ------------------------------------------------------------------------------


def cut_off(step_dir: Path) -> None:
  """As a kill between Orbax's commit and our manifest leaves it."""
  mark_of(step_dir).touch()
  (step_dir / NAME).unlink()
  assert not is_finished(step_dir)


def test_an_interrupted_step_does_not_count_and_can_be_saved_again(
  copied: Path, fsdp: Mesh
):
  cut_off(copied / "4")
  (copied / "5.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
  (copied / "notes").mkdir()
  assert saved_steps(copied) == [2]
  make_room_after(copied, 2)
  assert sorted(path.name for path in copied.iterdir()) == ["2", "notes"]
  again = CheckpointStore(copied, keep=2)
  again.save(4, **placed(trees(40), fsdp), progress={})
  again.close()
  assert newest_whole_step(copied, warn=pytest.fail) == 4


def test_a_lost_manifest_is_damage_and_nothing_is_deleted(copied: Path):
  """A good checkpoint may have lost its manifest, as a copy has: it is kept."""
  kept = {path.name: path.read_bytes() for path in files_of(copied / "4")}
  kept.pop(NAME)
  (copied / "4" / NAME).unlink()
  assert saved_steps(copied) == [2, 4]
  assert damage(copied / "4") == [f"{NAME}: missing"]
  warnings: list[str] = []
  assert newest_whole_step(copied, warnings.append) == 2
  assert warnings == [f"checkpoint {copied / '4'} is damaged: {NAME}: missing"]
  make_room_after(copied, 2)
  assert saved_steps(copied) == [2]
  left = {path.name: path.read_bytes() for path in files_of(copied / "damaged-4")}
  assert left == kept
  (copied / "2" / NAME).unlink()
  with pytest.raises(CheckpointError, match="every checkpoint"):
    newest_whole_step(copied)
  assert saved_steps(copied) == [2]


def test_a_lost_manifest_stays_when_others_are_rotated_away(copied: Path, fsdp: Mesh):
  (copied / "2" / NAME).unlink()
  store = CheckpointStore(copied, keep=1)
  store.save(6, **placed(trees(6), fsdp), progress={})
  store.close()
  assert saved_steps(copied) == [2, 6]
  assert not list(copied.glob(".*")), "what is saved has no mark"


def test_a_copy_beside_the_steps_is_in_nobodys_way(copied: Path):
  shutil.copytree(copied / "4", copied / "4.bak")
  (copied / "4.bak" / NAME).unlink()
  (copied / "007").mkdir()
  make_room_after(copied, 2)
  names = sorted(path.name for path in copied.iterdir())
  assert names == ["007", "2", "4.bak", "damaged-4"]


def test_an_open_store_saves_again_what_was_damaged(copied: Path, fsdp: Mesh):
  """A run that resumes opens its store once, before it makes room."""
  flip(copied / "4")
  store = CheckpointStore(copied, keep=2)
  assert store.restore_progress(2)
  make_room_after(copied, 2)
  store.reload()
  store.save(4, **placed(trees(40), fsdp), progress={})
  store.close()
  assert newest_whole_step(copied, warn=pytest.fail) == 4


def test_damaged_later_steps_are_kept_under_other_names(copied: Path):
  """Also when the same step is damaged twice."""
  kept = []
  for _ in range(2):
    shutil.copytree(copied / "2", copied / "4", dirs_exist_ok=True)
    flip(copied / "4")
    kept.append({path.name: path.read_bytes() for path in files_of(copied / "4")})
    make_room_after(copied, 2)
    assert saved_steps(copied) == [2]
  for name, content in zip(("damaged-4", "damaged-4.1"), kept, strict=True):
    assert {path.name: path.read_bytes() for path in files_of(copied / name)} == content
  assert len(list(copied.glob("damaged-4*"))) == 2


def test_a_file_with_a_number_for_a_name_is_in_nobodys_way(copied: Path):
  (copied / "12").write_text("a note")
  make_room_after(copied, 4)
  assert saved_steps(copied) == [2, 4]


def test_a_run_resumes_as_its_config_says(copied: Path, tmp_path: Path):
  """`never` starts anew and keeps what is there; `must` needs a checkpoint."""

  def step(resume: str) -> int:
    checkpoint = CheckpointConfig(resume=resume)
    cfg = Config(name=tmp_path.name, runs_dir=str(tmp_path.parent), checkpoint=checkpoint)
    return find_resume_step(cfg)

  assert (step("auto"), step("must"), step("never")) == (4, 4, 0)
  assert saved_steps(copied) == [2, 4], "asking changes nothing"
  for number in (1, 2):
    make_room_after(copied, 0)
    assert saved_steps(copied.with_name(f"checkpoints.{number}")) == [2, 4]
    assert not copied.exists()
    if number == 1:
      shutil.copytree(copied.with_name("checkpoints.1"), copied)
  assert step("auto") == 0
  with pytest.raises(CheckpointError, match="no checkpoint to resume from"):
    step("must")


def test_keep_is_how_many_are_kept(copied: Path, fsdp: Mesh):
  store = CheckpointStore(copied, keep=2)
  for step in (6, 9):
    store.save(step, **placed(trees(step), fsdp), progress={})
    store.wait()
    assert len(saved_steps(copied)) == 2
  store.close()
  assert sorted(path.name for path in copied.iterdir()) == ["6", "9"]
  assert newest_whole_step(copied, warn=pytest.fail) == 9


def test_a_step_is_saved_once(store: CheckpointStore, copied: Path, fsdp: Mesh):
  before = (copied / "4" / NAME).read_bytes()
  with pytest.raises(CheckpointError, match="step 4 is there already"):
    store.save(4, **placed(trees(5), fsdp), progress={})
  store.wait()
  assert (copied / "4" / NAME).read_bytes() == before
  assert damage(copied / "4") == []


def test_saving_copies_before_it_returns(tmp_path: Path, fsdp: Mesh):
  """Training donates the arrays to the next step while they are being written."""
  store = CheckpointStore(tmp_path / "checkpoints")
  state = placed(trees(1), fsdp)
  target = {name: abstract(tree) for name, tree in state.items()}
  store.save(1, **state, progress={})
  for leaf in jax.tree.leaves(state):
    leaf.delete()
  store.wait()
  assert_same_bits(store.restore(1, **target), trees(1))
  store.close()


# -- A disk that does not take it ----------------------------------------------------------

# In a process of its own: Orbax leaves threads behind when a write fails.
FAILING = """
import gc, shutil, sys
from pathlib import Path
import absl.logging
import jax.numpy as jnp
import numpy as np
from flaxlm.checkpoint.manifest import saved_steps
from flaxlm.runs import newest_whole_step
from flaxlm.checkpoint.store import CheckpointStore
from flaxlm.errors import CheckpointError

directory = Path(sys.argv[1])
absl.logging.set_verbosity("info")  # as a library may
arrays = np.random.default_rng(0).normal(size=(40, 80, 80))
state = dict(params={f"a{i}": jnp.asarray(array) for i, array in enumerate(arrays)},
             opt_state={"n": jnp.int32(3)}, progress={})
store = CheckpointStore(directory, keep=1)
store.save(1, **state)
store.wait()
BREAK
try:
  store.save(2, **state)
  store.wait()
except CheckpointError as e:
  print("refused", e.cause)
WHILE_BROKEN
store.close()
gc.collect()
print("closed")
"""


def fail(directory: Path, breaking: str, after: str = "") -> subprocess.CompletedProcess:
  code = FAILING.replace("BREAK", breaking, 1).replace("WHILE_BROKEN", after)
  return subprocess.run(
    [sys.executable, "-c", code, str(directory)],
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=30,
  )


def test_a_full_disk_is_told_by_wait_and_the_older_step_survives(tmp_path: Path):
  """No file may grow beyond 100 kB: what a full disk looks like to the writer."""
  limit = "import resource; limits = (100_000, resource.RLIM_INFINITY)\n"
  limit += "resource.setrlimit(resource.RLIMIT_FSIZE, limits)"
  after = "assert saved_steps(directory) == [1] and newest_whole_step(directory) == 1"
  result = fail(tmp_path / "checkpoints", limit, after)
  assert result.stdout.startswith("refused step 2 could not be saved below")
  assert saved_steps(tmp_path / "checkpoints") == [1]
  # One cause: neither Orbax's own report nor a traceback from `close`.
  assert (result.returncode, result.stderr) == (0, "")
  assert result.stdout.splitlines()[-1] == "closed"


def test_a_failed_save_waits_for_the_writes_that_go_on(tmp_path: Path, monkeypatch):
  """Else they would make folders again that an import has removed."""
  directory = tmp_path / "run/checkpoints"

  def write() -> None:
    for n in range(5):
      time.sleep(0.02)
      late = directory / f"late/{n}"
      late.parent.mkdir(parents=True, exist_ok=True)
      late.touch()

  def fail() -> None:
    writer.start()
    raise OSError(28, "No space left on device")

  writer = threading.Thread(target=write)
  patient = functools.partial(settle, quiet=1.0)  # whatever else the machine does
  monkeypatch.setattr("flaxlm.checkpoint.store.settle", patient)
  store = CheckpointStore(directory)
  with monkeypatch.context() as patch:
    patch.setattr(store._manager, "wait_until_finished", fail)
    with pytest.raises(CheckpointError, match="No space left"):
      store.save(1, **trees(1), progress={})
      store.wait()
    assert not writer.is_alive()
  store.close()


def test_a_directory_that_cannot_be_written_is_told_and_ends(tmp_path: Path):
  breaking = "shutil.rmtree(directory)\ndirectory.write_text('in the way')"
  result = fail(tmp_path / "checkpoints", breaking)
  assert result.stdout.startswith("refused step 2 could not be saved below")
  assert (result.returncode, result.stderr) == (0, "")


def test_the_only_good_step_stays_until_the_next_is_whole(tmp_path: Path):
  """With keep=1, an end between the arrays and the manifest must leave the older step."""
  breaking = """
def no_space(event, arguments):
  if event == "open" and "MANIFEST" in str(arguments[0]) and arguments[1] == "w":
    raise OSError(28, "No space left on device")
sys.addaudithook(no_space)
"""
  result = fail(tmp_path / "checkpoints", breaking)
  assert result.stdout.startswith("refused step 2 could not be saved below")
  assert "No space left on device" in result.stdout
  assert newest_whole_step(tmp_path / "checkpoints") == 1
  assert is_interrupted(tmp_path / "checkpoints" / "2"), "and may be deleted"


def test_a_manifest_is_whole_or_absent(copied: Path):
  """Rewriting leaves no temporary file behind, and describes what is there now."""
  flip(copied / "4")
  write_manifest(copied / "4")
  assert damage(copied / "4") == []
  assert not list((copied / "4").glob(".*"))
