# SPDX-License-Identifier: Apache-2.0
"""The page of a run and that of several: their numbers are the runs' own."""

import dataclasses
import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import drawn_page, with_chromium
from look_runs import BYTES, HOSTILE, TINY, page_of

from flaxlm.cli import main
from flaxlm.config import Config, DataConfig, ModelConfig, MoEConfig, RopeConfig, to_json
from flaxlm.errors import CheckpointError, ConfigError
from flaxlm.look.compare import look_runs, names_of, times_at, tokens_at
from flaxlm.look.metrics import charts_of, read_metrics
from flaxlm.look.page import digest, save_view, to_html
from flaxlm.look.runs import chosen_fields, look_run, read_samples
from flaxlm.look.view import View
from flaxlm.runs import CONFIG, METRICS, SAMPLES, TOKENIZER
from flaxlm.training.layers import named_loads, named_sizes

LINES = [
  {"step": 2, "train/loss": 3.0, "train/tokens": 100.0, "perf/elapsed_seconds": 10.0},
  {"step": 4, "train/loss": 2.0, "train/tokens": 200.0, "perf/elapsed_seconds": 30.0},
  {"step": 5, "eval/loss": 2.5, "eval/bits_per_byte": 1.5, "eval/gzip_bits_per_byte": 2.0},
]


def write_run(folder: Path, lines: Any = LINES, tokenizer: str = "", **fields: Any) -> Path:
  """A run of metrics, without a checkpoint; `tokenizer` is another one's text."""
  folder.mkdir(parents=True)
  cfg = Config(
    **{"name": folder.name, "model": ModelConfig(**TINY), "data": DataConfig()} | fields
  )
  (folder / CONFIG).write_text(to_json(cfg.resolve()))
  BYTES.save(folder / TOKENIZER)
  if tokenizer:
    (folder / TOKENIZER).write_text(tokenizer)
  text = "".join(f"{json.dumps(line)}\n" for line in lines)
  (folder / METRICS).write_text(text)
  return folder


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
  other = [line | {"perf/mfu": 0.4} for line in LINES]
  other[1] |= {"train/loss": 1.75}
  moe = ModelConfig(**TINY, moe=MoEConfig(num_experts=4))
  return [
    write_run(tmp_path / "a", seed=5),
    write_run(tmp_path / "b", other, seed=6, model=moe),
  ]


# -- Several runs --------------------------------------------------------------------------


def test_tokens_and_time_at_a_step():
  curves = {
    "train/tokens": ([2, 4], [100.0, 200.0]),
    "perf/elapsed_seconds": ([2, 4], [10.0, 30.0]),
  }
  # Two steps of 100 tokens each, two of 200; and then as fast as before.
  steps = [0, 1, 2, 3, 4, 5]
  assert tokens_at(curves, steps) == [0, 100, 200, 400, 600, 800]
  assert times_at(curves, [2, 3, 4, 5]) == [10, 20, 30, 30]
  assert tokens_at({}, [3]) == [None] and times_at({}, [3]) == [None]


def test_curves_of_several_runs_are_theirs(two: list[Path]):
  page = page_of(look_runs(two)).view
  charts = {chart["title"]: chart for chart in page["data"]["charts"]}
  a, b = charts["Loss: training"]["series"]
  assert (a["name"], a["colour"], a["y"]) == ("a", 0, [3, 2])
  assert (b["name"], b["colour"], b["y"]) == ("b", 1, [3, 1.75])
  assert a["x"] == [2, 4] and a["tokens"] == [200, 600] and a["time"] == [10, 30]
  assert page["data"]["across"]["time"] == "seconds since the start"
  assert not charts["Loss: training"]["says"] and page["cuts"] == []
  (only,) = charts["MFU, strict: model FLOPs utilization"]["series"]
  assert only["colour"] == 1, "a run keeps its colour where the other has nothing"
  bits = charts["Bits per byte: held out"]
  assert bits["marks"] == [{"name": "gzip -9", "at": 2, "axis": "y"}]
  assert bits["series"][0]["tokens"] == [800] and bits["series"][0]["time"] == [30]
  rows = {row["name"]: row for row in page["data"]["rows"]}
  assert rows["training loss, last"] == {
    "name": "training loss, last",
    "values": [2, 1.75],
    "best": [1],
  }
  assert rows["held-out loss, last"]["best"] == [], "they are equal"
  assert rows["tokens read"]["values"] == [800, 800] and rows["steps"]["values"] == [5, 5]


def test_what_differs_in_the_configs(two: list[Path]):
  view = look_runs(two)
  fields = {row["name"]: row for row in view.data["config"]}
  assert fields["seed"]["values"] == ["5", "6"] and fields["seed"]["chosen"] == [True, True]
  experts = fields["model.moe.num_experts"]
  assert experts["values"] == ["0", "4"] and experts["chosen"] == [False, True]
  assert fields.keys() == {"seed", "model.moe.num_experts"}
  assert view.figures["differences"]["seed"] == ["5", "6"]


def test_losses_of_other_tokenizers_do_not_compare(two: list[Path], tmp_path: Path):
  bare = [{"step": 1, "train/loss": 3.0, "eval/loss": 1.0}]
  for name, lines, words in (
    ("c", LINES, "Bits per byte do, and stand first."),
    ("d", bare, "Bits per byte would, but there are none of d."),
  ):
    other = write_run(tmp_path / name, lines, tokenizer="another")
    view = look_runs([two[0], other])
    assert not view.figures["losses_compare"]
    assert (
      view.cuts[0].endswith(words) and "losses per token do not compare" in view.cuts[0]
    )
    first, *rest = view.data["charts"]
    assert first["title"] == "Bits per byte: held out"
    assert all("do not compare" in x["says"] for x in rest if x["title"].startswith("Loss"))
    rows = {row["name"]: row for row in view.data["rows"]}
    assert rows["held-out loss, last"]["best"] == []
  assert look_runs(two).figures["losses_compare"]
  lost = [two[0], write_run(tmp_path / "e")]
  for path in lost:
    (path / TOKENIZER).unlink()
  assert not look_runs(lost).figures["losses_compare"], "nobody knows what they were"


def test_other_texts_and_parts_of_them_are_told(two: list[Path], tmp_path: Path):
  other = write_run(tmp_path / "c", data=DataConfig(corpus="gettext:de"))
  assert look_runs([two[0], other]).cuts == [
    "The runs read different texts (data.corpus: stdlib and gettext:de): what is held out "
    "differs."
  ]
  training = dataclasses.replace(Config().training, eval_batches=3)
  part = write_run(tmp_path / "d", training=training)
  assert "eval_batches limits" in look_runs([two[0], part]).cuts[0]


def test_runs_are_named_once_and_are_not_too_many(two: list[Path], tmp_path: Path):
  with pytest.raises(ConfigError, match="named twice"):
    look_runs([two[0], two[0] / ".." / "a"])
  with pytest.raises(ConfigError, match="8 can be told apart"):
    look_runs([tmp_path / str(n) for n in range(9)])
  (two[1] / METRICS).unlink()
  with pytest.raises(CheckpointError, match="b has no metrics yet"):
    look_runs(two)
  assert names_of([Path("x/a"), Path("y/a"), Path("b")]) == ["x/a", "y/a", "b"]


def test_the_command_takes_one_run_or_several(
  two: list[Path], tmp_path: Path, monkeypatch: Any, capsys: Any
):
  monkeypatch.chdir(tmp_path)
  runs = ["--runs-dir", str(tmp_path)]
  assert main(["look", "run", "a", "b", *runs, "--json"]) == 0
  told = json.loads(capsys.readouterr().out)
  assert told["output"] == "a_and_others.html" and Path("a_and_others.html").exists()
  assert [one["name"] for one in told["runs"]] == ["a", "b"]
  assert told["runs"][1]["last"]["train/loss"] == 1.75
  assert main(["look", "run", "a", *runs]) == 0
  assert (two[0] / "look" / "run.html").exists()
  assert main(["look", "run", "a", "nowhere", *runs]) == 4
  assert "nowhere is not a run" in capsys.readouterr().err
  assert main(["look", "run", "a", "a", *runs]) == 2


# -- One run -------------------------------------------------------------------------------


def test_only_what_somebody_chose_is_chosen():
  bare = Config().resolve(4000)
  assert bare.model.head_dim == 32 and chosen_fields(bare) == set()
  model = ModelConfig(
    head_dim=16, window=8, rope=RopeConfig(scaling="yarn", factor=2.0), qkv_biased=True
  )
  cfg = Config(name="x", seed=3, model=model).resolve(4000)
  fields = {"head_dim", "window", "rope.scaling", "rope.factor", "qkv_biased"}
  assert chosen_fields(cfg) == {"seed"} | {f"model.{name}" for name in fields}
  assert chosen_fields(Config(model=ModelConfig(vocab_size=500)).resolve()) == {
    "model.vocab_size"
  }
  dropping = dataclasses.replace(model, dropout=0.1)
  begun = Config(init="other", model=dropping).resolve(4000)
  assert chosen_fields(begun) == {"init", "model.dropout"}, "the model is the other's"


def curves_of(**values: float) -> dict:
  return {name: ([1, 2], [value, value]) for name, value in values.items()}


def test_every_metric_has_a_chart_and_a_name_for_people():
  sizes = {"gradient_norm": {"embedding": 1.0, "blocks": np.ones(3)}}
  named = {f"train/{name}": x for name, x in named_sizes(sizes).items()}
  cfg = ModelConfig(**TINY, moe=MoEConfig(num_experts=12)).resolve()
  named |= named_loads(cfg, np.ones((2, 12)))
  metrics = "loss gradient_norm learning_rate tokens reward telling_groups margin accuracy"
  metrics += " completion_tokens ended_completions chosen_reward rejected_reward"
  named |= {f"train/{name}": 1.0 for name in metrics.split()}
  metrics = (
    "loss perplexity accuracy unknown bits_per_byte gzip_bits_per_byte margin reward"
  )
  metrics += " loss/files:a/*.md bits_per_byte/files:a/*.md chosen_reward rejected_reward"
  named |= {f"eval/{name}": 1.0 for name in metrics.split()}
  metrics = "tokens_per_sec mfu goodput data_wait_fraction drawing_fraction memory_gb"
  named |= {f"perf/{name}": 1.0 for name in metrics.split()}
  charts = charts_of(curves_of(**named, **{"my/own": 1.0}))
  titles = [chart["title"] for chart in charts]
  assert len(set(titles)) == len(titles) and titles[-1] == "my/own"
  lines = [one["name"] for x in charts[:-1] if x["form"] == "lines" for one in x["series"]]
  drawn = len(lines) + sum(len(x["rows"]) for x in charts if x["form"] == "map")
  assert drawn == len(named) - 1, "all but the tokens of a step"
  for name in titles[:-1] + lines:
    assert "files:a" in name or not re.search("[/_]", name), name
  by_title = {chart["title"]: chart for chart in charts}
  layers = [one["name"] for one in by_title["Gradient norm by layer"]["series"]]
  assert layers == ["embedding", "layer 0", "layer 1", "layer 2"]
  experts = by_title["Load of the experts, layer 1"]
  assert experts["rows"] == [str(n) for n in range(12)] and experts["columns"] == [1, 2]


def test_maps_of_many_layers_hold_their_numbers():
  curves = {
    f"train/gradient_norm/layer_{n}": (
      [1, 3] if n else [1],
      [n + 1.0, 20.0 + n][: 1 + bool(n)],
    )
    for n in range(12)
  }
  (chart,) = charts_of(curves)
  assert chart["rows"][:3] == ["layer 0", "layer 1", "layer 2"] and chart["log"]
  np.testing.assert_array_equal(chart["values"][:, 0], np.arange(12) + 1)
  assert np.isnan(chart["values"][0, 1]) and chart["values"][11, 1] == 31


def test_samples_over_time(tmp_path: Path):
  lines = [{"step": 4, "sample": "b"}, {"step": 2, "sample": HOSTILE}, {"step": 9}]
  lines += [{"step": 4, "sample": "again"}]
  text = "".join(f"{json.dumps(line)}\n" for line in lines)
  (tmp_path / SAMPLES).write_text(text + '{"step": 5, "sam')
  assert read_samples(tmp_path) == [
    {"step": 2, "sample": HOSTILE},
    {"step": 4, "sample": "again"},
  ]
  assert read_samples(tmp_path / "nowhere") == [] == [*read_metrics(tmp_path / "nowhere")]


def test_lines_that_are_no_records_are_told_and_left_out(two: list[Path]):
  before = look_run(two[0])
  with (two[0] / METRICS).open("a") as file:
    file.write('nonsense\n[1]\n{"train/loss": 1}\n{"step": Infinity}\n\n{"step": 7, "tr')
  after = look_run(two[0])
  assert before.figures == after.figures and not before.cuts
  (said,) = after.cuts
  assert said == f"5 lines of {two[0] / METRICS} are no records, and are left out."
  assert said in look_runs(two).cuts
  (two[0] / SAMPLES).write_text('{"step": 5, "sam')
  assert any(cut.startswith("1 line of") for cut in look_run(two[0]).cuts)


# -- Browsers ------------------------------------------------------------------------------


def driven(view: View, script: str, folder: Path) -> dict[str, Any]:
  """What a script, which runs when the page is drawn, has put into `found`."""
  driver = """
const wait = setInterval(() => {
  if (!document.documentElement.dataset.ready) return;
  clearInterval(wait);
  const found = {};
  const all = (selector) => [...document.querySelectorAll(selector)];
  const press = (one, key) => one.dispatchEvent(new KeyboardEvent("keydown", { key }));
  SCRIPT
  const controls = all("main button, main select, main input");
  const named = (one) => one.textContent || one.ariaLabel || one.labels.length;
  found.unnamed = controls.filter((one) => !named(one)).length;
  document.body.style.width = "380px"; // a window of Chromium has 500 at least
  found.wide = document.body.scrollWidth - 380;
  document.body.append("FOUND" + JSON.stringify(found) + "END");
}, 20);
""".replace("SCRIPT", script)
  # The page's own policy stands, and allows this one script more.
  html = to_html(view).replace("script-src '", f"script-src '{digest(driver)}' '")
  path = folder / "driven.html"
  path.write_text(html.replace("</body>", f"<script>{driver}</script></body>"), "utf-8")
  found = json.loads(unescape(re.findall("FOUND(.*?)END", drawn_page(path))[-1]))
  assert found.pop("unnamed") == 0 and found.pop("wide") <= 0
  return found


@with_chromium
def test_a_browser_compares_runs_over_steps_tokens_and_time(
  two: list[Path], tmp_path: Path
):
  script = """
  const chart = () => all(".chart")[0];
  const read = () => {
    press(chart().querySelector("svg"), "ArrowRight");
    return chart().querySelector("p.note").textContent;
  };
  found.charts = all(".chart").length;
  found.steps = read();
  all("[aria-label=over] button")[1].click(); found.tokens = read();
  all("[aria-label=over] button")[2].click(); found.time = read();
  all("[aria-label=runs] button")[0].click(); found.one = read();
  found.paths = chart().querySelectorAll("svg path").length;
  found.cells = all("table")[0].querySelectorAll("tr").length;
  found.bold = all("table")[0].querySelector(".chosen-value").textContent;
  """
  view = look_runs(two)
  found = driven(view, script, tmp_path)
  assert found == {
    "charts": len(view.data["charts"]),
    "steps": "step 2: a 3, b 3",
    "tokens": "tokens read 200: a 3, b 3",
    "time": "seconds since the start 10: a 3, b 3",
    "one": "seconds since the start 10: b 3",
    "paths": 1,
    "cells": 1 + len(view.data["rows"]),
    "bold": "1.75",
  }


@with_chromium
def test_a_browser_shows_a_runs_layers_and_samples(tmp_path: Path):
  lines = [{"step": n, "train/loss": 4.0 - n, "perf/goodput": 0.5} for n in (1, 2)]
  for line in lines:
    line |= {f"train/update_size/layer_{n}": 0.1 * (n + line["step"]) for n in range(12)}
  run = write_run(tmp_path / "run", lines, seed=5)
  samples = [{"step": n, "sample": f"{n} {HOSTILE}"} for n in (1, 2)]
  (run / SAMPLES).write_text("\n".join(map(json.dumps, samples)) + "\n")
  script = """
  const map = document.querySelector(".map canvas");
  press(map, "ArrowDown"); press(map, "ArrowRight");
  found.map = map.closest("section").querySelector("p.note").textContent;
  found.rows = all(".map .rows span").map((one) => one.textContent);
  const slider = document.querySelector("input[type=range]");
  found.last = document.querySelector("pre").textContent;
  slider.value = 0; slider.dispatchEvent(new Event("input"));
  found.first = document.querySelector("pre").textContent;
  found.bold = all("td.chosen-value").map((one) => one.textContent);
  const only = all("label").find((one) => one.textContent === "only what was chosen");
  only.querySelector("input").click();
  found.rest = document.querySelectorAll("tbody tr").length;
  found.figures = document.querySelector(".figures").textContent;
  """
  found = driven(look_run(run), script, tmp_path)
  assert found["map"] == "step 2, layer 1: 0.3"
  assert found["rows"] == [f"layer {n}" for n in range(12)]
  assert (found["first"], found["last"]) == (f"1 {HOSTILE}", f"2 {HOSTILE}")
  # The vocabulary is what the rule makes of so many ids.
  chosen = {"seed", "model.depth", "model.width", "model.context"}
  assert {*found["bold"][::2]} == chosen and found["rest"] == len(chosen)
  assert "50%of all time in steps (goodput)" in found["figures"]


@pytest.mark.slow
def test_several_runs_as_a_png(two: list[Path], tmp_path: Path):
  pytest.importorskip("matplotlib")
  named = write_run(tmp_path / "$x$ and_{y")
  assert save_view(look_runs([*two, named]), tmp_path / "a.png") > 20_000
