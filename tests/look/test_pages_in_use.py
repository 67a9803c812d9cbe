# SPDX-License-Identifier: Apache-2.0
"""The pages as people use them, by keyboard and pointer: what they say is what the model
computed."""

import re
from pathlib import Path

import numpy as np
import pytest
from browser import with_chromium
from look_runs import HOSTILE, drive, make_run, page_of

from flaxlm.look.attention import look_attention
from flaxlm.look.beside import Side, look_beside
from flaxlm.look.embeddings import look_embeddings
from flaxlm.look.pieces import make_reading
from flaxlm.tokenizers import train_tokenizer


def share_of(text: str) -> float:
  """A percentage as the pages write it."""
  return 0.0 if text in ("0", "<0.1%") else float(text.removesuffix("%")) / 100


def pair_of(line: str) -> tuple[int, int, float]:
  """Query, key and weight of `a (3) → b (1): 12%`."""
  t, s, w = re.fullmatch(r".*? \((\d+)\) → .*? \((\d+)\): (\S+)", line, re.S).groups()
  return int(t), int(s), share_of(w)


ATTENTION = """
  const heads = all(".head");
  const [map, lines] = all(".pane");
  const readout = document.querySelector("p.mono");
  heads[6].click();
  heads[6].focus();
  press(heads[6], "ArrowUp");
  found.title = all("h2")[1].textContent;
  found.focused = heads.indexOf(document.activeElement);
  const score = () => document.querySelector("canvas.wide").nextSibling.textContent;
  const told = () => [readout.textContent, score()];
  found.walk = [told()];
  const walk = (pane, key) => { press(pane, key); found.walk.push(told()); };
  for (const key of ["ArrowUp", "ArrowUp", "ArrowLeft"]) walk(map, key);
  walk(lines, "ArrowRight");
  const point = (pane, x, y) => {
    const frame = pane.getBoundingClientRect();
    pane.dispatchEvent(event("pointermove", frame.left + x, frame.top + y));
    return document.getElementById("tip").textContent;
  };
  lines.scrollTop = map.scrollTop = map.scrollLeft = 0;
  found.left = point(lines, 5, 16 * 5 + 8);
  found.right = point(lines, lines.clientWidth - 5, 16 * 2 + 8);
  found.cell = point(map, map.clientWidth - 20, map.clientHeight - 20);
  button("score before the softmax").click();
  button("weight").click();
  const cuts = (one) =>
    getComputedStyle(one).overflow !== "visible" && one.scrollHeight > one.clientHeight + 1;
  found.cut = 0;
  let outer = heads[0].parentElement;
  for (; outer !== document.body; outer = outer.parentElement) found.cut += cuts(outer);
"""


@with_chromium
def test_attention_names_query_key_and_weight(tmp_path: Path):
  run = make_run()
  reading = make_reading(run.model.cfg, run.tokenizer, HOSTILE[:11], None, 99)
  view = look_attention(run, reading, 99)
  (one,) = page_of(view).view["data"]["maps"]
  found = drive(view, tmp_path / "attention.html", ATTENTION)
  assert found["focused"] == 2 and found["title"].startswith("Layer 0, head 2: ")
  assert found["cut"] == 0, "all heads are seen at once"
  weights_TS = one["weights"][0, 2]
  last = len(weights_TS) - 1
  best = int(weights_TS[last].argmax())
  walk = [pair_of(line) for line, _ in found["walk"]]
  assert walk[0][0] == last
  key = walk[0][1]
  moves = [(last, key), (last - 1, min(key, last - 1)), (last - 2, min(key, last - 2))]
  left = (last - 2, max(0, moves[2][1] - 1))
  assert [pair[:2] for pair in walk] == [*moves, left, (last - 2, left[1] + 1)]
  sides = {}
  for side in ("queries", "keys"):
    n = one["vectors"]["heads"].index(2)
    sides[side] = (2 * one["vectors"][side]["values"][n] - 1) * one["vectors"][side][
      "most"
    ][n]
  for (t, s, weight), (_, says) in zip(walk, found["walk"], strict=True):
    assert weight == pytest.approx(weights_TS[t, s], abs=0.006)
    (score,) = re.findall(r"score of (-?[\d.e-]+\d)", says)
    assert float(score) == pytest.approx(sides["queries"][t] @ sides["keys"][s], rel=6e-3)
  fan = [pair_of(line) for line in found["left"].split("\n")]
  assert [t for t, _, _ in fan] == [5] * 4 and fan[0][1] == weights_TS[5].argmax()
  fan = [pair_of(line) for line in found["right"].split("\n")]
  assert [s for _, s, _ in fan] == [2] * 4 and fan[0][0] == weights_TS[:, 2].argmax()
  assert " → " in found["cell"] and best <= last


EMBEDDINGS = """
  const canvas = document.querySelector("canvas.movable");
  const written = [];
  const fillText = CanvasRenderingContext2D.prototype.fillText;
  CanvasRenderingContext2D.prototype.fillText = function (text, x, y) {
    written.push([x, y, this.measureText(text).width]);
    fillText.call(this, text, x, y);
  };
  button("whole map").click();
  found.labels = [...written];
  button("three directions, turning").click();
  const still = canvas.toDataURL();
  press(canvas, "ArrowRight");
  found.turned = canvas.toDataURL() !== still;
  press(canvas, "ArrowLeft");
  found.back = canvas.toDataURL() === still;
  const drag = (kind, x) => canvas.dispatchEvent(event(kind, x, 300));
  canvas.setPointerCapture = () => {};
  drag("pointerdown", 200); drag("pointermove", 260); drag("pointerup", 260);
  found.dragged = canvas.toDataURL() !== still;
  const input = document.querySelector("input[type=search]");
  input.value = "66";
  input.dispatchEvent(new Event("input"));
  press(input, "Enter");
  const near = () => all(".panel .token").map((one) => one.textContent);
  found.after = near();
  button("before training").click();
  found.before = near();
"""


@with_chromium
def test_embeddings_turn_and_tell_neighbours_before_and_after(tmp_path: Path):
  view = look_embeddings(make_run(depth=1), 200)
  data = page_of(view).view["data"]
  found = drive(view, tmp_path / "embeddings.html", EMBEDDINGS)
  assert found["turned"] and found["back"] and found["dragged"]
  for name, moment in zip(("after", "before"), data["moments"], strict=True):
    pairs = zip(moment["nearest"][66], moment["cosines"][66], strict=True)
    expected = [f"{data['tokens'][n]['label']}  {cosine:.3f}" for n, cosine in pairs]
    assert found[name] == expected
  assert len(found["labels"]) > 20
  for i, (x, y, wide) in enumerate(found["labels"]):
    for a, b, width in found["labels"][:i]:
      assert abs(y - b) >= 12 or x >= a + width or a >= x + wide, "labels overlap"


BESIDE = """
  const strips = all(".two .strip").map((box) => [...box.querySelectorAll("button")]);
  strips[0][5].focus();
  const chosen = (tokens) => tokens.flatMap((token, n) =>
    (token.classList.contains("chosen") ? [n] : []));
  found.chosen = strips.map(chosen);
  found.panels = all(".panel").map((panel) => panel.textContent);
  const words = () => [...all("tbody").at(-1).querySelectorAll("tr")];
  found.rows = words().length;
  button("most different surprise first").click();
  found.first = words()[0].firstChild.textContent;
"""


@with_chromium
def test_two_texts_side_by_side_show_the_same_bytes(tmp_path: Path):
  text = "to be or not to be"
  pieces = train_tokenizer("bpe", [text] * 50, 300)
  run, other = make_run(depth=1), make_run(depth=1, name="other")
  sides = [Side("one", run.tokenizer, run)]
  sides.append(Side("other", pieces, other._replace(tokenizer=pieces)))
  view = look_beside(sides, text, None, 99)
  found = drive(view, tmp_path / "beside.html", BESIDE)
  own, others = (side["tokens"] for side in view.figures["sides"])
  at = own[5]["at"]
  holds = lambda token: (
    token["hex"] and 0 <= at - token["at"] < len(bytes.fromhex(token["hex"]))
  )
  assert found["chosen"] == [[5], [n for n, token in enumerate(others) if holds(token)]]
  assert f"rank {own[5]['rank']}" in found["panels"][0]
  words = view.figures["words"]
  assert found["rows"] == len(words) == 6
  gaps = [abs(np.subtract(*word["bits"])) for word in words]
  assert found["first"] == words[int(np.argmax(gaps))]["word"]
