# SPDX-License-Identifier: Apache-2.0
"""XLA's flags: known to XLA, never overriding the user's, and only where they belong."""

import json
import os
import subprocess
import sys

import jax
import pytest
from conftest import ROOT, slow

from flaxlm.platform import (
  GPU,
  TPU_SLICES,
  VARIABLES,
  flags_for,
  give_threads,
  keep_programs,
  set_flags,
)


def test_jaxlib_knows_the_gpu_flags():
  """It aborts at others, as it should: else this would prove nothing."""

  def run(flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(
      [sys.executable, "-c", "import jax; jax.jit(lambda x: x + 1)(1)"],
      env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
      capture_output=True,
      check=False,
    )

  environment: dict[str, str] = {}
  assert set_flags(environment, GPU) == GPU
  assert run(environment["XLA_FLAGS"]).returncode == 0
  assert run("--xla_gpu_no_such_flag=true").returncode != 0


@pytest.mark.parametrize("flags", [GPU, TPU_SLICES])
def test_what_the_user_set_stands(flags):
  variable = VARIABLES[flags]
  mine = f"--{flags[0].name}=false --something=else"
  environment = {variable: mine}
  added = set_flags(environment, flags)
  assert added == flags[1:]
  assert environment[variable].startswith(mine)
  assert environment[variable].count(flags[0].name) == 1
  assert all(flag.name in environment[variable] for flag in added)
  again = dict(environment)
  assert set_flags(again, flags) == ()
  assert again == environment


def test_every_flag_has_a_reason_and_is_printed_with_it():
  for flag in (*GPU, *TPU_SLICES):
    assert len(flag.reason) > 20
    assert f"--{flag.name}={flag.value}: {flag.reason}" in flag.line


def test_flags_go_to_their_platform(tmp_path):
  assert flags_for({"JAX_PLATFORMS": "cpu", "MEGASCALE_NUM_SLICES": "2"}, tmp_path) == ()
  assert flags_for({}, tmp_path) == (), "no GPU, no slices"
  assert flags_for({"MEGASCALE_NUM_SLICES": "1"}, tmp_path) == ()
  assert flags_for({"MEGASCALE_NUM_SLICES": "2"}, tmp_path) == TPU_SLICES


@pytest.mark.parametrize(
  ("devices", "before", "threads"),
  [
    (8, {}, "32"),
    (256, {}, "256"),
    (1, {}, None),
    (-1, {}, None),
    (8, {"NPROC": "5"}, "5"),
  ],
)
def test_simulated_devices_have_threads_to_wait_in(devices, before, threads):
  environment = dict(before)
  give_threads(environment, devices)
  assert environment.get("NPROC") == threads


def test_importing_sets_nothing():
  code = "import os, flaxlm.sharding; print(os.environ.get('XLA_FLAGS'))"
  environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  run = subprocess.run(
    [sys.executable, "-c", code],
    env=environment | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    check=True,
  )
  assert run.stdout.strip() == "None"


@pytest.mark.parametrize("folder", ["a file", "a file/below", "/dev/full", "/proc/none"])
def test_where_no_program_can_be_kept_each_process_compiles(tmp_path, folder):
  (tmp_path / "a file").touch()
  before = dict(jax.config.values)
  assert not keep_programs(tmp_path / folder)
  assert jax.config.values == before


def test_programs_are_kept_where_nobody_else_writes(tmp_path):
  folder, name = tmp_path / "a" / "b", "jax_compilation_cache_dir"
  before = jax.config.values[name]
  try:
    assert keep_programs(folder)
    assert jax.config.values[name] == str(folder)
  finally:
    jax.config.update(name, before)
  assert folder.stat().st_mode & 0o777 == 0o700


LIBTPU = """
import json, sys
from pathlib import Path
import jax
from flaxlm.platform import leave_out_absent_tpu
environment, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
print(leave_out_absent_tpu(environment, folder), jax.config.jax_platforms)
"""


@pytest.mark.parametrize(
  ("installed", "chosen", "host", "device", "expected"),
  [
    (True, {}, {}, None, "True cpu"),
    (False, {}, {}, None, "False None"),
    slow(True, {"JAX_PLATFORMS": "tpu"}, {}, None, "False tpu"),
    slow(True, {}, {"TPU_WORKER_ID": "0"}, None, "False None"),
    (True, {}, {}, "accel0", "False None"),
    slow(True, {}, {}, "nvidia0", "False None"),
  ],
)
def test_an_absent_tpu_is_not_looked_for(
  tmp_path, installed, chosen, host, device, expected
):
  """Where libtpu is installed and nothing hints at an accelerator; else JAX decides."""
  (tmp_path / "dev").mkdir()
  if device:
    (tmp_path / "dev" / device).touch()
  if installed:
    (tmp_path / "libtpu.py").write_text("")
  unset = ("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES")
  environment = {name: value for name, value in os.environ.items() if name not in unset}
  run = subprocess.run(
    [sys.executable, "-c", LIBTPU, json.dumps(host), tmp_path / "dev"],
    env=environment | chosen | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
    capture_output=True,
    text=True,
    check=True,
  )
  assert run.stdout.strip() == expected
