# SPDX-License-Identifier: Apache-2.0
"""A hook of mkdocs.yml: one set of pages for the site and for who reads the repository.

Links are written as the repository has them. The site has its own names for a few pages,
and a link to what it does not have becomes its text.
"""

import json
import os.path
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from flaxlm.commands.train import described_knobs

ROOT = Path(__file__).parent.parent
# Pages whose place on the site is not that in docs/.
MOVED = {
  "README.md": "index.md",
  "docs/index.md": "pages.md",
  "CONTRIBUTING.md": "contributing.md",
  "docs/first_hour.ipynb": "first_hour.md",
}
SOURCES = {there: here for here, there in MOVED.items()}
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)|src=\"([^\"]+)\"")
LOADS = re.compile(
  r"<(?:script|img|iframe|link)\b[^>]* (?:src|href)=[\"']?(?:https?:)?//[^\"' >]*"
)
FIELDS = "<!-- fields -->"


def on_files(files: Files, config: MkDocsConfig) -> Files:
  """Puts the pages of `MOVED` into their places."""
  index = files.get_file_from_path("index.md")
  assert index is not None
  files.remove(index)
  for source, place in MOVED.items():
    path = ROOT / source
    what: dict[str, Any] = {"abs_src_path": str(path)}
    if path.suffix == ".ipynb":
      what = {"content": "\n\n".join(parts_of(json.loads(path.read_text("utf-8"))))}
    files.append(File.generated(config, place, **what))
  return files


def parts_of(notebook: dict[str, Any]) -> Iterator[str]:
  """A notebook as Markdown: its text, its code, and what the code has shown."""
  for cell in notebook["cells"]:
    source = "".join(cell["source"])
    yield source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```"
    for output in cell.get("outputs", ()):
      data = output.get("data", {"text/plain": output.get("text")})
      if "text/html" in data:
        yield "".join(data["text/html"])
      else:
        yield f"```text\n{''.join(data['text/plain']).rstrip()}\n```"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
  """The page as the site has it."""
  place = page.file.src_uri
  source = SOURCES.get(place, f"docs/{place}")

  def link(found: re.Match[str]) -> str:
    text, target, picture = found.groups()
    path, mark, anchor = (target or picture).partition("#")
    there = os.path.normpath(Path(source).parent / path)
    if not path or not (ROOT / there).exists():
      return found[0]  # an anchor, or another host's; MkDocs reports what is broken
    there = MOVED.get(there, os.path.relpath(there, "docs"))
    if files.get_file_from_path(there) is None:
      return found[0] if picture else text
    there = os.path.relpath(there, Path(place).parent) + mark + anchor
    return f'src="{there}"' if picture else f"[{text}]({there})"

  markdown = LINK.sub(link, markdown)
  return markdown.replace(FIELDS, table_of_fields()) if FIELDS in markdown else markdown


def table_of_fields() -> str:
  """Every field of a config, with what `flaxlm train --help` says of it."""
  cell = lambda text: "".join("\\" + c if c in "|[]<*_" else c for c in text)
  rows = ["| field | what it is | type | default |", "|---|---|---|---|"]
  for name, *about in described_knobs():
    rows.append(f"| `{name}` | {' | '.join(map(cell, about))} |")
  return "\n".join(rows)


def on_post_build(config: MkDocsConfig) -> None:
  """Refuses a site that loads something from another host; links may lead anywhere."""
  for path in sorted(Path(config.site_dir).rglob("*.html")):
    if found := LOADS.search(path.read_text("utf-8")):
      raise PluginError(f"{path.name} loads from another host: {found[0]}")
