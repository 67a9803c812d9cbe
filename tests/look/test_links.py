# SPDX-License-Identifier: Apache-2.0
"""The pages of a run link to each other, and to nothing else."""

import re
from pathlib import Path
from typing import Any

from browser import drawn_page, with_chromium
from look_runs import Page, make_run, save_run

from flaxlm.cli import main
from flaxlm.look.links import PAGES, link_pages, with_links
from flaxlm.look.page import save_view, to_html
from flaxlm.look.view import View


def links(path: Path) -> list[str | None]:
  return [a["href"] for tag, a in Page(path.read_text("utf-8")).tags if tag == "a"]


def save(folder: Path, *names: str) -> None:
  for name in names:
    save_view(View(name, name, [], [], {}, {"charts": []}), folder / f"{name}.html")


def test_each_page_links_to_those_that_are_there(tmp_path: Path):
  save(tmp_path, "story")
  link_pages(tmp_path)
  assert links(tmp_path / "story.html") == []
  save(tmp_path, "attention", "run")
  old = "<!doctype html><title>of an older version</title>"
  (tmp_path / "tokens.html").write_text(old)
  (tmp_path / "notes.html").write_text("the user's own")
  for _ in range(2):
    link_pages(tmp_path)
    there = ("story", "run", "tokens", "attention")
    for name in ("story", "run", "attention"):
      assert links(tmp_path / f"{name}.html") == [f"{x}.html" for x in there if x != name]
  (tmp_path / "attention.html").unlink()
  link_pages(tmp_path)
  assert links(tmp_path / "run.html") == ["story.html", "tokens.html"]
  assert (tmp_path / "tokens.html").read_text() == old
  assert (tmp_path / "notes.html").read_text() == "the user's own"
  assert not [path for path in tmp_path.iterdir() if path.suffix != ".html"]


def test_links_change_nothing_else():
  page = to_html(View("run", "</nav>", [], [], {}, {"x": '<nav aria-label="pages'}))
  assert with_links(with_links(page, [*PAGES]), []) == page
  linked = Page(with_links(page, ["story"]))
  assert linked.scripts == Page(page).scripts and linked.styles == Page(page).styles


def test_the_commands_link_what_they_write(tmp_path: Path, capsys: Any):
  folder = save_run(make_run(depth=1), tmp_path / "tiny")
  (folder / "metrics.jsonl").write_text('{"step": 1, "train/loss": 3.0}\n')
  for subject in ("positions", "run"):
    assert main(["look", subject, str(folder)]) == 0
  out = capsys.readouterr().out
  assert links(folder / "look" / "run.html") == ["positions.html"]
  assert links(folder / "look" / "positions.html") == ["run.html"]
  size = (folder / "look" / "run.html").stat().st_size
  assert f"run.html ({size / 1e3:,.0f} kB)" in out
  elsewhere = folder / "look" / "other.html"
  assert main(["look", "run", str(folder), f"--output={elsewhere}"]) == 0
  assert links(elsewhere) == [] and links(folder / "look" / "positions.html") == [
    "run.html"
  ]


@with_chromium
def test_a_browser_shows_links_above_the_page(tmp_path: Path):
  save(tmp_path, "positions", "story")
  link_pages(tmp_path)
  shown = drawn_page(tmp_path / "positions.html")
  assert re.search('<nav[^>]*><a href="story.html">Story</a></nav>.*<h1>', shown, re.S)
