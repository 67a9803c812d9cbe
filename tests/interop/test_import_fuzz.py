# SPDX-License-Identifier: Apache-2.0
"""Damaged and odd checkpoints: `flaxlm import` makes a run that reads text, or says in one
line what is wrong, in bounded time and memory."""

import collections
import contextlib
import importlib.util
import json
import os
import re
import resource
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_gguf import SMALL, run_of
from test_huggingface import save
from test_transfer import checkpoint

from flaxlm.errors import CheckpointError, DataError, FlaxLMError
from flaxlm.interop.gguf import export_gguf
from flaxlm.tokenizers import load_tokenizer

CPU_SECONDS, MEMORY = 10.0, 2**30
DEEP: Any = []
for _ in range(400):
  DEEP = [DEEP]
ODD = (
  *(None, True, False, 0, 1, -1, 7, 0.5, -0.0, 1e300, 2**30, 2**31 - 2, 2**63, 9999),
  10**400,
  *(float("nan"), float("inf"), "", "x", "1", "\u0000", "\ud800", "a" * 100_000),
  *([], {}, [0], ["a", "a"], {"a": 1}, [None] * 1000, [[1, 2], [3]], DEEP),
)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
  """A checkpoint of each kind of tokenizer; one of them has an index."""
  root, ids = tmp_path_factory.mktemp("originals"), {"eos_token_id": 1, "bos_token_id": 1}
  variants = {"gpt2": "gpt2", "qwen3_moe": "llama", "bert": "bert", "t5": "t5"}
  folders = [
    checkpoint(root / variant, variant, kind, eos_token="</s>", ids=ids)
    for variant, kind in variants.items()
  ]
  (root / "qwen3_moe" / "model.safetensors").unlink()
  config = (root / "qwen3_moe" / "config.json").read_text()
  save(root / "qwen3_moe", "qwen3_moe", most=20_000)
  (root / "qwen3_moe" / "config.json").write_text(config)
  for folder in folders:
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
  if importlib.util.find_spec("gguf"):
    (root / "gguf").mkdir()
    run = run_of(root, SMALL)
    export_gguf(run, root / "gguf" / "model.gguf", "float32")
    folders += 2 * [root / "gguf"]  # as many damages as to the others
  return folders


# -- Damage --------------------------------------------------------------------------------


def odd_json(value: Any, rng: np.random.Generator) -> Any:
  """`value` with one of its parts replaced, left out, renamed or doubled."""
  if not isinstance(value, dict | list) or not value or rng.random() < 0.1:
    return ODD[rng.integers(len(ODD))]
  if isinstance(value, list):
    at = int(rng.integers(len(value)))
    changed = [odd_json(value[at], rng)], [], [value[at], value[at]]
    return [*value[:at], *changed[rng.choice(3, p=(0.8, 0.1, 0.1))], *value[at + 1 :]]
  names = list(value)
  name = names[rng.integers(len(names))]
  match rng.choice(4, p=(0.7, 0.1, 0.1, 0.1)):
    case 0:
      return value | {name: odd_json(value[name], rng)}
    case 1:
      return {k: v for k, v in value.items() if k != name}
    case 2:
      return {(k + "x" if k == name else k): v for k, v in value.items()}
    case _:
      return value | {names[rng.integers(len(names))]: value[name]}


def odd_bytes(content: bytes, rng: np.random.Generator) -> bytes:
  """`content` cut, with bytes flipped or put in, or something else."""
  at = int(rng.integers(len(content) + 1))
  early = int(rng.integers(min(64, len(content)) + 1))
  match rng.integers(6):
    case 0:
      return content[:at]
    case 1:
      return content[:early] + rng.bytes(3) + content[early + 3 :]
    case 2:
      return content[:at] + rng.bytes(8) + content[at + 8 :]
    case 3:
      return content[:at] + content[early:]
    case 4:
      return b"\xef\xbb\xbf" + content
    case _:
      return (b"", b"null", b"[" * 100_000, b'{"a":' * 50_000, b"PK\x03\x04", b"<html>")[
        rng.integers(6)
      ]


def odd_header(content: bytes, rng: np.random.Generator) -> bytes:
  """A safetensors file whose header says something else of the same data."""
  (length,) = struct.unpack("<Q", content[:8])
  text = json.dumps(odd_json(json.loads(content[8 : 8 + length]), rng)).encode()
  said = len(text) if rng.random() < 0.9 else int(rng.integers(2**63))
  return struct.pack("<Q", said) + text + content[8 + length :]


def odd_gguf(content: bytes, rng: np.random.Generator) -> bytes:
  """A GGUF file of which a number or a few characters in its header are others."""
  header = content.index(b"token_embd.weight")
  names = [*re.finditer(rb"[a-z0-9]+\.[a-z0-9_.]+", content[: 4 * header])]
  at = int(rng.integers(4, 24))  # the counts
  if rng.random() < 0.8:  # what comes after a name: a type and a value, or dims and a type
    at = int(names[rng.integers(len(names))].end() + rng.choice((0, 4, 8, 12, 20, 24)))
  numbers = (0, 1, 2, 3, 8, 9, 12, 31, 33, 99, 2**16, 2**31 - 1, 2**32 - 1)
  odd = struct.pack("<I", numbers[rng.integers(len(numbers))])
  odd = (odd, odd + odd, rng.bytes(4), struct.pack("<Q", 2**62))[rng.integers(4)]
  return content[:at] + odd + content[at + len(odd) :]


def damage(folder: Path, rng: np.random.Generator) -> None:
  """One damage to one file."""
  files = sorted(path for path in folder.iterdir() if path.is_file())
  if not files:  # the only one was damaged away
    return
  path = files[rng.integers(len(files))]
  content = path.read_bytes()
  if rng.random() < 0.1:
    path.unlink()
    match rng.integers(4):
      case 0:
        path.mkdir()
      case 1:
        os.mkfifo(path)
      case 2:
        path.symlink_to(("nowhere", "/etc/passwd", path.name, ".")[rng.integers(4)])
  elif rng.random() < 0.25:
    path.write_bytes(odd_bytes(content, rng))
  else:
    with contextlib.suppress(
      ValueError, RecursionError, struct.error
    ):  # it was damaged before
      if path.suffix == ".safetensors":
        path.write_bytes(odd_header(content, rng))
      elif path.suffix == ".gguf":
        path.write_bytes(odd_gguf(content, rng))
      else:
        path.write_text(json.dumps(odd_json(json.loads(content), rng)))


# -- What becomes of it --------------------------------------------------------------------


@contextlib.contextmanager
def limited() -> Iterator[None]:
  """Fails when the body takes more processor time than any import may."""

  def late(*_: Any) -> None:
    raise AssertionError(f"more than {CPU_SECONDS} s")

  before = signal.signal(signal.SIGPROF, late)
  signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, before)


def outcome(flaxlm: Callable, originals: list[Path], number: int, root: Path) -> int:
  """The exit code of the import of damaged checkpoint `number`."""
  rng = np.random.default_rng(number)
  folder, run = root / f"hub-{number}", root / f"run-{number}"
  shutil.copytree(originals[rng.integers(len(originals))], folder)
  for _ in range(rng.choice((1, 1, 1, 2, 3))):
    damage(folder, rng)
  with limited():
    done = flaxlm("import", folder, run)
    if done.returncode == 0 and (run / "tokenizer.json").exists():
      with contextlib.suppress(FlaxLMError):
        tokenizer = load_tokenizer(run / "tokenizer.json")
        tokenizer.decode(tokenizer.framed(tokenizer.encode("the cat"), "text"))
        tokenizer.token_bytes()
  said = f"checkpoint {number}: {done.stderr}"
  assert done.returncode in (0, DataError.exit_code, CheckpointError.exit_code), said
  assert "Traceback" not in done.stderr and "Errno" not in done.stderr, said
  if done.returncode:
    assert done.stderr.startswith("flaxlm: ") and len(done.stderr.splitlines()) <= 2, said
    assert len(done.stderr) < 2000 and not run.exists(), said[:3000]
  shutil.rmtree(folder)
  shutil.rmtree(run, ignore_errors=True)
  return done.returncode


@pytest.mark.parametrize("number", range(12))
def test_a_damaged_checkpoint_is_imported_or_refused(
  number: int, in_process: Callable, originals: list[Path], tmp_path: Path
):
  outcome(in_process, originals, number, tmp_path)


@pytest.mark.slow
@pytest.mark.fuzz
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("hundred", range(20))
def test_two_thousand_damaged_checkpoints_are_imported_or_refused(
  hundred: int, in_process: Callable, originals: list[Path], tmp_path: Path
):
  peak = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  outcome(in_process, originals, 100 * hundred, tmp_path)
  before = peak()
  codes = collections.Counter(
    outcome(in_process, originals, number, tmp_path)
    for number in range(100 * hundred, 100 * hundred + 100)
  )
  assert peak() - before < MEMORY
  assert codes[CheckpointError.exit_code] > 20 and codes[0] > 5, codes
