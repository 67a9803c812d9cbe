# SPDX-License-Identifier: Apache-2.0
"""A disk that is full: one line, its exit code, and nothing that was there is lost."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import commands_in_process, tiny, write_corpus

from flaxlm.checkpoint.manifest import NAME
from flaxlm.commands.parsing import open_output
from flaxlm.errors import WriteError
from flaxlm.runs import CONFIG

FULL = "No space left on device"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
  """Makes small disks, in kB."""
  mounted: list[Path] = []

  def make(size: int) -> Path:
    folder = tmp_path / f"disk{len(mounted)}"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
      pytest.skip("mounting a file system needs root")
    mounted.append(folder)
    return folder

  yield make
  for folder in mounted:
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
  """A file that takes all the space that is left."""
  path = folder / "filler"
  with path.open("wb", buffering=0) as file:
    try:
      while True:
        file.write(b"x" * 4096)
    except OSError:
      return path


def told(run: subprocess.CompletedProcess, code: int, *texts: str) -> None:
  """It ended with this code and one message, which has all of the texts."""
  assert run.returncode == code, run.stderr
  assert "Traceback" not in run.stderr and "Errno" not in run.stderr, run.stderr
  said = [line for line in run.stderr.splitlines() if line.startswith("flaxlm: ")]
  assert len(said) == 1, run.stderr
  assert all(text in said[0] for text in texts), said


def test_an_output_that_does_not_fit_is_named():
  refused = pytest.raises(WriteError, match=f"/dev/full cannot be written: {FULL}")
  with refused, open_output("/dev/full") as file:
    print("a result", file=file)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_stdout_is_told(flaxlm, tmp_path: Path, unbuffered: str):
  """Also where the output is written only at the end, by Python itself."""
  (tmp_path / "run/checkpoints/3").mkdir(parents=True)
  (tmp_path / "run/checkpoints/3" / NAME).touch()
  (tmp_path / "run" / CONFIG).touch()
  with Path("/dev/full").open("w") as full:
    run = subprocess.run(
      [sys.executable, "-m", "flaxlm.cli", "ckpt", "list", "run"],
      cwd=tmp_path,
      env=os.environ | flaxlm.environment | {"PYTHONUNBUFFERED": unbuffered},
      stdout=full,
      stderr=subprocess.PIPE,
      text=True,
      timeout=60,
    )
  told(run, 4, "the output cannot be written", FULL)


# -- Real disks ----------------------------------------------------------------------------


@pytest.mark.slow
def test_training_ends_and_goes_on_where_it_was(
  flaxlm, in_process, corpus, disk, tmp_path: Path
):
  """The disk fills while it trains: between two checkpoints, and while one is written. The
  process ends within a test's patience, and the losses are those of a run with space."""

  def arguments(**knobs) -> list[str]:
    usual = dict(training__num_steps=9, optimizer__schedule="constant")
    return ["train", *tiny(corpus, simulated_devices=8, **usual | knobs)]

  whole = in_process(*arguments(name="whole"))
  assert whole.returncode == 0, whole.stderr
  folder = disk(4_000)
  same = dict(name="k", runs_dir=folder)
  begun = in_process(*arguments(**same | dict(training__num_steps=4)))
  assert begun.returncode == 0, begun.stderr
  for spare in (0, 8, 60):
    filler = fill(folder)
    os.truncate(filler, max(0, filler.stat().st_size - 1024 * spare))
    told(flaxlm(*arguments(**same)), 4, str(folder), FULL)
    filler.unlink()
    assert in_process("ckpt", "verify", folder / "k").returncode == 0
  done = in_process(*arguments(**same, checkpoint__resume="must"))
  assert done.returncode == 0, done.stderr
  assert losses(folder / "k") == losses(tmp_path / "runs/whole")


def losses(run_dir: Path) -> dict[int, float]:
  lines = (run_dir / "metrics.jsonl").read_text().splitlines()
  return {m["step"]: m["train/loss"] for m in map(json.loads, lines) if "train/loss" in m}


@pytest.mark.slow
@pytest.mark.parametrize("size", [4, 20, 100, 200])
def test_a_tiny_data_folder_is_told(in_process, corpus, disk, monkeypatch, size: int):
  folder = disk(size)
  monkeypatch.setenv("FLAXLM_DATA_DIR", str(folder))
  told(in_process("train", *tiny(corpus)), 3, f"cannot prepare data in {folder}", FULL)
  assert not list(folder.glob("**/*.partial")), "what did not fit takes no space"


@pytest.fixture(scope="module")
def trained(cache_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A run, and beside it a checkpoint that was exported from it."""
  root = tmp_path_factory.mktemp("trained")
  sizes = {"training__num_steps": 2, "model__width": 32, "name": "run"}
  with pytest.MonkeyPatch.context() as patch, commands_in_process(cache_root) as command:
    patch.chdir(root)
    arguments = tiny(write_corpus(root / "text"), runs_dir=root, **sizes)
    for words in (["train", *arguments], ["export", root / "run", "exported"]):
      done = command(*words)
      assert done.returncode == 0, done.stderr
  return root / "run"


@pytest.mark.slow
def test_jobs_keep_what_is_done(in_process, trained: Path, disk, tmp_path: Path):
  prompts = "".join(json.dumps({"prompt": f"{n} t"}) + "\n" for n in range(64))
  (tmp_path / "in.jsonl").write_text(prompts)
  ask = ["infer", trained]
  job = [*ask, "--prompt-file=in.jsonl", "--max-new-tokens=8", "--batch-size=4"]
  assert in_process(*job, "--output=whole.jsonl").returncode == 0
  folder = disk(12)
  told(in_process(*job, f"--output={folder}/out.jsonl"), 4, "out.jsonl.partial", FULL)
  done = (folder / "out.jsonl.partial").read_text()
  assert done.count("\n") > 1
  shutil.move(folder / "out.jsonl.partial", tmp_path / "out.jsonl.partial")
  run = in_process(*job, "--output=out.jsonl")
  assert run.returncode == 0, run.stderr
  assert (tmp_path / "out.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
  told(in_process(*job, "--output=/dev/full"), 2, "/dev/full is not a file")
  assert Path("/dev/full").is_char_device()
  told(in_process(*ask, "--prompt=1", "--output=/dev/full"), 4, "/dev/full", FULL)


@pytest.mark.slow
@pytest.mark.parametrize("spare", [0, 8, 24, 60])  # kB
@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_an_export_that_does_not_fit_leaves_nothing(
  in_process, trained: Path, disk, spare: int, kind: str
):
  folder = disk(1_000)
  filler = fill(folder)
  os.truncate(filler, max(0, filler.stat().st_size - 1024 * spare))
  run = in_process("export", trained, folder / "out", "--format", kind)
  told(run, 4, str(folder / "out"), FULL)
  assert [*folder.iterdir()] == [filler], "what did not fit takes no space"


@pytest.mark.slow
@pytest.mark.parametrize("spare", [0, 24, 60])
def test_an_import_that_does_not_fit_leaves_nothing(
  in_process, trained: Path, disk, spare: int
):
  folder = disk(1_000)
  filler = fill(folder)
  os.truncate(filler, max(0, filler.stat().st_size - 1024 * spare))
  told(
    in_process("import", trained.parent / "exported", folder / "run"), 4, str(folder), FULL
  )
  assert [*folder.iterdir()] == [filler], "what did not fit takes no space"
