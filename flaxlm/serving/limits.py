# SPDX-License-Identifier: Apache-2.0
"""What a server takes from its clients, and no more."""

import dataclasses

MOST_TOP = 20  # likeliest tokens of each step
MOST_STOPS = 64  # stop strings
MOST_STOP_LENGTH = 1024  # characters
MOST_BIASES = 1024  # tokens with a bias
MOST_TEXTS = 2048  # of one request for embeddings
HEAD_SECONDS = 30.0  # to send what comes before a body, once connected
BODY_SECONDS = 30.0  # to send a body
MOST_CONNECTIONS = 900  # a process may open 1024 files, by default
KEEP_ALIVE_SECONDS = 60
PREPARING_THREADS = 4
FORM_THREADS = 2  # each waits for a process, for seconds at most


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
  """Bounds of what is asked, with defaults for one machine."""

  slots: int = 16  # answers that are written together
  max_queue: int = 64  # answers that may wait besides
  max_tokens: int = 4096  # new tokens of an answer
  max_body: int = 4 * 2**20  # bytes
  time_limit: float = 600.0  # seconds of a request
  cache_bytes: int | None = None  # of the batch's keys and values; None: a share of memory
  prefix_bytes: int = 2**28  # of what past texts begin with
  grace: float = 30.0  # seconds for running requests, after SIGTERM

  @property
  def most_open(self) -> int:
    """Answers that are written or wait."""
    return self.slots + self.max_queue
