# SPDX-License-Identifier: Apache-2.0
"""The notebook of the docs runs and shows what it is stored with; its links lead somewhere.

It is stored with its outputs, so that it can be read where nothing runs: on a forge, and on
the site. `python tests/notebooks.py docs/first_hour.ipynb` writes them anew. They may not
be stale in kind: what a cell shows is of the same kinds that are stored.
"""

import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from notebooks import kinds, read_notebook, source_of

PATH = ROOT / "docs/first_hour.ipynb"
CELLS = read_notebook(PATH)["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
# What every cell of code shows: printed text, a value, or a piece of a page.
PRINTED, VALUE, PAGE = (
  ("stream", "stdout"),
  ("execute_result", None, "text/plain"),
  ("execute_result", None, "text/html", "text/plain"),
)


def test_the_stored_notebook_has_what_it_promises():
  stored = [kind for cell in CODE for kind in kinds(cell["outputs"])]
  assert all(cell["outputs"] for cell in CODE)
  assert [cell["execution_count"] for cell in CODE] == [*range(1, len(CODE) + 1)]
  assert stored.count(PAGE) >= 3, "a completion, a score, and a picture"
  text = "".join(map(source_of, CELLS))
  for name in ("train_tokenizer", "flaxlm.train", "load", "generate", "stream", "score"):
    assert f"{name}(" in text
  assert "gpt3_175b" in text
  pages = [
    "".join(out["data"]["text/html"])
    for cell in CODE
    for out in cell["outputs"]
    if "text/html" in out.get("data", ())
  ]
  assert any("srcdoc=" in page for page in pages)
  assert not any(re.search(r"(?:src|href)=[\"']?(?:https?:)?//", page) for page in pages)
  assert str(ROOT.parent) not in PATH.read_text("utf-8"), "a path of some machine"


def test_its_links_lead_somewhere():
  for cell in CELLS:
    for link in re.findall(r"\]\(([^)\s]+)\)", source_of(cell)):
      assert cell["cell_type"] != "markdown" or (PATH.parent / link).exists(), link


@pytest.mark.slow
def test_the_notebook_shows_what_is_stored(flaxlm, tmp_path):
  """Written anew, in a process with one device as its readers have it."""
  path = tmp_path / PATH.name
  shutil.copy(PATH, path)
  done = subprocess.run(
    [sys.executable, ROOT / "tests/notebooks.py", path],
    env=os.environ | flaxlm.environment,
    capture_output=True,
    text=True,
    timeout=240,
  )
  assert done.returncode == 0, done.stderr
  cells = read_notebook(path)["cells"]
  shown = [cell["outputs"] for cell in cells if cell["cell_type"] == "code"]
  assert [kinds(outputs) for outputs in shown] == [kinds(cell["outputs"]) for cell in CODE]
  assert shown[2][-1]["data"]["text/plain"] == ["0"], "the exit code of training"
