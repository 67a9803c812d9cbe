# SPDX-License-Identifier: Apache-2.0
"""Runs of adapters: what they store, how they find their base again, what they refuse."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import slow
from test_begin import Commands, commands, evaluation, fields, folder, losses

from flaxlm.decoding.loading import load_run
from flaxlm.interop.safetensors import open_checkpoint
from flaxlm.sharding import make_mesh

pytestmark = pytest.mark.slow  # nn/test_lora.py has the fast ones

__all__ = ["commands", "folder"]  # fixtures

LORA = {"lora__rank": 4, "optimizer__learning_rate": 0.01, "optimizer__warmup_steps": 0}


@pytest.fixture(scope="module")
def adapted(commands: Commands, folder: Path) -> Iterator[str]:
  """A run of three steps of adapters over the imported one."""
  more = {"training__eval_every_steps": 100, "data__seq_len": 128}
  done = commands("train", *fields("imported", "adapted", **LORA, **more))
  assert done.returncode == 0, done.stderr
  yield done.stderr


def test_adapters_learn_and_are_stored_alone(
  commands: Commands, folder: Path, adapted: str
):
  assert "parameters of adapters, over" in adapted
  assert "no adapters change embedding" in adapted
  found = losses(folder, "adapted")
  assert found[3] < found[1]
  metadata = next((folder / "runs/adapted/checkpoints/3/params").rglob("_METADATA"))
  assert "lora_a" in metadata.read_text() and "kernel" not in metadata.read_text()
  # Merged, they give what training had measured.
  words = ("eval", "adapted", "--corpus=files:text", "--split=validation", "--json")
  done = commands(*words)
  assert done.returncode == 0, done.stderr
  wanted = evaluation(folder, "adapted")["eval/loss"]
  assert json.loads(done.stdout)["eval/loss"] == pytest.approx(wanted, rel=1e-5)
  assert commands("ckpt", "verify", "adapted").returncode == 0


def test_an_export_merges(commands: Commands, folder: Path, adapted: str):
  done = commands("export", "adapted", "merged")
  assert done.returncode == 0, done.stderr
  base, found = open_checkpoint(folder / "hub"), open_checkpoint(folder / "merged")
  changed = {name for name in base if (base[name].read() != found[name].read()).any()}
  assert base.keys() == found.keys()
  assert changed == {name for name in base if "_proj" in name}
  done = commands("import", "merged", "runs/merged")
  assert done.returncode == 0, done.stderr
  mesh = make_mesh({"data": -1})
  runs = [load_run(folder / "runs" / name, mesh) for name in ("adapted", "merged")]
  same = lambda a, b: np.testing.assert_array_equal(a, b)
  jax.tree.map(same, runs[0].params, runs[1].params)


def test_adapters_go_out_and_come_in_alone(commands: Commands, folder: Path, adapted: str):
  done = commands("export", "adapted", "alone", "--adapter")
  assert done.returncode == 0 and "adapter of a llama" in done.stdout, done.stderr
  done = commands("import", "alone", "runs/alone", "--base=imported")
  assert done.returncode == 0, done.stderr
  assert "adapters of rank 4 over imported" in done.stdout
  assert commands("ckpt", "verify", "alone").returncode == 0
  mesh = make_mesh({"data": -1})
  runs = [load_run(folder / "runs" / name, mesh) for name in ("adapted", "alone")]
  close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6)
  jax.tree.map(close, runs[0].params, runs[1].params)
  talk = ("--interactive", "--temperature=0", "--max-new-tokens=3")
  assert commands("infer", "alone", *talk, input="hi\n").returncode == 0
  for words, code, said in (
    (("train", *fields("imported", "alone")), 4, "was not trained here"),
    (("import", "alone", "runs/more"), 4, "--base"),
    (("import", "hub", "runs/more", "--base=imported"), 4, "leave it out"),
    (("export", "imported", "more", "--adapter"), 2, "has no adapters"),
    (("export", "adapted", "more", "--adapter", "--format=gguf"), 2, "leave out --format"),
  ):
    done = commands(*words)
    assert done.returncode == code and said in done.stderr, done.stderr


def test_they_resume_as_if_they_had_never_stopped(commands: Commands, folder: Path):
  more = {"training__num_steps": 5, "checkpoint__every_steps": 2, "lora__dropout": 0.1}
  arguments = fields("trained", "adapted-halves", **LORA, **more)
  done = commands("train", *arguments)
  assert done.returncode == 0, done.stderr
  whole = losses(folder, "adapted-halves")
  shutil.rmtree(folder / "runs/adapted-halves/checkpoints/5")
  done = commands("train", *arguments)
  assert "resuming runs/adapted-halves at step 4" in done.stderr
  assert losses(folder, "adapted-halves") == whole and len(whole) == 5
  other = fields("trained", "adapted-halves", **(LORA | more | {"lora__rank": 2}))
  done = commands("train", *other)
  assert done.returncode == 4 and "lora.rank was 4, now 2" in done.stderr


@pytest.mark.parametrize("base", [slow("full"), "int8"])
def test_on_any_mesh(commands: Commands, folder: Path, base: str):
  both = []
  for mesh in ("data=8", "data=2,fsdp=2,tensor=2"):
    name = f"adapted-{base}-{mesh[5]}"
    more = {"mesh": mesh, "lora__base_weights": base}
    done = commands("train", *fields("imported", name, **LORA, **more))
    assert done.returncode == 0, done.stderr
    both.append(list(losses(folder, name).values()))
  assert both[0] == pytest.approx(both[1], rel=1e-4)
  done = commands("eval", name, "--corpus=files:text", "--split=validation", "--json")
  assert done.returncode == 0, done.stderr
  wanted = evaluation(folder, name)["eval/loss"]
  assert json.loads(done.stdout)["eval/loss"] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.slow
def test_rank_zero_is_off(commands: Commands, folder: Path):
  for name, more in (("no-rank", {}), ("rank-zero", {"lora__rank": 0, "lora__alpha": 3})):
    done = commands("train", *fields("trained", name, **more))
    assert done.returncode == 0, done.stderr
  assert losses(folder, "no-rank") == losses(folder, "rank-zero")


@pytest.mark.slow
def test_adapters_over_adapters(commands: Commands, folder: Path, adapted: str):
  still = LORA | {"optimizer__learning_rate": 0.0, "data__seq_len": 128}
  done = commands("train", *fields("adapted", "twice", **still))
  assert done.returncode == 0, done.stderr
  found, wanted = (evaluation(folder, name)["eval/loss"] for name in ("twice", "adapted"))
  assert found == pytest.approx(wanted, rel=1e-5)


def test_without_their_base_they_are_nothing(
  commands: Commands, folder: Path, adapted: str, tmp_path: Path
):
  """It may move with them. Gone or changed, it is an error that names it."""
  root = folder / "elsewhere"
  root.mkdir()
  for name in ("imported", "adapted"):
    shutil.copytree(folder / "runs" / name, root / name)
  hidden = folder / "runs" / "hidden"
  (folder / "runs" / "imported").rename(hidden)
  infer = ("infer", root / "adapted", "--prompt=the", "--max-new-tokens=1")
  try:
    done = commands(*infer)
    assert done.returncode == 0, done.stderr
    own = root / "imported" / "checkpoints" / "0" / "MANIFEST.json"
    whole = own.read_text()
    victim = max((own.parent / "params").rglob("*"), key=lambda p: p.stat().st_size)
    data = victim.read_bytes()
    victim.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    damaged = commands(*infer)
    own.write_text(whole + "\n")
    other = commands(*infer)
    shutil.rmtree(root / "imported")
    gone = commands(*infer)
  finally:
    hidden.rename(folder / "runs" / "imported")
  for done, said in (
    (damaged, "it is damaged: "),
    (other, "another checkpoint is there"),
    (gone, "it is gone"),
  ):
    assert done.returncode == 4 and "Traceback" not in done.stderr
    assert f"has adapters of {folder / 'runs/imported'} at step 0" in done.stderr
    assert said in done.stderr


@pytest.mark.parametrize(
  ("init", "knobs", "code", "said"),
  [
    ("none", {"data__seq_len": 16}, 2, "lora.rank=4 adapts the parameters of another run"),
    (
      "trained",
      {"lora__targets": "query"},
      2,
      "lora.targets='query' matches no projection",
    ),
    ("trained", {"lora__targets": "(q"}, 2, "lora.targets='(q' is no regular expression"),
    ("trained", {"lora__rank": -1}, 2, "lora.rank is -1"),
    ("trained", {"init_optimizer": True}, 2, "init_optimizer has no moments of adapters"),
    ("trained", {"lora__alpha": 0.0}, 2, "lora.alpha is 0.0"),
  ],
)
def test_what_cannot_be_is_refused_in_a_line(
  commands: Commands, folder: Path, init: str, knobs: dict[str, Any], code: int, said: str
):
  done = commands("train", *fields(init, **({"name": "refused"} | LORA | knobs)))
  assert done.returncode == code, done.stderr
  assert said in done.stderr and "Traceback" not in done.stderr
  assert not (folder / "runs" / "refused").exists()
