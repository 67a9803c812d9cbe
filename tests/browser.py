# SPDX-License-Identifier: Apache-2.0
"""Chromium without a window, which opens the pages that tests look at."""

import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
with_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


def drawn_page(path: Path) -> str:
  """The document as it is when the page of a view is drawn, which says nothing meanwhile.

  The browser's own files go beside the page.
  """
  options = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000")
  options += ("--enable-logging=stderr", f"--user-data-dir={path.parent / 'profile'}")
  command = [str(CHROMIUM), *options, "--dump-dom", path.as_uri()]
  shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
  assert 'data-ready="true"' in shown.stdout, shown.stderr
  assert "CONSOLE" not in shown.stderr, shown.stderr
  assert "<title>broken" not in shown.stdout
  return shown.stdout
