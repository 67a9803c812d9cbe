# SPDX-License-Identifier: Apache-2.0
"""Plants defects in a copy of the tree, one at a time, and sees if tests find them.

    python tests/planted.py            all of them: about 25 minutes
    python tests/planted.py moe RoPE   those whose words or file name contain one of these

The list is in `planted_defects.py`. A defect that is not found needs a test that finds it.
An entry that no longer fits the code, as after a move, is an error: bring it up to date.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
COPIED = ("flaxlm", "configs", "tests", "train.py", "infer.py", "pyproject.toml")
OPTIONS = ("-n", "0", "-x", "-q", "-p", "no:cacheprovider")
# The fast tests find most defects, and the slow ones are run for those that are left.
SPEEDS = (
  "not slow and not parity and not gpu and not fuzz",
  "slow and not parity and not gpu and not planted and not fuzz",
)
PASSED, FAILED, NONE = 0, 1, 5  # exit codes of pytest; others: it could not run them


class Defect(NamedTuple):
  """One small mistake, and the tests that should find it."""

  what: str  # goes wrong
  file: str
  old: str  # occurs in the file exactly once
  new: str
  tests: str  # test files or node ids below tests/, separated by spaces


class PlantingError(Exception):
  """An entry of the list that does not fit the code, or whose tests do not run."""


def mutated(defect: Defect, root: Path = ROOT) -> str:
  """The file's source with the defect in it. Raises `PlantingError`."""
  path = root / defect.file
  source = path.read_text("utf-8") if path.exists() else ""
  count = source.count(defect.old)
  if count != 1:
    others = [
      p for p in sorted((root / "flaxlm").rglob("*.py")) if defect.old in p.read_text()
    ]
    places = ", ".join(str(p.relative_to(root)) for p in others) or "nowhere"
    raise PlantingError(
      f"{defect.what!r}: its old text occurs {count} times in {defect.file}, not once; "
      f"files that have it: {places}"
    )
  for test in defect.tests.split():
    if not (root / "tests" / test.partition("::")[0]).exists():
      raise PlantingError(f"{defect.what!r}: there is no tests/{test}")
  if defect.new == defect.old:
    raise PlantingError(f"{defect.what!r} changes nothing")
  return source.replace(defect.old, defect.new)


def copy_tree(folder: Path) -> Path:
  """Copies what the tests need into a folder, where defects can be planted."""
  folder.mkdir(parents=True, exist_ok=True)
  for name in COPIED:
    if (ROOT / name).is_dir():
      ignored = shutil.ignore_patterns("__pycache__", "runs")
      shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    else:
      shutil.copy(ROOT / name, folder / name)
  return folder


def run_tests(copy: Path, tests: list[str], speed: str) -> subprocess.CompletedProcess:
  """Runs those of these tests that have the marks, in the copy and against the copy."""
  paths = [f"tests/{test}" for test in tests]
  return subprocess.run(
    [sys.executable, "-m", "pytest", *OPTIONS, "-m", speed, *paths],
    cwd=copy,
    env={
      "JAX_COMPILATION_CACHE_DIR": str(copy / "compiled"),  # for all defects
      **os.environ,
      "PYTHONPATH": str(copy),
      # It could be stale: a defect is planted within a second, often at equal length.
      "PYTHONDONTWRITEBYTECODE": "1",
    },
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def is_found(defect: Defect, copy: Path) -> bool:
  """Whether one of its tests fails with the defect planted; takes it out again.

  Raises `PlantingError` if the tests do not run.
  """
  path = copy / defect.file
  whole = path.read_text("utf-8")
  path.write_text(mutated(defect, copy), "utf-8")
  try:
    for speed in SPEEDS:
      result = run_tests(copy, defect.tests.split(), speed)
      if result.returncode == FAILED:
        return True
      if result.returncode not in (PASSED, NONE):
        said = result.stdout[-3000:]
        raise PlantingError(f"{defect.what!r}: the tests did not run\n{said}")
  finally:
    path.write_text(whole, "utf-8")
  return False


def main(words: list[str]) -> int:
  from planted_defects import DEFECTS

  chosen = [
    defect
    for defect in DEFECTS
    if not words or any(word in f"{defect.what} {defect.file}" for word in words)
  ]
  missed = 0
  with tempfile.TemporaryDirectory() as folder:
    copy = copy_tree(Path(folder) / "copy")
    for defect in chosen:
      start = time.perf_counter()
      try:
        found = is_found(defect, copy)
        text = "found" if found else "NOT found"
      except PlantingError as error:
        found, text = False, f"ERROR {error}"
      missed += not found
      seconds = time.perf_counter() - start
      print(f"{text:9}  {seconds:5.1f} s  {defect.file}: {defect.what}", flush=True)
  print(f"{len(chosen) - missed} of {len(chosen)} found")
  return 1 if missed else 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
