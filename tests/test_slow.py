# SPDX-License-Identifier: Apache-2.0
"""Tests that take minutes: the default run, and a wheel outside the checkout."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, fuzz, tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.mark.usefixtures("compiled_for_users")
@pytest.mark.parametrize("num_steps", [320, fuzz(None)])
def test_default_run_beats_gzip(flaxlm, tmp_path, num_steps: int | None):
  """`python train.py` without arguments, and with fewer steps than its 500: below gzip -9
  on held-out text, and below 1.9."""
  shorter = (f"--training.{name}={num_steps}" for name in ("num_steps", "eval_every_steps"))
  run = flaxlm("train", *(shorter if num_steps else ()), timeout=1500)
  assert run.returncode == 0, run.stderr
  lines = (tmp_path / "runs/stdlib_tiny/metrics.jsonl").read_text().splitlines()
  last = [m for m in map(json.loads, lines) if "eval/loss" in m][-1]
  assert last["eval/bits_per_byte"] < last["eval/gzip_bits_per_byte"]
  assert last["eval/bits_per_byte"] <= 1.9
  assert "def " in run.stdout
  assert "self" in run.stdout or "return" in run.stdout


def test_installed_wheel_works_elsewhere(corpus, tmp_path):
  """Built, unpacked into a folder of its own, run in another: the configs came along."""
  wheels, site, work = tmp_path / "wheels", tmp_path / "site", tmp_path / "work"
  work.mkdir()
  pip = [sys.executable, "-m", "pip", "--quiet"]
  subprocess.run([*pip, "wheel", "--no-deps", "-w", wheels, ROOT], check=True)
  (wheel,) = wheels.glob("flaxlm-*.whl")
  subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
  environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
  environment |= {"PYTHONPATH": str(site), "FLAXLM_DATA_DIR": str(tmp_path / "data")}
  command = [sys.executable, "-P", "-m", "flaxlm.cli"]
  sizes = {"training__num_steps": 2, "tokenizer__kind": "bpe", "tokenizer__vocab_size": 300}
  run = subprocess.run(
    [*command, "train", "stdlib_tiny", *tiny(corpus, **sizes)],
    cwd=work,
    env=environment,
    capture_output=True,
    text=True,
  )
  assert run.returncode == 0, run.stderr
  where = subprocess.run(
    [sys.executable, "-P", "-c", "import flaxlm; print(flaxlm.__file__)"],
    cwd=work,
    env=environment,
    capture_output=True,
    text=True,
    check=True,
  )
  assert where.stdout.startswith(str(site)), "the wheel ran, not the checkout"
  assert (work / "runs" / "stdlib_tiny" / "checkpoints" / "2").is_dir()
