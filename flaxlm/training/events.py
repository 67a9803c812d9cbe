# SPDX-License-Identifier: Apache-2.0
"""TensorBoard's event files, written at once.

tensorboardX's own writer has a thread and a queue of ten values: when the disk is full its
thread ends, the queue fills up, and the next value waits for ever. Its protocol buffers and
its checksum are used, and no thread: who writes learns that it has failed.
"""

import os
import socket
import struct
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class EventFile:
  """A new event file in a folder. Raises `OSError` when it cannot be written."""

  def __init__(self, folder: Path, first_step: int = 0):
    """Points after `first_step`, which other files of the folder may hold, are hidden."""
    self._events, self._summaries, self._checksum = import_tensorboard()
    name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
    self._file = (folder / name).open("ab")
    self._write(file_version="brain.Event:2")
    if first_step:
      start = self._events.SessionLog(status=self._events.SessionLog.START)
      self._write(step=first_step + 1, session_log=start)
    self._file.flush()

  def add(self, step: int, values: Mapping[str, float]) -> None:
    """A point of each value."""
    summary = self._summaries.Summary
    points = [summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
    self._write(step=step, summary=summary(value=points))
    self._file.flush()

  def close(self) -> None:
    self._file.close()

  def _write(self, **fields: Any) -> None:
    """An event, framed as TFRecord frames it: length, data, and checksums of both."""
    data = self._events.Event(wall_time=time.time(), **fields).SerializeToString()
    length = struct.pack("<Q", len(data))
    checksum = lambda part: struct.pack("<I", self._checksum(part))
    self._file.write(length + checksum(length) + data + checksum(data))


def import_tensorboard() -> tuple[Any, Any, Any]:
  """tensorboardX's events, summaries and checksum; without PyTorch, which it would import
  if installed, for 1.4 s."""
  hidden: Any = None
  absent = "torch" not in sys.modules
  if absent:
    sys.modules["torch"] = hidden
  try:
    from tensorboardX.proto import event_pb2, summary_pb2
    from tensorboardX.record_writer import masked_crc32c
  finally:
    if absent:
      del sys.modules["torch"]
  return event_pb2, summary_pb2, masked_crc32c
