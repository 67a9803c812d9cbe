# SPDX-License-Identifier: Apache-2.0
"""Tokens coloured by how surprising they are, as a piece of HTML for a notebook.

The colours are those of the page of `flaxlm look tokens`. The piece has styles of its own,
no script and no link, and any text in it is escaped.
"""

import functools
import html
import math
import re
from collections.abc import Sequence

from flaxlm.look.page import ASSETS
from flaxlm.look.pieces import Piece, describe, legible
from flaxlm.tokenizers import AnyTokenizer

MOST_BITS = 16  # from here on, the darkest colour; tokens.js has it too
DARK = 0.55  # the share of it from which on the ink is light; common.js has it too
# In running text, blanks are blanks, and a line that ends is also broken.
DRAWN = {"\n": "↵\n", "\t": "→\t", "\r": "␍"}
BOX = (
  "white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.6;padding:8px 12px;"
  "border-radius:8px;background:{paper};color:{ink};border:1px solid {line}"
)


def surprise_html(
  tokenizer: AnyTokenizer,
  ids: Sequence[int],
  logprobs: Sequence[float],
  before: str = "",
) -> str:
  """The tokens, each on a colour by its surprise, -log2 p, with its figures as a title.

  `logprobs` are in nats. `before` is the text that they follow; it has no colour.
  """
  colours = light_colours()
  bits = [max(0.0, -logprob / math.log(2)) for logprob in logprobs]
  spans = [
    token_html(piece, own_bits, colours)
    for piece, own_bits in zip(describe(tokenizer, ids, DRAWN), bits, strict=True)
  ]
  note = f"{len(bits)} tokens"
  if bits:
    note += f", {sum(bits):.1f} bits of surprise, {sum(bits) / len(bits):.2f} per token"
  known = html.escape(legible(before.encode("utf-8", "surrogatepass"), DRAWN))
  soft = f'<span style="color:{colours["soft"]}">'
  return (
    f'<pre style="{BOX.format(**colours)}">{soft}{known}</span>{"".join(spans)}\n'
    f"{soft}{note}</span></pre>"
  )


def token_html(piece: Piece, bits: float, colours: dict[str, str]) -> str:
  share = min(1.0, bits / MOST_BITS)
  ink = colours["on-high" if share > DARK else "ink"]
  slant = ";font-style:italic" if piece.special else ""
  style = f"background:{shade(share, colours)};color:{ink};unicode-bidi:isolate{slant}"
  title = f"id {piece.id}, probability {2**-bits:.3g}, {bits:.2f} bits of surprise"
  return f'<span style="{style}" title="{title}">{html.escape(piece.label)}</span>'


def shade(share: float, colours: dict[str, str]) -> str:
  """The colour between expected (0) and surprising (1)."""
  low, high = (
    [int(colours[name][at : at + 2], 16) for at in (1, 3, 5)] for name in ("low", "high")
  )
  mixed = (round(a + share * (b - a)) for a, b in zip(low, high, strict=True))
  return f"rgb({','.join(map(str, mixed))})"


@functools.cache
def light_colours() -> dict[str, str]:
  """The colours of our pages, by name, on white: a notebook can be dark and not say so."""
  style = (ASSETS / "page.css").read_text("utf-8").partition("}")[0]
  return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", style))
