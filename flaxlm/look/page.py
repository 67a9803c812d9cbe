# SPDX-License-Identifier: Apache-2.0
"""Saves one picture as one file: HTML that needs nothing else, or a PNG.

A page consists of a fixed frame, style and script, and of the data as JSON. The script
writes text only as text. A content security policy forbids network access and all other
scripts, whatever the text of a token is.
"""

import base64
import hashlib
import html
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flaxlm import strict_json
from flaxlm.errors import DISK_ERRORS, ConfigError, first_line, write_error
from flaxlm.look.links import CLOSES, OPENS
from flaxlm.look.view import Shares, View

ASSETS = Path(__file__).parent / "assets"


def check_output(path: Path) -> None:
  """Raises `ConfigError` unless `path` can be written, as far as can be told early."""
  if path.suffix not in (".html", ".png"):
    raise ConfigError(f"{path} is neither .html nor .png", "as in --output picture.html")
  if path.is_dir():
    raise ConfigError(f"{path} is a directory", "give --output a file")
  if path.suffix == ".png":
    try:
      import matplotlib  # noqa: F401
    except ImportError as e:
      raise ConfigError(
        "a PNG needs matplotlib", "pip install 'flaxlm[look]', or write .html"
      ) from e


def save_view(view: View, path: Path) -> int:
  """Writes the picture as the suffix of `path` says; returns the number of bytes."""
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
      from flaxlm.look.png import draw

      draw(view, path)
    else:
      path.write_text(to_html(view), "utf-8")
  except OSError as e:
    if e.errno in DISK_ERRORS:
      raise write_error(e, path) from e
    raise ConfigError(f"{path} cannot be written: {first_line(e)}") from e
  return path.stat().st_size


def to_html(view: View) -> str:
  """The whole page."""
  read = lambda name: (ASSETS / name).read_text("utf-8")
  own_style = f"{view.kind}.css"
  style = read("page.css") + (read(own_style) if (ASSETS / own_style).exists() else "")
  script = "\n".join(map(read, ("common.js", "charts.js", f"{view.kind}.js", "start.js")))
  policy = (
    f"default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
    f"style-src '{digest(style)}'; script-src '{digest(script)}'"
  )
  return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{html.escape(view.title)}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
{OPENS}{CLOSES}
<main id="page"><noscript>This page draws its data with JavaScript.</noscript></main>
<script type="application/json" id="view">{to_json(view._asdict())}</script>
<script>{script}</script>
</body>
</html>
"""


def digest(text: str) -> str:
  """The hash by which a content security policy allows an inline element."""
  return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def to_json(values: Mapping[str, Any]) -> str:
  """JSON that is safe inside a script element: ASCII without `<`, `>` and `&`."""
  text = strict_json.to_json(values, default=pack, separators=(",", ":"))
  for character in "<>&":  # JSON has them only inside strings
    text = text.replace(character, f"\\u{ord(character):04x}")
  return text


def pack(value: Any) -> dict[str, Any]:
  """An array for the page: little-endian float32, or `Shares`; deflated, base64."""
  if isinstance(value, Shares):
    shape, data = value.values.shape, value.to_bytes()
    how: dict[str, Any] = {"type": "uint16", "steps": value.steps}
  else:
    array = np.asarray(value).astype("<f4")
    shape, data, how = array.shape, array.tobytes(), {"type": "float32"}
  text = base64.b64encode(zlib.compress(data, 6)).decode()
  return {"shape": shape, **how, "deflated": text}
