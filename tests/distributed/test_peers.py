# SPDX-License-Identifier: Apache-2.0
"""The processes of a running job: they agree, stop together, and end together.

The tests that kill processes start real ones, without JAX (a tenth of a second each).
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from flaxlm.distributed.launcher import Forwarded, first_to_fail
from flaxlm.distributed.lines import Line
from flaxlm.distributed.peers import Alone, Peers
from flaxlm.distributed.rendezvous import Card, Meeting
from flaxlm.errors import ConfigError


@contextlib.contextmanager
def peers_on_threads(count):
  """So many peers in this process, each for a thread of its own."""
  cards = {n: Card(n, "host", n) for n in range(count)}
  pairs = {n: socket.socketpair() for n in range(1, count)}
  host = Meeting({n: Line(pair[0]) for n, pair in pairs.items()}, cards, "", "")
  guests = [Meeting({0: Line(pair[1])}, cards, "", "") for pair in pairs.values()]
  peers = [Peers(n, meeting, 60.0) for n, meeting in enumerate([host, *guests])]
  try:
    yield peers
  finally:
    for one in peers:
      one.leave()
    for one in peers:
      one._thread.join(timeout=5)
      assert not one._thread.is_alive()
    for pair in pairs.values():
      for sock in pair:
        sock.close()


def on_threads(peers, function):
  """What `function(peer)` returns for each, all at the same time."""
  results = [None] * len(peers)

  def run(one):
    results[one.process] = function(one)

  threads = [threading.Thread(target=run, args=[one]) for one in peers]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(timeout=20)
    assert not thread.is_alive()
  return results


def test_process_0_decides():
  with peers_on_threads(3) as peers:
    answers = on_threads(
      peers, lambda one: [one.decide(lambda n=n: [one.process, n]) for n in range(5)]
    )
  assert answers == [[[0, n] for n in range(5)]] * 3


def test_who_does_not_agree_is_named():
  def ask(one):
    one.agree("the text", "same")
    with pytest.raises(ConfigError, match=r"the text is not the same .* process 2 \(host"):
      one.agree("the text", "other" if one.process == 2 else "same")
    one.agree("the end")
    return True

  with peers_on_threads(4) as peers:
    assert on_threads(peers, ask) == [True] * 4


@settings(max_examples=25)
@given(
  first_step=st.sampled_from([0, 40]),
  signals=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 12)), max_size=3),
  pauses=st.lists(st.sampled_from([0.0, 0.001, 0.003]), min_size=3, max_size=3),
)
def test_all_stop_after_the_same_step(first_step, signals, pauses):
  """Whichever process gets the signal, and when: all stop after the same step."""
  num_steps = first_step + 10

  def train(one):
    step = first_step
    while step < num_steps:
      told = any(who == one.process and at + first_step <= step for who, at in signals)
      stopped = one.stop_at(step, signal.SIGTERM if told else 0)
      if stopped:
        return step, stopped
      step += 1
      time.sleep(pauses[one.process])
    return step, 0

  with peers_on_threads(3) as peers:
    ends = on_threads(peers, train)
  assert len(set(ends)) == 1
  step, stopped = ends[0]
  if stopped:
    assert step >= first_step + min(at for _, at in signals)
  else:
    assert step == num_steps


def test_alone_there_is_nobody_to_ask():
  alone = Alone()
  assert alone.decide(lambda: 3) == 3
  assert alone.stop_at(5, 0) == 0
  assert alone.stop_at(5, signal.SIGTERM) == signal.SIGTERM
  alone.agree("anything")


# -- Real processes, under the launcher ----------------------------------------------------

CHILD = """
import os, signal, sys, time
from flaxlm.distributed.detect import detect
from flaxlm.distributed.peers import Peers
from flaxlm.distributed.rendezvous import meet
from flaxlm.errors import DataError
job = detect(os.environ)
meeting = meet(job, {}, 20, token=os.environ["FLAXLM_JOB_TOKEN"])
peers = Peers(job.process, meeting, HEARTBEAT)
me, stopped = job.process, []
def body():
  BODY
try:
  code = body() or 0
  peers.agree("the end")
  peers.leave()
  sys.exit(code)
except DataError as e:
  peers.leave(e)
  sys.exit(e.exit_code)
"""

LAUNCH = """
import sys
from flaxlm.distributed.launcher import launch
sys.exit(launch([sys.executable, "-c", sys.argv[1]], int(sys.argv[2]), 1.0))
"""


def start(body: str, num_processes: int, heartbeat: float = 30.0) -> subprocess.Popen:
  lines = body.strip().splitlines()
  child = CHILD.replace("BODY", "\n  ".join(lines)).replace("HEARTBEAT", str(heartbeat))
  return subprocess.Popen(
    [sys.executable, "-c", LAUNCH, child, str(num_processes)],
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def launch(body: str, num_processes: int, heartbeat: float = 30.0):
  """(exit code, stdout, stderr) of a job whose processes run `body`."""
  with start(body, num_processes, heartbeat) as job:
    out, err = job.communicate(timeout=60)
  return job.returncode, out, err


def test_logs_have_prefixes_and_results_do_not_mix():
  code, out, err = launch(
    """
print("result", me)
print("log", me, file=sys.stderr)
sys.stderr.write("no end of line")
""",
    3,
  )
  assert code == 0, err
  assert sorted(out.splitlines()) == ["[1] result 1", "[2] result 2", "result 0"]
  assert sorted(err.splitlines()) == sorted(
    line for n in range(3) for line in (f"[{n}] log {n}", f"[{n}] no end of line")
  )


@pytest.mark.parametrize("victim", [0, 1])
def test_one_is_killed_and_all_end(victim):
  """Long before the heartbeat: the kernel tells at once."""
  code, _, err = launch(
    f"""
peers.agree("all there")
if me == {victim}:
  os.kill(os.getpid(), signal.SIGKILL)
time.sleep(25)
""",
    3,
  )
  assert code == 128 + signal.SIGKILL
  lost = f"lost process {victim} ("
  assert {line[:4] for line in err.splitlines() if lost in line or " is gone" in line} >= {
    f"[{1 - victim}] "
  }
  last = err.splitlines()[-1]
  assert last == (
    f"flaxlm launch: process {victim} died of SIGKILL (exit code 137); ending the others"
  )


def test_an_error_is_told_to_the_others_and_decides_the_exit_code():
  code, _, err = launch(
    """
peers.agree("all there")
if me == 1:
  raise DataError("no text here", "write some")
time.sleep(25)
""",
    3,
  )
  assert code == 3
  told = re.findall(
    r"\[(\d)\] flaxlm: process 1 \(.*\) ended with exit code 3: no text", err
  )
  assert sorted(told) == ["0", "2"]
  assert "process 1 ended with exit code 3; ending the others" in err


def test_a_silent_process_is_lost_after_the_heartbeat():
  code, _, err = launch(
    """
peers.agree("all there")
if me == 1:
  os.kill(os.getpid(), signal.SIGSTOP)
time.sleep(25)
""",
    2,
    heartbeat=1.0,
  )
  assert code == 7
  assert re.search(r"\[0\] flaxlm: lost process 1 \(.*\): silent for 1 s", err)


def test_signals_reach_every_process_once():
  body = """
signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
peers.agree("all there")
print("ready", flush=True)
while not stopped:
  time.sleep(0.01)
time.sleep(0.2)
assert len(stopped) == 1
return 75
"""
  with start(body, 2) as job:
    assert job.stdout is not None
    for _ in range(2):
      assert "ready" in job.stdout.readline()
    job.send_signal(signal.SIGTERM)
    _, err = job.communicate(timeout=60)
  assert job.returncode == 75, err


def test_who_ignores_sigterm_is_killed():
  code, _, err = launch(
    """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
peers._lost = lambda *_: None  # a process so stuck that it does not notice
peers.agree("all there")
if me == 0:
  os._exit(9)
time.sleep(25)
""",
    2,
  )
  assert code == 9
  assert "process 0 ended with exit code 9" in err


def test_the_launcher_dies_and_its_processes_end():
  with start("print(os.getpid(), flush=True)\ntime.sleep(25)", 2) as job:
    assert job.stdout is not None
    children = [int(job.stdout.readline().split()[-1]) for _ in range(2)]
    job.kill()
  deadline = time.monotonic() + 10
  while any(map(is_alive, children)) and time.monotonic() < deadline:
    time.sleep(0.05)
  assert not any(map(is_alive, children))


def is_alive(pid: int) -> bool:
  try:
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
  except OSError:
    return False


def test_the_first_to_fail_is_the_one_that_explains_the_others():
  assert first_to_fail([7, 7, -9]) == 2
  assert first_to_fail([7, 3, 7]) == 1
  assert first_to_fail([0, 7, None]) == 1
  assert first_to_fail([-6, 7, 7]) == 0
  assert first_to_fail([-6, 7, 1]) == 2
  assert first_to_fail([-6, -9, 7]) == 1


@pytest.mark.parametrize("victim", [0, 1])
def test_an_abort_is_reported_as_its_own(victim):
  code, _, err = launch(
    f"""
peers.agree("all there")
if me == {victim}:
  os.abort()
time.sleep(25)
""",
    2,
  )
  assert code == 128 + signal.SIGABRT
  assert f"process {victim} died of SIGABRT (exit code 134)" in err.splitlines()[-1]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_before_a_process_handles_it_ends_it_as_asked(number, code):
  """Python takes a moment to start; one that has begun loses its peer."""
  body = f"""
signal.signal({int(number)}, signal.SIG_DFL if me else signal.SIG_IGN)
peers.agree("all there")
if me == 0:
  os.kill(os.getppid(), {int(number)})
time.sleep(25)
"""
  ended, _, err = launch(body, 2)
  assert ended == code, err
  assert "Traceback" not in err and "launch: process" not in err


def test_a_signal_reaches_those_that_start_after_it():
  class Child:
    def __init__(self, pid: int):
      self.pid, self.got = pid, []

    def poll(self) -> None:
      return None

    def send_signal(self, number: int) -> None:
      self.got.append(number)

  children = [Child(1)]
  forwarded = Forwarded(children)
  forwarded(signal.SIGTERM, None)
  children += [Child(2), Child(3)]
  forwarded.catch_up()
  assert [child.got for child in children] == [[signal.SIGTERM]] * 3
  forwarded(signal.SIGTERM, None)
  assert [len(child.got) for child in children] == [2] * 3, "a second one, to all"
