# SPDX-License-Identifier: Apache-2.0
"""The directory of a run that trains: where the run starts from, and what is written there
before its first step."""

import contextlib
import dataclasses
import secrets
import time
from pathlib import Path
from typing import NamedTuple

from flaxlm.chat.templates import CHAT
from flaxlm.checkpoint.manifest import write_atomically
from flaxlm.config import Config, ResolvedConfig, TokenizerConfig, to_json
from flaxlm.data.prepare import Prepared
from flaxlm.data.questions import Questions
from flaxlm.data.sources import to_stderr
from flaxlm.distributed.peers import Alone
from flaxlm.errors import writing
from flaxlm.origin import Origin, find_origin, forget, read_origin, write_origin
from flaxlm.runs import (
  CHECKPOINTS,
  CONFIG,
  METRICS,
  SAMPLES,
  TOKENIZER,
  check_is_ours,
  check_unchanged,
  files_damage,
  find_resume_step,
  lines_until,
  load_config_of,
  make_room_after,
  new_files,
)
from flaxlm.tokenizers.imported import SPECIALS

# Process 0 writes this file, and the others look for it (`check_shared`): a network file
# system shows it within seconds.
MARK, MARK_SECONDS = ".job", 30.0


class Start(NamedTuple):
  """Where a run starts from: its own checkpoint, another run, or random parameters."""

  step: int  # of its own checkpoint; 0 for a run that begins
  before: ResolvedConfig | None  # the config with which it trained so far
  origin: Origin | None  # the run that it begins from

  @property
  def is_random(self) -> bool:
    return not self.step and self.origin is None


def find_start(cfg: Config, peers: Alone) -> Start:
  """Where the run of a locked directory starts from; makes room for a run that begins.

  Raises `CheckpointError` for a directory that not all processes see, for one that holds
  the checkpoint of others, and where the run to begin from has none.
  """
  check_shared(cfg.run_dir, peers)
  step = peers.decide(lambda: find_resume_step(cfg, to_stderr))
  if step:
    for problem in files_damage(cfg.run_dir):
      to_stderr(f"{cfg.run_dir}: {problem}")
    return Start(step, load_config_of(cfg.run_dir), None)
  peers.decide(lambda: check_is_ours(cfg.run_dir))
  origin = None
  if cfg.init is not None:
    origin = find_origin(cfg)
    peers.agree(f"the checkpoint of {origin.path}", origin.digest)
  peers.decide(lambda: make_room_after(cfg.run_dir / CHECKPOINTS, 0))
  peers.decide(lambda: forget(cfg.run_dir))
  return Start(0, None, origin)


def write_files(cfg: ResolvedConfig, prepared: Prepared | Questions, start: Start) -> None:
  """Writes what the directory holds besides checkpoints: config, tokenizer, chat template,
  origin, and the metrics and samples up to the step that the run starts from."""
  until = lambda name: lines_until(cfg.run_dir / name, start.step) if start.step else b""
  kept_metrics, kept_samples = until(METRICS), until(SAMPLES)
  with new_files(cfg.run_dir) as folder:
    (folder / CONFIG).write_text(to_json(cfg), "utf-8")
    (folder / METRICS).write_bytes(kept_metrics)
    prepared.tokenizer.save(folder / TOKENIZER)
    if prepared.chat is not None:
      (folder / CHAT).write_text(prepared.chat.to_json(), "utf-8")
    if start.origin is not None:
      write_origin(folder, start.origin)
  if kept_samples:
    with writing(cfg.run_dir):
      write_atomically(cfg.run_dir / SAMPLES, kept_samples.decode())
  else:
    (cfg.run_dir / SAMPLES).unlink(missing_ok=True)


def tokenizer_to_use(cfg: Config, origin: Origin | None) -> TokenizerConfig:
  """The tokenizer of the run that this one begins from, or began from; else that of `cfg`.

  Raises `CheckpointError` if it is not as it was written.
  """
  if origin is None and read_origin(cfg.run_dir) is None:
    return cfg.tokenizer
  folder = cfg.run_dir if origin is None else origin.path
  check_unchanged(folder, TOKENIZER, SPECIALS)
  return dataclasses.replace(cfg.tokenizer, path=str(folder / TOKENIZER))


def check_shared(run_dir: Path, peers: Alone) -> None:
  """Refuses to train into a directory that not all processes see."""
  if peers.num_processes == 1:
    return

  def leave_mark() -> str:
    mark = secrets.token_hex(8)
    with writing(run_dir / MARK):
      write_atomically(run_dir / MARK, mark)
    return mark

  mark = peers.decide(leave_mark)
  seen, deadline = "", time.monotonic() + MARK_SECONDS
  while seen != mark and time.monotonic() < deadline:
    with contextlib.suppress(OSError):
      seen = (run_dir / MARK).read_text("utf-8")
    time.sleep(0.0 if seen == mark else 0.2)
  peers.agree(f"what is in {run_dir}", seen)
