# SPDX-License-Identifier: Apache-2.0
"""Run directories: config, tokenizer and metrics are what was written, or an error."""

import json
from pathlib import Path

import pytest

from flaxlm.checkpoint.manifest import NAME, Entry, digest, read_entries, write_entries
from flaxlm.config import Config, to_json
from flaxlm.errors import CheckpointError, WriteError
from flaxlm.runs import (
  CONFIG,
  IMPORTED_FILES,
  METRICS,
  TOKENIZER,
  check_unchanged,
  files_damage,
  lines_until,
  load_config_of,
  new_files,
)

LINES = [json.dumps({"step": step, "train/loss": 0.5}) + "\n" for step in range(1, 7)]


@pytest.fixture
def run(tmp_path: Path) -> Path:
  """A run that has come to step 6, with files of an import beside it."""
  (tmp_path / IMPORTED_FILES).mkdir()
  (tmp_path / IMPORTED_FILES / "chat_template.jinja").write_text("{{ messages }}")
  with new_files(tmp_path) as folder:
    (folder / CONFIG).write_text(to_json(Config().resolve(300)))
    (folder / TOKENIZER).write_text('{"kind": "bytes"}')
    (folder / METRICS).write_text("".join(LINES))
  return tmp_path


def test_a_run_as_it_was_written_is_whole(run: Path):
  assert files_damage(run) == []
  assert load_config_of(run) == Config().resolve(300)
  known = {CONFIG, TOKENIZER, METRICS, f"{IMPORTED_FILES}/chat_template.jinja"}
  assert set(read_entries(run)) == known
  assert not list(run.glob(".new-*"))


def test_metrics_may_grow(run: Path):
  with (run / METRICS).open("a") as file:
    file.write('{"step": 7, "tr')
  assert files_damage(run) == []


@pytest.mark.parametrize(
  "name", [CONFIG, TOKENIZER, METRICS, f"{IMPORTED_FILES}/chat_template.jinja"]
)
def test_every_file_that_a_run_needs_is_verified(run: Path, name: str):
  whole = (run / name).read_bytes()
  (run / name).write_bytes(whole[:-4] + bytes([whole[-4] ^ 1]) + whole[-3:])
  assert files_damage(run) == [f"{name}: damaged (SHA-256 differs)"]
  (run / name).write_bytes(whole[:-4])
  assert files_damage(run) == [f"{name}: {len(whole) - 4} bytes, not {len(whole)}"]
  (run / name).unlink()
  assert files_damage(run) == [f"{name}: missing"]
  (run / name).write_bytes(whole)
  assert files_damage(run) == []
  (run / "special_tokens.json").write_text("{}")
  assert files_damage(run) == ["special_tokens.json: not in the manifest"]


@pytest.mark.parametrize(
  ("old", "new"),
  [('"logit_scale": 1.0', '"logit_scale": 7.0'), ('"seed": 0', '"seed": 1')],
)
def test_a_changed_digit_of_the_config_is_refused(run: Path, old: str, new: str):
  text = (run / CONFIG).read_text()
  assert text.count(old) == 1
  (run / CONFIG).write_text(text.replace(old, new))
  with pytest.raises(CheckpointError, match=r"config\.json: damaged") as caught:
    load_config_of(run)
  assert f"remove {run / NAME}" in caught.value.cure
  (run / NAME).unlink()  # the user has meant it
  assert load_config_of(run) != Config().resolve(300)
  assert files_damage(run) == [f"{NAME}: missing"]


def test_a_config_that_no_model_has_is_refused_without_a_manifest_too(run: Path):
  text = (run / CONFIG).read_text()
  (run / CONFIG).write_text(text.replace('"num_kv_heads": 4', '"num_kv_heads": 3'))
  (run / NAME).unlink()
  with pytest.raises(CheckpointError, match="num_kv_heads=3 does not divide"):
    load_config_of(run)


def test_how_a_run_was_trained_is_no_obstacle(run: Path):
  """As its rows may be longer than what the model, cut short later, can read."""
  text = (run / CONFIG).read_text()
  (run / CONFIG).write_text(text.replace('"seq_len": 256', '"seq_len": 999999'))
  (run / NAME).unlink()
  assert load_config_of(run).data.seq_len == 999999


@pytest.mark.parametrize("text", ["", "[]", '{"files": {"config.json": 3}}', None])
def test_a_manifest_of_another_shape_is_damage(run: Path, text: str | None):
  (run / NAME).unlink()
  if text is None:
    (run / NAME).mkdir()
  else:
    (run / NAME).write_text(text)
  (problem,) = files_damage(run)
  assert problem.startswith(f"{NAME}: ") and "Errno" not in problem
  with pytest.raises(CheckpointError, match=NAME):
    check_unchanged(run, CONFIG)


def test_new_files_come_together_or_not_at_all(run: Path):
  before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
  with pytest.raises(WriteError, match="full"), new_files(run) as folder:
    (folder / CONFIG).write_text("{}")
    raise OSError("full")
  assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
  with new_files(run) as folder:
    (folder / TOKENIZER).write_text('{"kind": "other"}')
  assert files_damage(run) == []
  assert (run / TOKENIZER).read_text() == '{"kind": "other"}'


def test_what_others_have_damaged_is_not_vouched_for(run: Path):
  (run / IMPORTED_FILES / "chat_template.jinja").write_text("{{ changed }}")
  with new_files(run) as folder:
    (folder / METRICS).write_text("")
  assert files_damage(run) != []


def test_a_resumed_run_keeps_the_metrics_of_its_steps(run: Path):
  assert lines_until(run / METRICS, 4) == "".join(LINES[:4]).encode()
  (run / METRICS).write_bytes(
    b'{"step": 1, "a": "\xff"}\n[]\n' + "".join(LINES).encode() + b'{"step": 2}'
  )
  assert lines_until(run / METRICS, 2) == "".join(LINES[:2]).encode()
  (run / METRICS).unlink()
  assert lines_until(run / METRICS, 2) == b""


def test_a_part_of_a_file_has_a_digest_of_its_own(tmp_path: Path):
  (tmp_path / "a").write_bytes(b"x" * (2**20 + 5) + b"y")
  (tmp_path / "b").write_bytes(b"x" * (2**20 + 5))
  assert digest(tmp_path / "a", 2**20 + 5) == digest(tmp_path / "b")
  assert digest(tmp_path / "a", 2**20 + 6) == digest(tmp_path / "a")
  write_entries(tmp_path, {"b": Entry(3, digest(tmp_path / "b"))})
  assert read_entries(tmp_path) == {"b": Entry(3, digest(tmp_path / "b"))}
