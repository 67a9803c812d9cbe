# SPDX-License-Identifier: Apache-2.0
"""Where commands meet the system: what they read, where they write, what is around them."""

import io
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from conftest import tiny

from flaxlm.checkpoint.store import CheckpointStore
from flaxlm.commands.infer import read_lines
from flaxlm.commands.parsing import read_text
from flaxlm.commands.tokenizer import measure
from flaxlm.decoding.loading import load_run
from flaxlm.errors import ConfigError
from flaxlm.sharding import make_mesh
from flaxlm.tokenizers.imported import ImportedTokenizer, Specials


def test_ends_of_lines_are_read_as_they_stand(tmp_path: Path, monkeypatch):
  """Python makes \\n of each by default; a corpus keeps them, so a prompt must, too."""
  data = "a\r\nb\rc\u2028\n".encode()
  path = tmp_path / "prompt"
  path.write_bytes(b"\xef\xbb\xbf" + data)
  assert read_text(str(path)).encode() == data
  monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
  assert read_text("-").encode() == data


def test_a_closed_standard_input_is_told(monkeypatch):
  monkeypatch.setattr(sys, "stdin", None)
  for read in (lambda: read_text("-"), lambda: next(read_lines())):
    with pytest.raises(ConfigError, match="standard input is closed"):
      read()


def test_what_is_typed_may_be_no_text(monkeypatch):
  """Whatever the locale makes of it: it is refused with the line's other mistakes."""
  typed = io.TextIOWrapper(io.BytesIO(b"a\r\n\xff\n\nb"), "utf-8")
  monkeypatch.setattr(sys, "stdin", typed)
  assert [*read_lines()] == ["a", "\udcff", "", "b"]


def test_answers_do_not_replace_the_prompts(in_process, tmp_path: Path):
  (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n')
  run = in_process("infer", "--prompt-file=a.jsonl", "--output=./a.jsonl")
  assert run.returncode == 2 and "would replace the prompts" in run.stderr
  assert (tmp_path / "a.jsonl").read_text() == '{"prompt": "a"}\n'


@pytest.mark.parametrize(
  ("arguments", "told"),
  [
    (["train", "--data.corpus=files:~no-such-user/x"], "no documents matched files:~no"),
    (["tokenizer", "compare", "bpe:" + "9" * 5000], "'bpe:999"),
    (["export", "run", "out", "--shard-size", "9" * 5000], "shard-size is"),
    *((["plan", f"--{name}=nan"], f"{name} is nan") for name in ("tokens", "price")),
    (["plan", "--network=inf"], "network is inf"),
  ],
)
def test_what_python_would_raise_for_is_told(in_process, arguments: list[str], told: str):
  run = in_process(*arguments)
  assert run.returncode in (2, 3) and told in run.stderr, run.stderr


@pytest.mark.parametrize(
  ("flags", "told"),
  [
    (["eval", "--beams=2"], "--beams without --bleu"),
    (["eval", "--bleu", "--batches=2"], "--bleu with --batches"),
    (["eval", "--tasks=t.jsonl", "--pairs=2"], "--tasks with --pairs"),
    (["infer", "--prompt=a", "--top-logprobs=2"], "--top-logprobs without --json"),
    (["infer", "--prompt=a", "--draft-tokens=2"], "--draft-tokens without --draft"),
    (["infer", "--prompt=a", "--beams=2", "--stop=a"], "--beams with --stop"),
    (["infer", "--prompt=a", "--beams=2", "--seed=1"], "--beams with --seed"),
    (["infer", "--prompt=a", "--batch-size=2"], "--batch-size without --prompt-file"),
    (["infer", "--prompt=a", "--length-penalty=0"], "--length-penalty without --beams"),
  ],
)
def test_a_flag_that_nothing_reads_is_refused(in_process, flags: list[str], told: str):
  run = in_process(*flags)
  assert run.returncode == 2 and told in run.stderr, run.stderr


def test_a_name_in_brackets_is_no_markup(in_process):
  run = in_process("plan", "--name=a[red]b", "--mesh=data=1")
  assert run.stdout.startswith("a[red]b on any"), run.stderr


def test_a_tokenizer_that_leaves_all_text_out_is_compared():
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"x": 0}, merges=[]))
  row = measure(ImportedTokenizer(backend, Specials()), ["abc"], 3)
  assert row["tokens"] == 0 and row["bytes_per_token"] == math.inf
  assert not row["lossless"]


@pytest.mark.slow
def test_what_is_around_a_command_is_told(flaxlm, tmp_path: Path):
  """A platform that is not there, as CUDA in a container without it, a setting of JAX that
  it does not take, and an output that cannot write all characters: of the user's own text,
  or of a path in bytes."""
  (tmp_path / "x").mkdir()
  (tmp_path / "x/config.json").write_text("{}")
  for name in ("bogus", "cuda"):
    run = flaxlm("import", "x", "y", env_changes={"JAX_PLATFORMS": name})
    assert run.returncode == 2 and "Traceback" not in run.stderr, run.stderr
    assert f"JAX does not start with JAX_PLATFORMS={name}" in run.stderr
  run = flaxlm("plan", env_changes={"JAX_ENABLE_X64": "maybe"})
  assert run.returncode == 2 and "Traceback" not in run.stderr, run.stderr
  assert "JAX_ENABLE_X64" in run.stderr
  run = flaxlm("plan", "--name=\u00e9", env_changes={"PYTHONIOENCODING": "ascii"})
  assert run.stdout.startswith("\\xe9 on any"), run.stderr


@pytest.mark.slow
def test_a_run_is_read_while_it_trains(in_process, corpus, monkeypatch, tmp_path: Path):
  """Its oldest checkpoints are deleted when new ones are whole, also while one is read."""
  run = in_process("train", *tiny(corpus, training__num_steps=6))
  assert run.returncode == 0, run.stderr
  steps, aside = tmp_path / "runs/stdlib_tiny/checkpoints", tmp_path / "6"
  (steps / "6").rename(aside)
  restore = CheckpointStore.restore

  def training_goes_on(store: CheckpointStore, step: int, **targets: Any) -> Any:
    if aside.exists():
      aside.rename(steps / "6")
      shutil.rmtree(steps / "3")
    return restore(store, step, **targets)

  monkeypatch.setattr(CheckpointStore, "restore", training_goes_on)
  loaded = load_run(steps.parent, make_mesh({"data": -1}))
  assert loaded.step == 6 and not aside.exists()
