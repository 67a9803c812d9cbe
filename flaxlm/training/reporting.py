# SPDX-License-Identifier: Apache-2.0
"""What a run reports: a progress bar or lines, metrics.jsonl, TensorBoard, log.txt."""

import contextlib
import hashlib
import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from flaxlm.checkpoint.manifest import Entry, read_entries, write_entries
from flaxlm.runs import LOG, METRICS


class Reporter:
  """Reports on a run. Only process 0 (`writes`) writes anything."""

  def __init__(self, run_dir: Path, first_step: int, num_steps: int, writes: bool):
    """`runs.new_files` has put the metrics up to `first_step` there, and a manifest."""
    self.num_steps, self.writes = num_steps, writes
    self.console = Console(stderr=True, highlight=False)
    self._stack = contextlib.ExitStack()
    self._bar: Progress | None = None
    if not writes:
      return
    self._run_dir, self._entries = run_dir, read_entries(run_dir)
    written = (run_dir / METRICS).read_bytes()
    self._size, self._sha256 = len(written), hashlib.sha256(written)
    open_text = lambda name: (run_dir / name).open("a", encoding="utf-8")
    self._metrics = self._stack.enter_context(open_text(METRICS))
    self._log = self._stack.enter_context(open_text(LOG))
    self._events = import_tensorboard().SummaryWriter(
      str(run_dir), purge_step=first_step + 1 if first_step else None
    )
    self._stack.callback(self._events.close)
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

  def log(self, text: str) -> None:
    """Prints a line, and appends it to log.txt."""
    if self.writes:
      self.console.print(text, markup=False, soft_wrap=True)
      self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
      self._log.flush()

  def metrics(self, step: int, values: dict[str, float]) -> None:
    """Writes a line of metrics.jsonl and a TensorBoard point of each value, and shows the
    progress."""
    if not self.writes:
      return
    line = json.dumps({"step": step, **values}) + "\n"
    self._metrics.write(line)
    self._metrics.flush()
    self._size += len(line)  # json.dumps gives ASCII
    self._sha256.update(line.encode())
    for name, value in values.items():
      self._events.add_scalar(name, value, step)
    if "train/loss" in values:
      self._progress(step, values)

  def vouch(self) -> None:
    """Writes into the run's manifest what the metrics are now."""
    if self.writes:
      self._entries[METRICS] = Entry(self._size, self._sha256.hexdigest())
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
    text, rate = f"loss {values['train/loss']:.3f}", values.get("perf/tokens_per_sec")
    if rate:
      text += f"  {rate:,.0f} tokens/s"
    if self._bar is not None:
      self._bar.update(self._task, completed=step, description=text)
      return
    if rate:
      seconds = (self.num_steps - step) * values["train/tokens"] / rate
      text += f"  {seconds // 60:.0f}:{seconds % 60:02.0f} left"
    self.log(f"step {step:>6}/{self.num_steps}  {text}")

  def close(self) -> None:
    self._stack.close()


def import_tensorboard() -> ModuleType:
  """tensorboardX without PyTorch, which it would import if installed, for 1.4 s."""
  hidden: Any = None
  absent = "torch" not in sys.modules
  if absent:
    sys.modules["torch"] = hidden
  try:
    import tensorboardX
  finally:
    if absent:
      del sys.modules["torch"]
  return tensorboardX
