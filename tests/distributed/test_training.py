# SPDX-License-Identifier: Apache-2.0
"""Real training by several processes: the same as by one, also when interrupted."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import fuzz, tiny


@pytest.fixture
def arguments(corpus):
  """Arguments of a run of seconds; keywords replace its fields, `__` being a dot."""
  usual = {"data__batch_size": 8, "training__num_steps": 6}
  return lambda **knobs: ["train", *tiny(corpus, **usual | knobs)]


def losses(tmp_path, name, kind="train/loss"):
  lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
  return {m["step"]: m[kind] for m in map(json.loads, lines) if kind in m}


def same_losses(tmp_path, name, expected):
  for kind in ("train/loss", "eval/loss"):
    assert losses(tmp_path, name, kind) == pytest.approx(
      losses(tmp_path, expected, kind), rel=1e-5
    )


@pytest.fixture(autouse=True)
def compiles_quickly(monkeypatch):
  monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")


@pytest.mark.slow
def test_a_job_of_any_size_goes_on(flaxlm, in_process, arguments, tmp_path):
  """What two processes stored is whole, and one, or four, go on from it: the losses of one
  process, and its sample."""
  same = dict(training__eval_every_steps=3)
  one = in_process(*arguments(name="one", **same))
  assert one.returncode == 0, one.stderr
  half = arguments(name="two", training__num_steps=3, simulated_devices=4, **same)
  run = flaxlm("launch", "--processes=2", "--", *half)
  assert run.returncode == 0, run.stderr
  assert in_process("ckpt", "verify", "two").returncode == 0
  for number in (1, 4):
    name = f"to_{number}"
    shutil.copytree(tmp_path / "runs/two", tmp_path / "runs" / name)
    rest = arguments(name=name, simulated_devices=8 // number, **same)
    run = flaxlm("launch", f"--processes={number}", "--", *rest)
    assert run.returncode == 0, run.stderr
    assert f"resuming runs/{name} at step 3" in run.stderr
    assert run.stdout == one.stdout, "process 0's sample, alone on stdout"
    same_losses(tmp_path, name, "one")


@pytest.mark.slow
@pytest.mark.parametrize(
  ("mesh", "num_experts"),
  [
    fuzz("tensor=2,expert=4", 4),
    fuzz("data=2,fsdp=4@dcn", 0),
    fuzz("fsdp=4,tensor=2", 0),
    fuzz("data=2,context=4", 0),
  ],
)
def test_four_processes_on_any_mesh(flaxlm, arguments, tmp_path, mesh, num_experts):
  """Also where an axis that does not cut the batch lies across processes."""
  same = dict(mesh=mesh, model__num_heads=8, model__moe__num_experts=num_experts)
  run = flaxlm(*arguments(name="one", simulated_devices=8, **same))
  assert run.returncode == 0, run.stderr
  run = flaxlm(
    *("launch", "--processes=4", "--"),
    *arguments(name="four", simulated_devices=2, **same),
  )
  assert run.returncode == 0, run.stderr
  same_losses(tmp_path, "four", "one")


@pytest.mark.slow
@pytest.mark.parametrize("everybody", [fuzz(True), False])
def test_sigterm_to_any_stops_all_at_one_step(
  flaxlm, in_process, arguments, tmp_path, everybody
):
  """One process with eight devices then finishes the run, as if it had not been stopped."""
  whole = in_process(*arguments(name="whole", training__num_steps=40))
  assert whole.returncode == 0, whole.stderr
  job = start_job(flaxlm, tmp_path, 2, arguments(name="k", training__num_steps=40))
  wait_for_step(job, 5)
  target = job.pid if everybody else children(job.pid)[1]
  os.kill(target, signal.SIGTERM)
  _, err = job.communicate(timeout=100)
  assert job.returncode == 75, err
  # The step at which all stop may be one that is saved anyway.
  said = ("SIGTERM: saving step", "SIGTERM: stopping after step")
  assert sum(map(err.count, said)) == 1, err
  run = in_process(*arguments(name="k", training__num_steps=40))
  assert run.returncode == 0, run.stderr
  assert "resuming" in run.stderr
  same_losses(tmp_path, "k", "whole")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, fuzz(1), 2])  # 1 and 2 have one part
def test_a_killed_process_ends_the_others(flaxlm, arguments, tmp_path, victim):
  job = start_job(flaxlm, tmp_path, 3, arguments(name="k", data__batch_size=12))
  wait_for_step(job, 2)
  os.kill(children(job.pid)[victim], signal.SIGKILL)
  killed = time.monotonic()
  _, err = job.communicate(timeout=100)
  assert time.monotonic() - killed < 15, "the default heartbeat is 60 s"
  assert job.returncode == 137
  assert f"lost process {victim} (" in err, err
  assert f"process {victim} died of SIGKILL" in err
  assert "Check failure stack trace" not in err


@pytest.mark.slow
def test_a_stuck_process_ends_the_job_with_stacks(flaxlm, arguments, tmp_path):
  knobs = dict(training__hang_seconds=3, training__num_steps=1_000_000)
  job = start_job(flaxlm, tmp_path, 2, arguments(name="k", **knobs))
  wait_for_step(job, 5)
  stuck = children(job.pid)[1]
  os.kill(stuck, signal.SIGSTOP)
  time.sleep(6)
  os.kill(stuck, signal.SIGCONT)
  _, err = job.communicate(timeout=100)
  assert job.returncode == 6, err
  assert "no progress for 3 s" in err
  assert 'training/loop.py", line' in err


@pytest.mark.slow
def test_two_network_namespaces_are_two_hosts(flaxlm, in_process, arguments, tmp_path):
  """Each with an address, a name and hosts of its own, and a cable between them."""
  if (
    os.geteuid()
    or subprocess.run(["ip", "netns", "add", "flaxlm0"], check=False).returncode
  ):
    pytest.skip("network namespaces need root and iproute2")
  try:
    cable = ["flaxlm0 lo", "flaxlm1 lo", "flaxlm0 fl0", "flaxlm1 fl1"]
    host = subprocess.run(["hostname"], capture_output=True, text=True).stdout.strip()
    call("ip netns add flaxlm1")
    call("ip link add fl0 netns flaxlm0 type veth peer name fl1 netns flaxlm1")
    for number in range(2):
      call(f"ip -n flaxlm{number} addr add 10.99.7.{number + 1}/24 dev fl{number}")
      # `ip netns exec` shows a process the files of /etc/netns/NAME in place of /etc's.
      folder = Path(f"/etc/netns/flaxlm{number}")
      folder.mkdir(parents=True, exist_ok=True)
      own = f"10.99.7.{number + 1} {host}"
      (folder / "hosts").write_text(f"127.0.0.1 localhost\n{own}\n10.99.7.1 first\n")
    for item in cable:
      namespace, device = item.split()
      call(f"ip -n {namespace} link set {device} up")
    run = in_process(*arguments(name="one"))
    assert run.returncode == 0, run.stderr
    command = [
      sys.executable,
      "-m",
      "flaxlm.cli",
      *arguments(name="two", simulated_devices=4),
    ]
    job = {"JAX_COORDINATOR_ADDRESS": "first:4321", "JAX_NUM_PROCESSES": "2"}
    processes = [
      subprocess.Popen(
        ["ip", "netns", "exec", f"flaxlm{number}", *command],
        cwd=tmp_path,
        env=os.environ | flaxlm.environment | job | {"JAX_PROCESS_ID": str(number)},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
      )
      for number in range(2)
    ]
    for process in processes:
      _, err = process.communicate(timeout=200)
      assert process.returncode == 0, err
    same_losses(tmp_path, "two", "one")
  finally:
    for number in range(2):
      subprocess.run(["ip", "netns", "del", f"flaxlm{number}"], check=False)


def call(command):
  subprocess.run(command.split(), check=True)


def start_job(flaxlm, tmp_path, num_processes, arguments):
  return subprocess.Popen(
    [
      *(sys.executable, "-m", "flaxlm.cli", "launch", f"--processes={num_processes}"),
      *("--", *arguments),
    ],
    cwd=tmp_path,
    env=os.environ | flaxlm.environment,
    stderr=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )


def wait_for_step(job, step):
  """Reads the log up to a line of this step."""
  seen = []
  for line in job.stderr:
    seen.append(line)
    if line.split()[1:2] == ["step"] and line.split()[2].startswith(f"{step}/"):
      return
  raise AssertionError("".join(seen))


def children(pid):
  path = Path(f"/proc/{pid}/task/{pid}/children")
  return sorted(map(int, path.read_text().split()))
