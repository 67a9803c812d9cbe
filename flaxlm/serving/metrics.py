# SPDX-License-Identifier: Apache-2.0
"""What a server has done, as Prometheus reads it.

The format is text, a line for each number:
prometheus.io/docs/instrumenting/exposition_formats.
"""

import bisect
import collections
from collections.abc import Iterator, Sequence

from flaxlm.decoding.compile_counter import CompileCounter
from flaxlm.serving.limits import Limits
from flaxlm.serving.worker import Load

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Histogram:
  """Counts of values up to each of some bounds."""

  def __init__(self, bounds: Sequence[float] = SECONDS):
    self.bounds, self.sum = bounds, 0.0
    self.counts = [0] * (len(bounds) + 1)

  def add(self, value: float) -> None:
    self.counts[bisect.bisect_left(self.bounds, value)] += 1
    self.sum += value

  def lines(self, name: str) -> Iterator[str]:
    so_far = 0
    for bound, count in zip([*map(str, self.bounds), "+Inf"], self.counts, strict=True):
      so_far += count
      yield f'{name}_bucket{{le="{bound}"}} {so_far}'
    yield f"{name}_sum {self.sum:.6f}"
    yield f"{name}_count {so_far}"


class Metrics:
  """Counts of one server. Labels are paths that it has and statuses: there are few."""

  def __init__(self) -> None:
    self.requests: collections.Counter[tuple[str, int]] = collections.Counter()
    self.first_token, self.seconds = Histogram(), Histogram()
    self.num_left = 0  # requests whose clients went away

  def text(
    self, load: Load, limits: Limits, num_open: int, compiled: CompileCounter
  ) -> str:
    counters, lines = load.counters, list[str]()
    for name, kind, help_text, value in (
      ("requests_open", "gauge", "Answers that are written or wait", num_open),
      ("requests_waiting", "gauge", "Answers that wait for a row", load.num_waiting),
      ("rows_active", "gauge", "Rows that write", load.num_active),
      ("rows", "gauge", "Rows that there are", limits.slots),
      ("prompt_tokens_total", "counter", "Prompt tokens read", counters.read_tokens),
      (
        *("prompt_tokens_cached_total", "counter", "Prompt tokens that were read before"),
        counters.cached_tokens,
      ),
      ("generated_tokens_total", "counter", "Tokens written", counters.drawn_tokens),
      ("decode_blocks_total", "counter", "Blocks of decode steps", counters.blocks),
      ("compiled_programs_total", "counter", "Programs compiled", compiled.programs),
      ("clients_left_total", "counter", "Clients that went away", self.num_left),
    ):
      lines += [*head(name, kind, help_text), f"flaxlm_{name} {value}"]
    lines += head("http_requests_total", "counter", "Requests by path and status")
    for (path, status), count in sorted(self.requests.items()):
      labels = f'path="{path}",status="{status}"'
      lines.append(f"flaxlm_http_requests_total{{{labels}}} {count}")
    for name, text, histogram in (
      ("time_to_first_token_seconds", "From request to first token", self.first_token),
      ("request_seconds", "From request to the end of its answers", self.seconds),
    ):
      lines += [*head(name, "histogram", text), *histogram.lines(f"flaxlm_{name}")]
    return "\n".join(lines) + "\n"


def head(name: str, kind: str, help_text: str) -> Iterator[str]:
  yield f"# HELP flaxlm_{name} {help_text}."
  yield f"# TYPE flaxlm_{name} {kind}"
