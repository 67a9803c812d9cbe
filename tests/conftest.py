# SPDX-License-Identifier: Apache-2.0
"""Eight simulated devices for every test, before anything touches JAX."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# Tests compare numbers and never time: a quicker compile is worth a slower program.
jax.config.update("jax_disable_most_optimizations", True)

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def cache_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """One data directory for all tests that run commands: prepared once, compiled once."""
  return tmp_path_factory.mktemp("data")


@pytest.fixture
def flaxlm(tmp_path: Path, cache_root: Path) -> Callable[..., subprocess.CompletedProcess]:
  """Runs `python -m flaxlm.cli ARGUMENTS` in an empty folder, as a user would."""

  environment = {
    "FLAXLM_DATA_DIR": str(cache_root),
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": str(ROOT),
    "COLUMNS": "100",
  }

  def run(*arguments: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(
      [sys.executable, "-m", "flaxlm.cli", *map(str, arguments)],
      cwd=tmp_path,
      env=os.environ | environment,
      capture_output=True,
      text=True,
      **{"timeout": 240} | kwargs,
    )

  run.environment = environment
  return run
