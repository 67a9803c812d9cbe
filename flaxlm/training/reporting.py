# SPDX-License-Identifier: Apache-2.0
"""What a run reports: a progress bar or lines, metrics.jsonl, TensorBoard, log.txt, and a
tracker if one is asked for."""

import contextlib
import hashlib
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from flaxlm.checkpoint.manifest import Entry, read_entries, write_entries
from flaxlm.errors import writing
from flaxlm.runs import LOG, METRICS, SAMPLES
from flaxlm.strict_json import to_json
from flaxlm.training.clock import MFU
from flaxlm.training.events import EventFile
from flaxlm.training.tracking import Tracker


class Reporter:
  """Reports on a run. Only process 0 (`writes`) writes anything."""

  def __init__(self, run_dir: Path, first_step: int, num_steps: int, writes: bool):
    """`runs.new_files` has put the metrics up to `first_step` there, and a manifest."""
    self.num_steps, self.writes = num_steps, writes
    self.console = Console(stderr=True, highlight=False)
    self.tracker: Tracker | None = None
    self.exit_code = 1  # that the run ends with, as long as nothing says otherwise
    self._stack = contextlib.ExitStack()
    self._bar: Progress | None = None
    self._is_mute = False
    if not writes:
      return
    self._run_dir = run_dir
    with self._writing():
      self._open(first_step)
    if self.console.is_terminal:
      self._bar = self._stack.enter_context(
        Progress(
          TextColumn("step {task.completed}/{task.total}"),
          BarColumn(),
          TextColumn("{task.description}"),
          TimeRemainingColumn(),
          console=self.console,
        )
      )
      self._task = self._bar.add_task("", total=num_steps, completed=first_step)

  def _open(self, first_step: int) -> None:
    run_dir = self._run_dir
    self._entries = read_entries(run_dir)
    written = (run_dir / METRICS).read_bytes()
    self._size, self._sha256 = len(written), hashlib.sha256(written)
    open_text = lambda name: (run_dir / name).open("a", encoding="utf-8")
    self._metrics = self._stack.enter_context(open_text(METRICS))
    self._log = self._stack.enter_context(open_text(LOG))
    self._events = EventFile(run_dir, first_step)
    self._stack.callback(self._events.close)

  def _writing(self) -> contextlib.AbstractContextManager[None]:
    """Whoever writes learns that the disk is full: nothing waits or is left out."""
    return writing(self._run_dir, "free some space; the same command then resumes the run")

  def log(self, text: str) -> None:
    """Prints a line, and appends it to log.txt."""
    if not self.writes:
      return
    self._show(text)
    with self._writing():
      self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
      self._log.flush()

  def _show(self, text: str) -> None:
    """Prints a line on stderr, as long as that takes it: a reader that has ended, or a full
    disk behind it, ends no training, and the log has every line."""
    if self._is_mute:
      return
    try:
      if self._bar is not None:
        self.console.print(text, markup=False, soft_wrap=True)
      else:
        print(text, file=sys.stderr, flush=True)  # rich would exit where nobody reads
    except OSError:
      self._is_mute = True

  def metrics(self, step: int, values: dict[str, float]) -> None:
    """Writes a line of metrics.jsonl and a TensorBoard point of each value, sends all to
    the tracker, and shows the progress."""
    if not self.writes:
      return
    line = to_json({"step": step, **values}) + "\n"
    with self._writing():
      self._metrics.write(line)
      self._metrics.flush()
      self._events.add(step, values)
    self._size += len(line)  # JSON is written in ASCII
    self._sha256.update(line.encode())
    if self.tracker is not None:
      self.tracker.log(step, values)
    if "train/loss" in values:
      self._progress(step, values)

  def sample(self, step: int, text: str) -> None:
    """Writes what the model wrote after a step as a line of samples.jsonl."""
    if self.writes:
      with self._writing(), (self._run_dir / SAMPLES).open("a", encoding="utf-8") as file:
        file.write(to_json({"step": step, "sample": text}) + "\n")

  def vouch(self) -> None:
    """Writes into the run's manifest what the metrics are now."""
    if self.writes:
      self._entries[METRICS] = Entry(self._size, self._sha256.hexdigest())
      with self._writing():
        write_entries(self._run_dir, self._entries)

  def advance(self, step: int) -> None:
    """Moves the progress bar, if there is one."""
    if self._bar is not None:
      self._bar.update(self._task, completed=step)

  def end_progress(self) -> None:
    """Stops the progress bar, which would otherwise be redrawn into what follows."""
    if self._bar is not None:
      self._bar.stop()
      self._bar = None

  def _progress(self, step: int, values: dict[str, float]) -> None:
    name = "reward" if "train/reward" in values else "loss"
    text, rate = f"{name} {values[f'train/{name}']:.3f}", values.get("perf/tokens_per_sec")
    if rate:
      text += f"  {rate:,.0f} tokens/s"
    if MFU in values:
      text += f"  MFU {values[MFU]:.1%}"
    if self._bar is not None:
      self._bar.update(self._task, completed=step, description=text)
      return
    if rate:
      seconds = (self.num_steps - step) * values["train/tokens"] / rate
      text += f"  {seconds // 60:.0f}:{seconds % 60:02.0f} left"
    self.log(f"step {step:>6}/{self.num_steps}  {text}")

  def close(self) -> None:
    try:
      if self.tracker is not None:
        self.tracker.finish(self.exit_code)
    finally:
      if self.writes:
        with self._writing():  # what could not be written is tried once more
          self._stack.close()
