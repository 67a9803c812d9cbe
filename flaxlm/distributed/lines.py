# SPDX-License-Identifier: Apache-2.0
"""JSON objects over a socket, one per line: no pickle, and a limit on the length."""

import json
import socket
from typing import Any

MOST_BYTES = 64 * 1024  # of a line; a whole config needs a tenth of it


class Garbage(Exception):
  """The other side does not speak our protocol: too long, not JSON, or not an object."""


class Line:
  """A connection; the kernel closes it when the other process ends, however it ends."""

  def __init__(self, sock: socket.socket):
    self.socket = sock
    self._rest = b""

  def send(self, message: dict[str, Any]) -> None:
    """Raises `OSError` when the other side is gone."""
    self.socket.sendall(json.dumps(message).encode() + b"\n")

  def receive(self) -> list[dict[str, Any]] | None:
    """The messages that one read completes, possibly none; None if it is closed.

    Raises `Garbage`, and `TimeoutError` if the socket has a timeout.
    """
    try:
      data = self.socket.recv(MOST_BYTES)
    except BlockingIOError:
      return []
    except ConnectionError:
      return None
    if not data:
      return None
    *lines, self._rest = (self._rest + data).split(b"\n")
    if max(map(len, [*lines, self._rest])) > MOST_BYTES:
      raise Garbage(f"a line of more than {MOST_BYTES} bytes")
    return [_parse(line) for line in lines]

  def close(self) -> None:
    self.socket.close()


def _parse(line: bytes) -> dict[str, Any]:
  try:
    message = json.loads(line)
  except (ValueError, RecursionError) as e:
    raise Garbage(str(e)) from e
  if not isinstance(message, dict):
    raise Garbage("not an object")
  return message
