# SPDX-License-Identifier: Apache-2.0
"""The list of planted defects follows the code, and the tests find every one (slow).

`python tests/planted.py` runs them without pytest, and takes words that choose among them.
"""

from collections import Counter
from pathlib import Path

import pytest
from planted import PASSED, SPEEDS, copy_tree, is_found, mutated, run_tests
from planted_defects import DEFECTS

LEAST = 30
AREAS = ("nn", "training", "data", "decoding", "sharding")


def test_every_defect_can_be_planted():
  """Each old text stands once in its file, each named test is there."""
  assert len(DEFECTS) >= LEAST
  names = Counter(defect.what for defect in DEFECTS)
  assert max(names.values()) == 1, names.most_common(1)
  for defect in DEFECTS:
    mutated(defect)
  areas = {Path(defect.file).with_suffix("").parts[1] for defect in DEFECTS}
  assert areas >= set(AREAS)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
  return copy_tree(tmp_path_factory.mktemp("planted"))


@pytest.mark.slow
@pytest.mark.planted
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("speed", SPEEDS)
def test_without_a_defect_all_named_tests_pass(copy: Path, speed: str):
  """Or they would find anything."""
  named = sorted({test for defect in DEFECTS for test in defect.tests.split()})
  result = run_tests(copy, named, speed)
  assert result.returncode == PASSED, result.stdout[-3000:]


@pytest.mark.slow
@pytest.mark.planted
@pytest.mark.timeout(900)
@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.what)
def test_a_defect_is_found(defect, copy: Path):
  assert is_found(defect, copy), f"{defect.file}: nobody noticed that {defect.what}"
