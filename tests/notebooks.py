# SPDX-License-Identifier: Apache-2.0
"""Runs a notebook of plain Python cells, as Jupyter would show them, without Jupyter.

    python tests/notebooks.py docs/first_hour.ipynb

runs it in an empty folder, and stores what its cells show in it. A cell with a magic or a
command of the shell is refused, so that whoever has only Python can follow.
"""

import ast
import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TEXT, HTML = "text/plain", "text/html"


def read_notebook(path: Path) -> dict[str, Any]:
  return json.loads(path.read_text("utf-8"))


def source_of(cell: Mapping[str, Any]) -> str:
  return "".join(cell["source"])


def run_notebook(notebook: Mapping[str, Any], name: str) -> list[list[dict[str, Any]]]:
  """What each code cell shows, in nbformat's words. Raises what a cell raises."""
  names: dict[str, Any] = {"__name__": "__main__"}
  cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
  return [
    run_cell(source_of(cell), names, f"{name}, cell {number}", number)
    for number, cell in enumerate(cells, 1)
  ]


def run_cell(source: str, names: dict, where: str, number: int) -> list[dict[str, Any]]:
  """Its stdout, and the value of its last expression unless that ends with a semicolon."""
  tree, last = ast.parse(source, where), None
  if isinstance(tree.body[-1], ast.Expr) and not source.rstrip().endswith(";"):
    last = ast.Expression(tree.body.pop().value)
  value, shown = None, []
  with contextlib.redirect_stdout(io.StringIO()) as out:
    exec(compile(tree, where, "exec"), names)
    if last is not None:
      value = eval(compile(last, where, "eval"), names)
  if text := out.getvalue():
    shown.append({"output_type": "stream", "name": "stdout", "text": lines(text)})
  if value is not None:
    data = {TEXT: lines(repr(value))}
    if hasattr(value, "_repr_html_"):
      data = {HTML: lines(value._repr_html_()), TEXT: lines(f"<{type(value).__name__}>")}
    result = {"execution_count": number, "data": data, "metadata": {}}
    shown.append({"output_type": "execute_result", **result})
  return shown


def lines(text: str) -> list[str]:
  return text.splitlines(keepends=True)


def kinds(outputs: list[dict[str, Any]]) -> list[tuple]:
  """What outputs are, whatever they say: numbers differ from machine to machine."""
  return [
    (out["output_type"], out.get("name"), *sorted(out.get("data", ()))) for out in outputs
  ]


def store_outputs(path: Path) -> None:
  """Runs a notebook, and writes it again with what it shows."""
  notebook = read_notebook(path)
  here = Path.cwd()
  with tempfile.TemporaryDirectory() as folder:
    os.chdir(folder)
    outputs = run_notebook(notebook, path.name)
    os.chdir(here)
  code = (cell for cell in notebook["cells"] if cell["cell_type"] == "code")
  for number, (cell, shown) in enumerate(zip(code, outputs, strict=True), 1):
    cell |= {"execution_count": number, "outputs": shown}
  path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
  store_outputs(Path(sys.argv[1]))
