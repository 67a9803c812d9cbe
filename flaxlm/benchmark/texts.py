# SPDX-License-Identifier: Apache-2.0
"""Text that every machine with Python has: the sources of its standard library."""

import sysconfig
from pathlib import Path


def python_sources(num_characters: int) -> list[str]:
  """Whole files in the order of their names, the last one cut, `num_characters` in all."""
  texts, left = [], num_characters
  for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
    if left <= 0:
      break
    if "site-packages" not in path.parts and "test" not in path.parts:
      texts.append(path.read_text("utf-8", "replace")[:left])
      left -= len(texts[-1])
  return texts
