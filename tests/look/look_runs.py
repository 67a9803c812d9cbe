# SPDX-License-Identifier: Apache-2.0
"""Pages of random runs, read back."""

import base64
import json
import re
import zlib
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from browser import drawn_page
from random_runs import (  # noqa: F401 - for the tests of this folder
  BYTES,
  FAMILIES,
  HOSTILE,
  MASKED,
  TINY,
  make_run,
  save_run,
)

from flaxlm.look.page import digest, to_html
from flaxlm.look.view import View


class Page(HTMLParser):
  """A page as a browser cuts it: its elements, and what stands in its scripts."""

  def __init__(self, html: str):
    super().__init__()
    self.tags: list[tuple[str, dict[str, str | None]]] = []
    self.scripts: list[str] = []
    self.styles: list[str] = []
    self.inside: list[str] | None = None
    self.feed(html)
    self.close()

  def handle_starttag(self, tag: str, attrs: list) -> None:
    self.tags.append((tag, dict(attrs)))
    if tag in ("script", "style"):
      self.inside = self.scripts if tag == "script" else self.styles
      self.inside.append("")

  def handle_endtag(self, tag: str) -> None:
    self.inside = None

  def handle_data(self, data: str) -> None:
    if self.inside is not None:
      self.inside[-1] += data

  @property
  def view(self) -> Any:
    """The data, its arrays as arrays."""
    return arrays(json.loads(self.scripts[0]))


def unpack(packed: dict[str, Any]) -> np.ndarray:
  """The numbers that were given to `pack`, as the page reads them."""
  data = zlib.decompress(base64.b64decode(packed["deflated"]))
  if packed["type"] == "float32":
    return np.frombuffer(data, "<f4").astype(np.float64).reshape(packed["shape"])
  low, high = np.frombuffer(data, np.uint8).reshape(2, -1).astype(np.float64)
  return ((low + 256 * high) / packed["steps"]).reshape(packed["shape"])


def arrays(value: Any) -> Any:
  if isinstance(value, dict) and "deflated" in value:
    return unpack(value)
  if isinstance(value, dict):
    return {key: arrays(x) for key, x in value.items()}
  return [arrays(x) for x in value] if isinstance(value, list) else value


def page_of(view: View) -> Page:
  page = Page(to_html(view))
  assert [tag for tag, _ in page.tags].count("script") == 2 == len(page.scripts)
  assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", to_html(view))
  return page


def log_softmax(logits: Any) -> np.ndarray:
  logits = np.asarray(logits, np.float64)
  logits = logits - logits.max(-1, keepdims=True)
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


# Runs when the page is drawn; `found` is what a test reads.
DRIVER = """
const wait = setInterval(() => {
  if (!document.documentElement.dataset.ready) return;
  clearInterval(wait);
  const all = (query) => [...document.querySelectorAll(query)];
  const event = (kind, x, y) =>
    new PointerEvent(kind, { clientX: x, clientY: y, pointerId: 1 });
  const press = (element, key) =>
    element.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  const button = (text) => all("button").find((one) => one.textContent.startsWith(text));
  const found = {};
  BODY
  const named = (one) => one.textContent || one.ariaLabel || one.labels.length;
  found.unnamed = all("button, select, input").filter((one) => !named(one)).length;
  document.body.style.width = "380px"; // a window of Chromium has 500 at least
  found.wide = document.body.scrollWidth - 380;
  document.body.append("FOUND" + JSON.stringify(found) + "END");
}, 20);
"""


def drive(view: View, path: Path, body: str) -> dict[str, Any]:
  """What a script finds that uses the page as a person does; all pages name their controls,
  and fit 380 pixels."""
  script = DRIVER.replace("BODY", body)
  # The page's own policy stands, and allows this one script more.
  page = to_html(view).replace("script-src '", f"script-src '{digest(script)}' '")
  path.write_text(page.replace("</body>", f"<script>{script}</script></body>"), "utf-8")
  found = json.loads(unescape(re.findall("FOUND(.*?)END", drawn_page(path))[-1]))
  assert found["unnamed"] == 0 and found["wide"] <= 0
  return found
