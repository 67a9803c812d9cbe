# SPDX-License-Identifier: Apache-2.0
"""All processes meet, or all get the same message: which is missing, which differs."""

import concurrent.futures
import socket
import time

import pytest

from flaxlm.distributed.detect import Job, is_loopback
from flaxlm.distributed.lines import MOST_BYTES, Garbage, Line
from flaxlm.distributed.rendezvous import (
  Card,
  Gathering,
  Meeting,
  free_port,
  interface_address,
  listen_address,
  meet,
)
from flaxlm.errors import ConfigError, FlaxLMError, PeerLostError

CLAIMS = {"flaxlm": "0.1.0", "model.width": "16"}


def join(port, number, count, claims=CLAIMS, token="secret", seconds=10.0):
  """What a process gets: a meeting or an error."""
  job = Job(number, count, "127.0.0.1", port, "a test")
  try:
    return meet(job, claims, seconds, token=token, log=lambda line: None)
  except FlaxLMError as e:
    return e


def gather(*processes, seconds=10.0, count=None):
  """What each of `processes` gets, in their order; each is (number, claims, token, count).

  All but the number may be left out.
  """
  port = free_port()

  def one(number, claims=CLAIMS, token="secret", said=None):
    return join(port, number, said or count or len(processes), claims, token, seconds)

  with concurrent.futures.ThreadPoolExecutor(len(processes)) as pool:
    futures = [pool.submit(one, *process) for process in processes]
  return closed([future.result() for future in futures])


def closed(results):
  for result in results:
    if isinstance(result, Meeting):
      for line in result.lines.values():
        line.close()
  return results


def test_all_are_there():
  meetings = gather((2,), (0,), (1,))
  for meeting in meetings:
    assert sorted(meeting.cards) == [0, 1, 2]
    assert all(card.host == socket.gethostname() for card in meeting.cards.values())
    assert meeting.coordinator == meetings[1].coordinator
    assert meeting.coordinator.startswith("127.0.0.1:")
  assert sorted(meetings[1].lines) == [1, 2]
  assert sorted(meetings[0].lines) == [0]


def test_one_is_missing():
  results = gather((0,), (1,), (3,), count=5, seconds=0.5)
  for error in results:
    assert isinstance(error, PeerLostError)
    assert "processes 2, 4 of 5 did not come" in error.cause
  assert len({error.cause for error in results}) == 1, "everybody gets the same line"


def test_process_0_is_missing():
  (error,) = gather((1,), count=2, seconds=0.5)
  assert isinstance(error, PeerLostError)
  assert "process 0 of 2 did not answer at 127.0.0.1:" in error.cause


@pytest.mark.parametrize(
  ("odd", "line"),
  [
    ({"model.width": "32"}, "model.width is 32 on process 2 ("),
    ({"flaxlm": "0.2.0"}, "flaxlm is 0.2.0 on process 2 ("),
    ({"mesh": "data=2"}, "mesh is data=2 on process 2 ("),
  ],
)
def test_one_differs(odd, line):
  results = gather((0,), (1,), (2, CLAIMS | odd), (3,))
  for error in results:
    assert isinstance(error, ConfigError)
    assert line in error.cause
    assert "on processes 0, 1, 3" in error.cause.replace("0-1, 3", "0, 1, 3")


def test_a_wrong_count():
  results = gather((0,), (1, CLAIMS, "secret", 3), count=2)
  for error in results:
    assert isinstance(error, ConfigError)
    assert "number of processes is" in error.cause
    assert "3 on process 1 (" in error.cause


def test_one_number_twice():
  results = gather((0,), (1,), (1,))
  for error in results:
    assert isinstance(error, ConfigError)
    assert error.cause.count("process 1 (") == 2


def test_two_processes_0_on_one_machine():
  results = gather((0,), (0,), count=2, seconds=0.5)
  assert sorted(type(error).__name__ for error in results) == [
    "ConfigError",
    "PeerLostError",
  ]
  assert any("cannot listen at 127.0.0.1:" in error.cause for error in results)


@pytest.mark.parametrize(
  "said",
  [
    b"GET / HTTP/1.1\r\n\r\n",
    b"\xff\x00\n",
    b"[]\n",
    b'{"rendezvous": 1}\n',
    b'{"rendezvous": 1, "token": "guess", "card": [1, "x", 1], "claims": {}}\n',
    b'{"rendezvous": 1, "token": "secret", "card": ["one", 2], "claims": {}}\n',
    b'{"rendezvous": 1, "token": "secret", "card": [1, "x", 1], "claims": 7}\n',
    b"[" * 100_000 + b"\n",
    b"x" * (3 * MOST_BYTES),
    b"",
  ],
)
def test_strangers_are_not_listened_to(said):
  """Their connections are closed without an answer, and the meeting goes on."""
  port = free_port()
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    host = pool.submit(join, port, 0, 2)
    assert speak(port, said) == b""
    results = closed([join(port, 1, 2), host.result()])
  assert all(isinstance(result, Meeting) for result in results)


def speak(port: int, said: bytes) -> bytes:
  """What process 0 answers to a stranger, as soon as it is there."""
  for _ in range(500):
    try:
      with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
        sock.sendall(said)
        if not said:
          sock.shutdown(socket.SHUT_WR)
        return sock.recv(1000)
    except ConnectionRefusedError:
      time.sleep(0.01)
    except ConnectionError:  # hung up on before all was said
      return b""
  raise AssertionError("process 0 never came")


def test_another_jobs_process_is_a_stranger():
  host, guest = gather((0,), (1, CLAIMS, "another"), seconds=0.5)
  assert "process 1 of 2 did not come" in host.cause
  assert "FLAXLM_JOB_TOKEN" in guest.cause


def test_many_differences_are_one_line():
  claims = {
    0: {f"field{n}": "a" for n in range(9)},
    1: {f"field{n}": "b" for n in range(9)},
  }
  cards = {n: Card(n, "host", n) for n in range(2)}
  error = Gathering(Job(0, 2, "h", 1, "test"), "", print, claims, cards).verdict()
  assert error is not None
  assert "6 more" in error.cause
  assert "\n" not in error.cause


def test_a_line_has_an_end():
  ours, theirs = socket.socketpair()
  with ours, theirs:
    line = Line(ours)
    theirs.sendall(b'{"a": 1}\n{"b"')
    assert line.receive() == [{"a": 1}]
    theirs.sendall(b": 2}\n")
    assert line.receive() == [{"b": 2}]
    theirs.setblocking(False)
    with pytest.raises(Garbage):
      for _ in range(100):
        theirs.send(b"x" * 10_000)
        line.receive()


# -- Where process 0 listens ---------------------------------------------------------------


def test_one_host_listens_on_loopback():
  assert listen_address(Job(0, 2, "localhost", 1, "test"), None) == "127.0.0.1"
  assert listen_address(Job(0, 2, "10.0.0.1", 1, "test"), None) == "10.0.0.1"


def test_an_interface_can_be_named():
  assert interface_address("lo") == "127.0.0.1"
  assert interface_address("no-such-one") is None
  assert listen_address(Job(0, 2, "10.0.0.1", 1, "test"), "lo") == "127.0.0.1"
  with pytest.raises(ConfigError, match="FLAXLM_BIND"):
    listen_address(Job(0, 2, "10.0.0.1", 1, "test"), "no such one")


def test_a_cluster_is_not_kept_on_loopback():
  """Debian's /etc/hosts has a machine's own name at 127.0.1.1."""
  name = socket.gethostname()
  address = socket.getaddrinfo(name, None)[0][4][0]
  job = Job(0, 4, name, 1, "Slurm")
  if is_loopback(address):
    with pytest.raises(ConfigError, match="other hosts could not reach it"):
      listen_address(job, None)
  else:
    assert listen_address(job, None) == address


def test_an_address_of_another_machine():
  job = Job(0, 2, "192.0.2.1", free_port(), "test")  # RFC 5737: nobody's
  with pytest.raises(ConfigError, match="another machine's: set FLAXLM_BIND"):
    meet(job, CLAIMS, 1.0)
