# SPDX-License-Identifier: Apache-2.0
"""The pages of one run link to each other.

They lie beside each other in the run's folder `look/`, each made by a command of its own.
Whoever writes one there writes the links of all anew, so that none leads to a page that is
not there. They are plain HTML, outside of script and style: a page's policy stays as it is.
"""

import contextlib
from pathlib import Path

from flaxlm.checkpoint.manifest import write_atomically
from flaxlm.errors import writing

FOLDER = "look"  # in a run's directory
# Pages in the order of their links: {subject, which is the file's stem: what it is called}.
PAGES = {
  "story": "Story",
  "run": "Run",
  "tokens": "Tokens",
  "embeddings": "Embeddings",
  "positions": "Positions",
  "attention": "Attention",
}
OPENS, CLOSES = '<nav aria-label="pages of this run">', "</nav>"


def link_pages(folder: Path) -> None:
  """Writes into each page of a run's folder links to its other pages, and to no others.

  A page of an older version, which has no place for links, is linked to and left as it is.
  """
  there = {name: folder / f"{name}.html" for name in PAGES}
  there = {name: path for name, path in there.items() if path.is_file()}
  for name, path in there.items():
    # A file that is no text is not ours.
    with writing(path), contextlib.suppress(UnicodeDecodeError):
      page = path.read_text("utf-8")
      linked = with_links(page, [other for other in there if other != name])
      if linked != page:
        write_atomically(path, linked)


def with_links(page: str, names: list[str]) -> str:
  """The page with links to these pages beside it, in place of those that it has."""
  before, opens, rest = page.partition(OPENS)
  _, closes, after = rest.partition(CLOSES)
  if not opens or not closes:
    return page
  links = "\n".join(f'<a href="{name}.html">{PAGES[name]}</a>' for name in names)
  return before + opens + links + closes + after
