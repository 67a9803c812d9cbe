# SPDX-License-Identifier: Apache-2.0
"""`flaxlm look`, as users call it: what it writes, where, and what it refuses."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import drawn_page, with_chromium
from look_runs import HOSTILE, Page, make_run, page_of, save_run

from flaxlm.chat.templates import plain_chat
from flaxlm.cli import main
from flaxlm.decoding.loading import load_run
from flaxlm.look.attention import look_attention
from flaxlm.look.embeddings import look_embeddings
from flaxlm.look.page import save_view
from flaxlm.look.pieces import make_reading
from flaxlm.look.positions import look_positions
from flaxlm.look.runs import look_run
from flaxlm.look.tokens import look_tokens, read_chat
from flaxlm.look.view import View
from flaxlm.runs import CHECKPOINTS
from flaxlm.sharding import make_mesh

METRICS = (
  '{"step": 1, "train/loss": 3.0}\n{"step": 2, "train/loss": 2.0, "eval/loss": 2.5}\n'
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A decoder's run, on disk."""
  run = make_run("decoder", depth=1)
  folder = save_run(run, tmp_path_factory.mktemp("look") / "runs" / "tiny")
  (folder / "metrics.jsonl").write_text(METRICS)
  return folder


@pytest.fixture(scope="module")
def views(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, View]:
  """One view of each kind, with a text that would break a careless page."""
  run = load_run(folder, make_mesh({"data": -1}))
  reading = make_reading(run.model.cfg, run.tokenizer, HOSTILE[:40], None, 99)
  return {
    "attention": look_attention(run, reading, 99),
    "embeddings": look_embeddings(run),
    "positions": look_positions(run.model.cfg, HOSTILE, HOSTILE),
    "tokens": look_tokens(run, reading, 99),
    "chat": look_tokens(run, read_talk(run, tmp_path_factory.mktemp("chat")), 99),
    "run": look_run(folder),
  }


def read_talk(run: Any, folder: Path) -> Any:
  file = folder / "talks.jsonl"
  file.write_text(json.dumps(TALK))
  chat = plain_chat(run.tokenizer, folder)
  return read_chat(run.model.cfg, run.tokenizer, chat, file, 1, 99)


def test_attention_and_tokens_from_the_command_line(
  in_process, folder: Path, tmp_path: Path
):
  runs = ("--runs-dir", folder.parent)
  run = in_process("look", "attention", "--text", "ab", *runs, "--json", "--head", 1)
  assert run.returncode == 0, run.stderr
  figures = json.loads(run.stdout)
  path = folder / "look" / "attention.html"
  assert figures["output"] == str(path) and figures["bytes"] == path.stat().st_size
  page = Page(path.read_text("utf-8")).view
  assert page["figures"]["maps"] == figures["maps"]
  assert page["data"]["maps"][0]["weights"].shape == (1, 1, 3, 3)
  (tmp_path / "text.txt").write_text("ab" * 40)
  asked = ("--text-file", "text.txt", "--output", "some/where.html")
  run = in_process("look", "tokens", folder, *asked)
  assert run.returncode == 0, run.stderr
  assert run.stdout.startswith("some/where.html (")
  assert "model.context=48" in run.stderr, "what was cut is told"
  assert (tmp_path / "some" / "where.html").exists()


TALK = {
  "messages": [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": HOSTILE[:9]},
    {"role": "assistant", "content": "é"},
  ]
}


def test_what_carries_loss_in_a_conversation(in_process, folder: Path, tmp_path: Path):
  lines = ("{}", json.dumps(TALK))
  (tmp_path / "talks.jsonl").write_text("\n".join(lines))
  asked = ("look", "tokens", folder, "--chat-file=talks.jsonl", "--output=talk.html")
  run = in_process(*asked, "--record=2", "--json")
  assert run.returncode == 3 and "line 1" in run.stderr
  (tmp_path / "talks.jsonl").write_text("\n".join(lines[1:]))
  run = in_process(*asked, "--json")
  assert run.returncode == 0, run.stderr
  figures = json.loads(run.stdout)
  learnt = [token["label"] for token in figures["tokens"] if token["loss"]]
  assert learnt == ["b", "<|endoftext|>"]  # the rest is behind the context's 48 tokens
  assert figures["num_learnt"] == 2 and figures["loss"] > 0
  assert "of which the first 48" in run.stderr
  pair = {"prompt": "a", "chosen": "b", "rejected": "cd"}
  (tmp_path / "talks.jsonl").write_text(f"{lines[1]}\n{json.dumps(pair)}")
  for flags, answer in (([], ["b"]), (["--rejected"], ["c", "d"])):
    run = in_process(*asked, "--record=2", "--json", *flags)
    assert run.returncode == 0, run.stderr
    figures = json.loads(run.stdout)
    learnt = [token["label"] for token in figures["tokens"] if token["loss"]]
    assert learnt == [*answer, "<|endoftext|>"]
  for flags, told in (
    (["--record=1", "--rejected"], "talks.jsonl, line 1 has no rejected answer"),
    (["--record=3"], "talks.jsonl has no record 3"),
    (["--record=0"], "record"),
    (["--text=a"], "--chat-file with another text"),
  ):
    run = in_process(*asked, *flags)
    assert run.returncode == 2 and told in run.stderr


def test_a_run_and_a_config_need_no_checkpoint(folder: Path, tmp_path: Path, capsys: Any):
  bare = tmp_path / "runs" / "bare"
  shutil.copytree(folder, bare, ignore=shutil.ignore_patterns(CHECKPOINTS))
  assert main(["look", "run", str(bare)]) == 0
  assert str(bare / "look" / "run.html") in capsys.readouterr().out
  assert main(["look", "positions", "bare", "--runs-dir", str(bare.parent)]) == 0
  assert (bare / "look" / "positions.html").exists()
  out = tmp_path / "c.html"
  stretched = ["--model.rope.scaling=yarn", "--model.rope.factor=4"]
  assert main(["look", "positions", "llama_7b", *stretched, "--output", str(out)]) == 0
  assert Page(out.read_text("utf-8")).view["figures"]["G"]["scaling"] == "yarn"


BAD = {
  "no text": (["attention"], 2, "there is no text"),
  "two texts": (["tokens", "--text=a", "--text-file=b"], 2, "give one of them"),
  "no file": (["tokens", "--text-file=nowhere"], 2, "cannot be read"),
  "source": (["tokens", "--text=a", "--source=b"], 2, "leave --source out"),
  "layer": (["attention", "--text=a", "--layer=1"], 2, "layers are 0 to 0"),
  "head": (["attention", "--text=a", "--head=-1"], 2, "heads are 0 to 3"),
  "most": (["attention", "--text=a", "--max-tokens=1"], 2, "at least 2"),
  "suffix": (["tokens", "--text=a", "--output=a.pdf"], 2, "neither .html nor .png"),
  "ids": (["embeddings", "--tokens=1"], 2, "at least 2"),
  "overrides": (["positions", "bare", "--model.depth=2"], 2, "cannot be overridden"),
  "subject": (["atention"], 2, "attention"),
  "nothing": ([], 2, "SUBJECT"),
  "flag": (["run", "--txt=a"], 2, "--txt"),
  "no checkpoint": (["embeddings"], 4, "no trained run"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_told_before_the_checkpoint_is_read(
  name: str, folder: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
):
  """The run has no checkpoint: reading it would end with code 4."""
  bare = tmp_path / "runs" / "bare"
  shutil.copytree(folder, bare, ignore=shutil.ignore_patterns(CHECKPOINTS, "look"))
  monkeypatch.chdir(tmp_path)
  arguments, code, words = BAD[name]
  if arguments[:1] in (["attention"], ["tokens"]):
    arguments = [arguments[0], "bare", *arguments[1:]]
  assert main(["look", *arguments]) == code
  out, err = capsys.readouterr()
  assert words in err and not out
  assert not (bare / "look").exists()


@pytest.mark.parametrize("subject", ["attention", "positions"])
def test_an_rnn_is_refused_by_name(subject: str, tmp_path: Path, capsys: Any):
  run = make_run("rnn")
  folder = save_run(run, tmp_path / "rnn")
  shutil.rmtree(folder / CHECKPOINTS)
  text = ["--text=a"] if subject == "attention" else []
  assert main(["look", subject, str(folder), *text]) == 2
  assert "model.family=rnn has no" in capsys.readouterr().err


@pytest.mark.slow
def test_on_a_mesh_as_on_one_device(folder: Path, views: dict[str, View]):
  run = load_run(folder, make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
  reading = make_reading(run.model.cfg, run.tokenizer, HOSTILE[:40], None, 99)
  for new, old in (
    (look_attention(run, reading, 99), views["attention"]),
    (look_tokens(run, reading, 99), views["tokens"]),
  ):
    if new.kind == "attention":
      one, other = (view.data["maps"][0]["weights"].values for view in (new, old))
      np.testing.assert_allclose(one, other, atol=1e-6)
    else:
      bits = lambda view: [t["bits"] for t in view.figures["tokens"][1:]]
      assert bits(new) == pytest.approx(bits(old), abs=1e-4)


# -- Images and browsers -------------------------------------------------------------------


@pytest.mark.slow
def test_every_view_as_a_png(views: dict[str, View], tmp_path: Path):
  pytest.importorskip("matplotlib")
  for kind, view in views.items():
    path = tmp_path / f"{kind}.png"
    assert save_view(view, path) > 5000
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_without_matplotlib_a_png_names_the_extra(
  folder: Path, monkeypatch: Any, capsys: Any
):
  monkeypatch.setitem(sys.modules, "matplotlib", None)
  assert main(["look", "run", str(folder), "--output", "a.png"]) == 2
  assert "flaxlm[look]" in capsys.readouterr().err


@with_chromium
@pytest.mark.parametrize(
  "kind", ["attention", "embeddings", "positions", "tokens", "chat", "run"]
)
def test_a_browser_draws_the_page_without_a_word(
  kind: str, views: dict[str, View], tmp_path: Path
):
  page_of(views[kind])
  path = tmp_path / f"{kind}.html"
  save_view(views[kind], path)
  drawn_page(path)
