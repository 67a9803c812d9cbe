# SPDX-License-Identifier: Apache-2.0
"""Figures that need a fresh process: nothing is compiled, allocated or cached there yet."""

import os
import subprocess
import sys
from collections.abc import Mapping

from flaxlm.errors import FlaxLMError


def run_python(*arguments: str, environment: Mapping[str, str] | None = None) -> str:
  """The output of `python ARGUMENTS`. Raises `FlaxLMError` with the end of its stderr."""
  run = subprocess.run(
    [sys.executable, *arguments],
    capture_output=True,
    text=True,
    env=os.environ | (environment or {}),
    check=False,
  )
  if run.returncode:
    reason = run.stderr.strip()[-400:] or "no message"
    raise FlaxLMError(f"python {' '.join(arguments)} failed: {reason}")
  return run.stdout
