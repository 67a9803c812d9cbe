# SPDX-License-Identifier: Apache-2.0
"""What a run reports is on disk at once, or the run learns that it is not."""

import contextlib
import json
import resource
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flaxlm.errors import WriteError
from flaxlm.runs import LOG, METRICS, files_damage, new_files
from flaxlm.training.events import import_tensorboard
from flaxlm.training.reporting import Reporter

VALUES = {"train/loss": 2.5, "train/tokens": 256.0, "perf/tokens_per_sec": 1e3}


@contextlib.contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
  """As a full disk does, it takes a part of what is written."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def reporter(tmp_path: Path) -> Iterator[Reporter]:
  """Of a run that goes on after step 3."""
  with new_files(tmp_path) as folder:
    (folder / METRICS).write_text(json.dumps({"step": 3, "train/loss": 3.0}) + "\n")
  reporter = Reporter(tmp_path, 3, 1_000, writes=True)
  yield reporter
  reporter.close()


def read_events(folder: Path) -> list[Any]:
  """TensorBoard's records, their checksums verified."""
  events, _, checksum = import_tensorboard()
  (path,) = folder.glob("events.out.tfevents.*")
  data, found = path.read_bytes(), []
  while data:
    (size,) = struct.unpack("<Q", data[:8])
    body = data[12 : 12 + size]
    sums = struct.unpack("<II", data[8:12] + data[12 + size : 16 + size])
    assert sums == (checksum(data[:8]), checksum(body))
    found.append(events.Event.FromString(body))
    data = data[16 + size :]
  return found


def test_metrics_are_on_disk_at_once(reporter: Reporter, tmp_path: Path):
  threads = threading.active_count()
  for step in range(4, 40):
    reporter.metrics(step, VALUES)
  reporter.log("a line")
  lines = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
  assert [line["step"] for line in lines] == list(range(3, 40))
  assert lines[-1] == {"step": 39, **VALUES}
  assert (tmp_path / LOG).read_text().endswith(" a line\n")
  version, start, *points = read_events(tmp_path)
  assert version.file_version == "brain.Event:2"
  assert (start.step, start.session_log.status) == (4, start.session_log.START)
  assert [event.step for event in points] == list(range(4, 40))
  shown = {value.tag: value.simple_value for value in points[-1].summary.value}
  assert shown == VALUES
  assert threading.active_count() == threads, "nothing writes behind the run's back"


def test_what_is_not_finite_is_null(reporter: Reporter, tmp_path: Path):
  values = VALUES | {"train/loss": float("nan"), "train/gradient_norm": float("inf")}
  reporter.metrics(4, values)
  line = (tmp_path / METRICS).read_text().splitlines()[-1]
  record = json.loads(line, parse_constant=pytest.fail)
  assert record["train/loss"] is record["train/gradient_norm"] is None
  assert record["train/tokens"] == 256.0


def test_the_manifest_vouches_for_the_metrics(reporter: Reporter, tmp_path: Path):
  reporter.metrics(4, VALUES)
  reporter.vouch()
  assert files_damage(tmp_path) == []
  text = (tmp_path / METRICS).read_text()
  (tmp_path / METRICS).write_text(text.replace("2.5", "2.6"))
  assert files_damage(tmp_path) == [f"{METRICS}: damaged (SHA-256 differs)"]


@pytest.mark.parametrize("what", ["metrics", "log", "manifest"])
def test_a_full_disk_is_told_and_nothing_is_lost(
  reporter: Reporter, tmp_path: Path, what: str
):
  """Training never waits: ten values once filled the queue of a thread that was dead."""
  write = {
    "metrics": lambda step: reporter.metrics(step, VALUES),
    "log": lambda step: reporter.log("a line"),
    "manifest": lambda step: reporter.vouch(),
  }[what]
  size = 100 if what == "manifest" else 2_000
  with no_file_beyond(size), pytest.raises(WriteError) as caught:
    for step in range(4, 200):
      write(step)
  assert caught.value.exit_code == 4
  assert str(tmp_path) in caught.value.cause
  assert "File too large" in caught.value.cause and "Errno" not in caught.value.cause
  assert "resumes" in caught.value.cure
  reporter.close()  # the disk has space again
  lines = (tmp_path / METRICS).read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines][:2] == [3, 4][: len(lines)]
  assert files_damage(tmp_path) == []


def test_a_disk_that_stays_full_is_told_when_the_run_ends(
  reporter: Reporter, tmp_path: Path
):
  with no_file_beyond(2_000):
    with pytest.raises(WriteError):
      for step in range(4, 200):
        reporter.metrics(step, VALUES)
    with pytest.raises(WriteError):
      reporter.close()


def test_a_terminal_that_is_gone_ends_no_training(reporter: Reporter, tmp_path: Path):
  full = Path("/dev/full").open("w")  # noqa: SIM115 - closing it fails
  with contextlib.redirect_stderr(full):
    reporter.log("one")
    reporter.log("two")
  with contextlib.suppress(OSError):
    full.close()
  with (tmp_path / LOG).open() as log:
    assert [line.split()[-1] for line in log] == ["one", "two"]
