# SPDX-License-Identifier: Apache-2.0
"""A run that hangs ends with exit code 6 and a stack trace; other runs are not affected."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

CODE = """
import time
from flaxlm.training.watchdog import Watchdog
def stuck():
  time.sleep(20)
with Watchdog(SECONDS, lambda error: print("said", error.exit_code, flush=True)) as dog:
  BODY
print("done")
"""


def run(body: str, seconds: float | None = 0.3) -> subprocess.CompletedProcess:
  code = CODE.replace("BODY", body).replace("SECONDS", str(seconds))
  return subprocess.run(
    [sys.executable, "-c", code],
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    check=False,
    timeout=60,
  )


def test_a_hang_ends_the_process_and_shows_where():
  result = run("dog.progress()\n  stuck()")
  assert result.returncode == 6
  assert result.stdout == "said 6\n"
  assert "in stuck" in result.stderr
  assert "no progress for 0.3 s" in result.stderr


@pytest.mark.parametrize(
  "body",
  [
    "time.sleep(0.8)",  # before the first progress: compiling
    "for _ in range(8):\n    dog.progress()\n    time.sleep(0.1)",
    "dog.progress()\n  with dog.resting():\n    time.sleep(0.8)",
  ],
)
def test_progress_and_rest_keep_it_quiet(body):
  result = run(body)
  assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr


def test_it_watches_again_after_a_rest():
  assert run("dog.progress()\n  with dog.resting():\n    pass\n  stuck()").returncode == 6


def test_none_is_never():
  result = run("dog.progress()\n  time.sleep(0.5)", None)
  assert result.returncode == 0
