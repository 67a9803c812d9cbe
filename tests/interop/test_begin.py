# SPDX-License-Identifier: Apache-2.0
"""Runs that begin from another run: what they take over, and what they refuse."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import commands_in_process, slow, tiny
from test_transfer import checkpoint
from tiny_models import VARIANTS

from flaxlm.chat.templates import CHAT
from flaxlm.config import Config, TrainingConfig, override
from flaxlm.decoding.loading import load_run
from flaxlm.errors import CheckpointError
from flaxlm.interop.transfer import import_run
from flaxlm.nn.models import build_model
from flaxlm.origin import adopt, find_origin, read_origin, write_origin
from flaxlm.runs import ORIGIN, files_damage
from flaxlm.sharding import make_mesh
from flaxlm.training.optimizer import build_optimizer
from flaxlm.training.program import Program, begin_state, load_opt_state

pytestmark = pytest.mark.slow  # each begins with runs that are trained

# No step changes a parameter: what is evaluated at the end is what the run began from.
STILL = {"optimizer__learning_rate": 0.0}
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
IDS = {"bos_token_id": 1, "eos_token_id": 2}

Commands = Callable[..., Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A corpus, a run that was trained on it for three steps, and one that was imported."""
  root = tmp_path_factory.mktemp("begin")
  (root / "text").mkdir()
  for number in range(12):
    lines = [f"the cat {a} sat at {a * number}.\n" for a in range(20)]
    (root / "text" / f"{number}.txt").write_text("".join(lines))
  values = VARIANTS["llama_3"].values | {"vocab_size": 281}  # the tokenizer's, and more
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(VARIANTS, "more_ids", VARIANTS["llama_3"]._replace(values=values))
    source = checkpoint(root / "hub", "more_ids", "llama", eos_token="</s>", ids=IDS)
  (source / "chat_template.jinja").write_text(TEMPLATE)
  import_run(source, root / "runs" / "imported", make_mesh({"data": -1}))
  return root


@pytest.fixture(scope="module")
def commands(folder: Path, cache_root: Path) -> Iterator[Commands]:
  with commands_in_process(cache_root) as run, pytest.MonkeyPatch.context() as patch:
    patch.chdir(folder)
    trained = run("train", *tiny("files:text", name="trained", training__num_steps=3))
    assert trained.returncode == 0, trained.stderr
    yield run


def fields(init: str, name: str, **knobs: Any) -> list[str]:
  """Arguments of a run of seconds that says nothing of its model, but for what `knobs`
  do."""
  knobs = {"training__num_steps": 3, "init": init, "name": name, **knobs}
  given = {knob.replace("__", "."): value for knob, value in knobs.items()}
  said = [f"--{knob}={value}" for knob, value in given.items()]
  rest = [
    argument
    for argument in tiny("files:text")
    if not argument.startswith(("--model.", "--tokenizer."))
    and argument.partition("=")[0][2:] not in given
  ]
  return [*rest, *said]


def evaluation(folder: Path, name: str) -> dict[str, float]:
  lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
  return next(m for m in map(json.loads, reversed(lines)) if "eval/loss" in m)


def losses(folder: Path, name: str) -> dict[int, float]:
  lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
  return {m["step"]: m["train/loss"] for m in map(json.loads, lines) if "train/loss" in m}


@pytest.fixture(scope="module")
def begun(commands: Commands, folder: Path) -> str:
  """A run that began from the imported one, and made three steps."""
  own = {"model__width": 32, "model__num_kv_heads": 2}  # what the other has: it agrees
  done = commands("train", *fields("imported", "begun", **own))
  assert done.returncode == 0, done.stderr
  return done.stderr


@pytest.mark.parametrize("init", ["trained", slow("imported")])
def test_it_begins_where_the_other_is(commands: Commands, folder: Path, init: str):
  """Its loss is what `eval` says of the origin."""
  rows = {"data__seq_len": 128 if init == "imported" else 32}  # as the origin has them
  done = commands("train", *fields(init, f"still-{init}", **STILL, **rows))
  assert done.returncode == 0, done.stderr
  words = ("eval", init, "--corpus=files:text", "--split=validation", "--json")
  done = commands(*words)
  assert done.returncode == 0, done.stderr
  found, wanted = evaluation(folder, f"still-{init}"), json.loads(done.stdout)
  assert found["eval/loss"] == pytest.approx(wanted["eval/loss"], rel=1e-5)


def test_it_says_what_it_began_from_and_is_whole(
  commands: Commands, folder: Path, begun: str
):
  run_dir, source = folder / "runs" / "begun", folder / "runs" / "imported"
  origin = read_origin(run_dir)
  assert origin == find_origin(Config(name="x", init=str(source)))
  assert origin is not None and (origin.path, origin.step) == (source, 0)
  assert f"runs/begun begins from {origin}" in begun
  assert f"begins from {origin}" in commands("ckpt", "list", "begun").stdout
  assert commands("ckpt", "verify", "begun").returncode == 0
  of = lambda path: json.loads((path / "config.json").read_text())
  for name in ("model", "tokenizer"):
    assert of(run_dir)[name] == of(source)[name]
  whole = (run_dir / ORIGIN).read_text()
  (run_dir / ORIGIN).write_text(whole.replace('"step": 0', '"step": 1'))
  done = commands("ckpt", "list", "begun")
  assert done.returncode == 4 and "origin.json: damaged" in done.stderr
  (run_dir / ORIGIN).write_text(whole)


def test_what_an_import_brought_along_comes_along(
  commands: Commands, folder: Path, begun: str
):
  run_dir = folder / "runs" / "begun"
  brought = {path.name for path in (folder / "runs/imported/huggingface").iterdir()}
  assert brought == {path.name for path in (run_dir / "huggingface").iterdir()}
  talk = ("--interactive", "--temperature=0", "--max-new-tokens=3", "--verbose")
  done = commands("infer", "begun", *talk, input="hi\n")
  assert done.returncode == 0, done.stderr
  assert load_run(run_dir, make_mesh({"data": -1})).tokenizer.eos_ids == {2}
  done = commands("export", "begun", "out")
  assert done.returncode == 0 and "llama" in done.stdout, done.stderr
  out = folder / "out"
  for name in ("tokenizer_config.json", "chat_template.jinja"):
    assert (out / name).read_bytes() == (folder / "hub" / name).read_bytes()
  config = json.loads((out / "config.json").read_text())
  assert (config["model_type"], config["eos_token_id"]) == ("llama", 2)
  template = run_dir / "huggingface" / "chat_template.jinja"
  template.write_text("")
  assert any("chat_template" in line for line in files_damage(run_dir))
  template.write_text(TEMPLATE)


def test_it_resumes_as_if_it_had_never_stopped_and_without_its_origin(
  commands: Commands, folder: Path
):
  shutil.copytree(folder / "runs/imported", folder / "runs/gone")
  arguments = fields("gone", "halves", training__num_steps=5, checkpoint__every_steps=2)
  assert commands("train", *arguments).returncode == 0
  whole = losses(folder, "halves")
  shutil.rmtree(folder / "runs/halves/checkpoints/5")
  shutil.rmtree(folder / "runs/gone")
  done = commands("train", *arguments)
  assert done.returncode == 0, done.stderr
  assert "resuming runs/halves at step 4" in done.stderr
  assert f"runs/halves begins from {folder / 'runs/gone'}" in done.stderr
  assert losses(folder, "halves") == whole and len(whole) == 5
  unnamed = [argument for argument in arguments if not argument.startswith("--init")]
  before = [
    adopt(override(Config(name="halves"), words[:-1])) for words in (arguments, unnamed)
  ]
  assert before[0].model == before[1].model
  done = commands("train", *fields("imported", "halves", training__num_steps=5))
  assert done.returncode == 4
  assert f"began from {folder / 'runs/gone'}, not from imported" in done.stderr
  done = commands("train", *arguments, "--checkpoint.resume=never")
  assert done.returncode == 4 and "gone is not a run directory" in done.stderr


@pytest.mark.slow
def test_it_begins_again_after_a_kill_before_the_first_checkpoint(
  commands: Commands, folder: Path
):
  arguments = fields("imported", "killed")
  assert commands("train", *arguments).returncode == 0
  shutil.rmtree(folder / "runs/killed/checkpoints")
  done = commands("train", *arguments)
  assert done.returncode == 0, done.stderr
  assert files_damage(folder / "runs/killed") == []
  # Another run in its place, from random weights, keeps nothing of it.
  never = "--checkpoint.resume=never"
  done = commands(
    "train", *tiny("files:text", name="killed"), "--training.num-steps=1", never
  )
  assert done.returncode == 0, done.stderr
  left = {path.name for path in (folder / "runs/killed").iterdir()}
  assert not left & {"huggingface", "origin.json", "special_tokens.json"}
  assert files_damage(folder / "runs/killed") == []


def test_on_any_mesh(commands: Commands, folder: Path, begun: str):
  """281 ids do not divide by 2: the vocabulary is padded while it is read."""
  done = commands("train", *fields("imported", "cut", mesh="data=2,fsdp=2,tensor=2"))
  assert done.returncode == 0, done.stderr
  assert "padded to" in done.stderr
  found, wanted = losses(folder, "cut"), losses(folder, "begun")
  assert list(found.values()) == pytest.approx(list(wanted.values()), rel=1e-5)
  done = commands("export", "cut", "exported-cut")
  assert done.returncode == 0, done.stderr
  assert json.loads((folder / "exported-cut/config.json").read_text())["vocab_size"] == 281


def test_the_optimizer_comes_along_when_asked(commands: Commands, folder: Path):
  """Its moments are those of the origin, and its schedule begins anew."""
  mesh = make_mesh({"data": -1})
  source = load_run(folder / "runs" / "trained", mesh)
  cfg, model = source.cfg, build_model(source.cfg.model, TrainingConfig(scanned=True))
  optimizer = build_optimizer(cfg.optimizer, 10)
  own = Config(name="x", init=str(source.path), init_optimizer=True)
  origin, program = find_origin(own), Program(model, optimizer, None, None)
  state = begin_state(origin, program, mesh, own)
  flat = jax.tree_util.tree_leaves_with_path(state.opt_state)
  stored = load_opt_state(origin, state.opt_state)
  same = jax.tree.map(lambda a, b: bool((a == b).all()), state.opt_state, stored)
  changed = [
    (jax.tree_util.keystr(path), int(leaf))
    for (path, leaf), is_same in zip(flat, jax.tree.leaves(same), strict=True)
    if not is_same
  ]
  assert changed and all(leaf == 0 and ".count" in name for name, leaf in changed)
  assert any(np.any(leaf) for _, leaf in flat if leaf.ndim)
  new = begin_state(origin, program, mesh, Config())
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(new.opt_state) if leaf.ndim > 1)
  for a, b in zip(*map(jax.tree.leaves, (new.params, source.params)), strict=True):
    np.testing.assert_array_equal(a, b)

  for refused in (
    fields("imported", "cold", init_optimizer=True),
    fields("trained", "cold", init_optimizer=True, optimizer__kind="lion"),
  ):
    done = commands("train", *refused)
    assert done.returncode == 4, done.stderr
    assert "init_optimizer: the optimizer's state cannot be taken over" in done.stderr


@pytest.mark.parametrize(
  ("init", "knobs", "code", "said"),
  [
    ("imported", {"model__width": 64}, 2, "model.width=64, but runs/imported, from which"),
    # The default, and it is said.
    ("imported", {"model__width": 128}, 2, "model.width=128, but runs/imported"),
    ("imported", {"model__rope__theta": 5.0}, 2, "model.rope.theta=5.0, but runs/imported"),
    ("imported", {"tokenizer__kind": "byte"}, 2, "tokenizer.kind=byte, but runs/imported"),
    ("trained", {"tokenizer__vocab_size": 300}, 2, "tokenizer.vocab_size=300, but runs/"),
    (
      "imported",
      {"data__seq_len": 500},
      2,
      "data.seq_len=500 is longer than model.context",
    ),
    ("imported", {"data__seq_len": 500}, 2, "\n  set --data.seq-len="),
    ("nowhere", {}, 4, "nowhere is not a run directory"),
    ("trained", {"name": "trained", "checkpoint__resume": "never"}, 2, "the run that is"),
    (
      "none",
      {"init_optimizer": True, "data__seq_len": 16},
      2,
      "init_optimizer needs a run",
    ),
    ("hub", {}, 4, "hub is a checkpoint of others"),
  ],
)
def test_what_cannot_be_is_refused_in_a_line(
  commands: Commands, folder: Path, init: str, knobs: dict[str, Any], code: int, said: str
):
  done = commands("train", *fields(init, **({"name": "refused"} | knobs)))
  assert done.returncode == code, done.stderr
  assert said in done.stderr and "Traceback" not in done.stderr
  assert not (folder / "runs" / "refused").exists()


def test_a_chat_template_of_the_origin_comes_along(folder: Path, tmp_path: Path):
  """That of a run taught by conversations, unless the new run has its own."""
  source = find_origin(Config(name="x", init=str(folder / "runs" / "imported")))
  other = source._replace(path=tmp_path / "other")
  other.path.mkdir()
  (other.path / CHAT).write_text("{}")
  write_origin(tmp_path, other)
  assert (tmp_path / CHAT).read_text() == "{}"
  (tmp_path / CHAT).write_text("own")
  write_origin(tmp_path, other)
  assert (tmp_path / CHAT).read_text() == "own"


def test_dropout_may_differ(commands: Commands):
  """No parameter depends on it."""
  said = ("--init=imported", "--data.seq-len=32", "--model.dropout=0.1")
  cfg = adopt(override(Config(name="x"), said))
  assert (cfg.model.dropout, cfg.model.width) == (0.1, 32) and adopt(cfg) == cfg
  done = commands("plan", *said, "--json")
  assert done.returncode == 0, done.stderr


def test_a_changed_origin_is_not_begun_from(commands: Commands, folder: Path):
  shutil.copytree(folder / "runs/imported", folder / "runs/changed")
  tokenizer = folder / "runs/changed/tokenizer.json"
  tokenizer.write_text(tokenizer.read_text().replace('"cat"', '"bat"'))
  done = commands("train", *fields("changed", "refused"))
  assert done.returncode == 4 and "tokenizer.json" in done.stderr
  with pytest.raises(CheckpointError, match="not as it was written"):
    find_origin(Config(name="x", init=str(folder / "runs/changed")))
