# SPDX-License-Identifier: Apache-2.0
"""The chat page: three files of our own, which load nothing else.

Its policy forbids every other host, and scripts and styles that are not these files. What
a model writes is shown as text.
"""

from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

ASSETS = Path(__file__).parent / "assets"
FILES = {
  "/": ("page.html", "text/html"),
  "/page.css": ("page.css", "text/css"),
  "/page.js": ("page.js", "text/javascript"),
}
POLICY = (
  "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
  "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


async def respond(request: Request) -> Response:
  name, kind = FILES[request.url.path]
  return Response(
    (ASSETS / name).read_bytes(),
    media_type=kind,
    headers={
      "Content-Security-Policy": POLICY,
      "Referrer-Policy": "no-referrer",
      "Cross-Origin-Resource-Policy": "same-origin",
      "Cache-Control": "no-cache",
    },
  )
