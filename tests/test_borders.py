# SPDX-License-Identifier: Apache-2.0
"""Where commands meet the system: what they read, where they write, what is around them."""

import io
import sys
from pathlib import Path

import pytest

from flaxlm.commands.infer import read_lines
from flaxlm.commands.parsing import read_text
from flaxlm.errors import ConfigError


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
