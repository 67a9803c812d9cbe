# SPDX-License-Identifier: Apache-2.0
"""The main pictures of a story as one PNG: what each layer would say, the heads of the
opened layer, the next token's probabilities, and the tokens that were drawn."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from flaxlm.look.view import View

MOST_TOKENS = 16  # of the text: those up to the one that is asked
MOST_STATES = 14  # of the stream: the first, the last, and some between
MOST_HEADS = 8
MOST_BARS = 12
MOST_LETTERS = 12  # of a token
FONT = dict(family="monospace", fontsize=8)


def draw_story(figure: Any, view: View) -> None:
  """Draws the chapters that are pictures, top to bottom."""
  chapters = {chapter["key"]: chapter for chapter in view.data["chapters"]}
  figure.set_size_inches(13, 13)
  top, middle, bottom = figure.subfigures(3, 1, height_ratios=[5, 4, 3])
  draw_lens(top.subplots(), view, chapters["lens"])
  left, right = middle.subfigures(1, 2, width_ratios=[3, 2])
  if "block" in chapters:
    draw_heads(left, chapters["block"])
  else:
    draw_state(left.subplots(), chapters["state"])
  draw_chances(right.subplots(), chapters["softmax"])
  draw_drawn(bottom.subplots(), view)


def short(label: str) -> str:
  return label if len(label) <= MOST_LETTERS else label[: MOST_LETTERS - 1] + "…"


def draw_lens(ax: Any, view: View, lens: Any) -> None:
  """What the model would say at each depth: the token, shaded by its probability."""
  tokens, at = view.figures["tokens"], view.figures["at"]
  columns = [*range(max(0, at + 1 - MOST_TOKENS), at + 1)]
  depths = np.unique(np.linspace(0, len(lens["ids"]) - 1, MOST_STATES).round().astype(int))
  rows = depths[::-1].tolist()  # the last layer on top
  chances = lens["chances"].values
  best = np.array([[chances[row, t, 0] for t in columns] for row in rows])
  ax.imshow(best, cmap="Blues", vmin=0, vmax=1, aspect="auto")
  for y, row in enumerate(rows):
    for x, t in enumerate(columns):
      label = short(lens["labels"][str(lens["ids"][row][t][0])])
      colour = "white" if best[y, x] > 0.55 else "black"
      ax.text(x, y, label, ha="center", va="center", color=colour, **FONT)
  ax.set_xticks(range(len(columns)), [short(tokens[t]["label"]) for t in columns], **FONT)
  names = ["before layer 0" if not row else f"after layer {row - 1}" for row in rows]
  ax.set_yticks(range(len(rows)), names, fontsize=8)
  ax.set_title("What it would say after each layer, dark: sure", fontsize=10)
  ax.set_xlabel(cut_off(columns[0], "tokens of the text"))


def cut_off(first: int, what: str) -> str:
  return f"{what}, from token {first} on" if first else what


def draw_heads(figure: Any, block: Any) -> None:
  """Where each head of the opened layer looks, of the text itself."""
  one = block["maps"][0]
  weights_NTS = one["weights"].values[:MOST_HEADS]
  columns = min(4, len(weights_NTS))
  axes = figure.subplots(math.ceil(len(weights_NTS) / columns), columns, squeeze=False)
  for ax in axes.ravel():
    ax.axis("off")
  for head, (ax, weights_TS) in enumerate(zip(axes.ravel(), weights_NTS, strict=False)):
    ax.axis("on")
    ax.imshow(np.sqrt(weights_TS), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    ax.set_title(f"head {head}", fontsize=8)
    ax.set(xticks=[], yticks=[])
  all_heads = one["weights"].values.shape[0]
  some = f", the first {MOST_HEADS} of {all_heads} heads" if all_heads > MOST_HEADS else ""
  figure.suptitle(
    f"Layer {block['layer']}: where each token (down) looks (across){some}", fontsize=10
  )


def draw_state(ax: Any, state: Any) -> None:
  """The state of an RNN after each token."""
  chart = state["charts"][0]
  most = max(float(np.abs(chart["values"]).max()), 1e-12)
  ax.imshow(chart["values"], cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
  ax.set_title(chart["title"], fontsize=10)
  ax.set_xlabel(chart["x_label"])
  ax.set_ylabel(chart["y_label"])


def draw_chances(ax: Any, softmax: Any) -> None:
  """The likeliest tokens, at temperature 1."""
  logits_V = softmax["logits"].astype(np.float64)
  shares_V = np.exp(logits_V - logits_V.max())
  shares_V /= shares_V.sum()
  best = softmax["best"][:MOST_BARS]
  bars(ax, [short(x) for x in softmax["labels"][:MOST_BARS]], shares_V[best].tolist())
  ax.invert_yaxis()
  ax.set_title("The next token: probabilities, at temperature 1", fontsize=10)


def draw_drawn(ax: Any, view: View) -> None:
  """The tokens that were drawn or filled in, and how likely each was."""
  steps = view.figures["steps"]
  if not steps:
    ax.axis("off")
    return
  chances = [step["chance"] for step in steps]
  drawn = ax.bar(range(len(steps)), chances, color="tab:blue")
  ax.bar_label(drawn, [f"{chance:.1%}" for chance in chances], fontsize=8, padding=2)
  ax.set_xticks(range(len(steps)), [short(step["label"]) for step in steps], **FONT)
  ax.set_ylim(0, 1.2 * max(chances))
  ax.set_ylabel("probability")
  fills = "at" in steps[0]
  what = "What fills the masks" if fills else "What it then wrote, token by token"
  ax.set_title(f"{what}, and how likely each was", fontsize=10)


def bars(ax: Any, names: Sequence[str], shares: Sequence[float]) -> None:
  drawn = ax.barh(range(len(names)), shares, color="tab:blue")
  ax.bar_label(drawn, [f"{share:.1%}" for share in shares], fontsize=8, padding=2)
  ax.set_yticks(range(len(names)), names, **FONT)
  ax.set_xlim(0, min(1.0, 1.2 * max(shares)))
