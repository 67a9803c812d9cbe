# SPDX-License-Identifier: Apache-2.0
"""docs/launch/: the recipes parse, and they run commands that flaxlm has."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from flaxlm.commands.parsing import read_config
from flaxlm.distributed.detect import Job, detect

FOLDER = ROOT / "docs" / "launch"
SCRIPTS = ["slurm.sbatch", "tpu-vm.sh"]
SETS = ["jobset-gpu.yaml", "gke-tpu.yaml"]


def check_command(words: list[str]) -> None:
  assert words[:2] == ["flaxlm", "train"]
  read_config(words[2:])  # refuses what `flaxlm train` would refuse


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_shell(name):
  path = FOLDER / name
  subprocess.run(["bash", "-n", path], check=True)
  assert "set -euo pipefail" in path.read_text()
  if shutil.which("shellcheck"):
    subprocess.run(["shellcheck", path], check=True)


def run_with(stubs: dict[str, str], tmp_path: Path, *command: str) -> tuple[int, str]:
  """(exit code, output) of a script that finds these programs first."""
  for name, body in stubs.items():
    (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
    (tmp_path / name).chmod(0o755)
  environment = os.environ | {
    "PATH": f"{tmp_path}:{os.environ['PATH']}",
    "SLURM_JOB_ID": "7",
  }
  run = subprocess.run(
    ["bash", *command], env=environment, stdout=subprocess.PIPE, text=True, check=False
  )
  return run.returncode, run.stdout


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (75, True), (3, False)])
def test_slurm_runs_the_command_and_requeues_what_can_go_on(tmp_path, status, requeued):
  """srun and scontrol stand for Slurm's, and say what they were asked."""
  stubs = {
    "srun": f'echo "${{#FLAXLM_JOB_TOKEN}} $@"; exit {status}',
    "scontrol": 'echo "scontrol $@"',
  }
  script = str(FOLDER / "slurm.sbatch")
  code, output = run_with(stubs, tmp_path, script, "gpt2_124m", "--mesh=data=-1")
  assert code == status
  first, *rest = output.splitlines()
  length, *words = shlex.split(first)
  assert length == "32", "a token of 16 bytes"
  check_command(words[words.index("flaxlm") :])
  assert rest == (["scontrol requeue 7"] if requeued else [])


def test_every_tpu_vm_runs_the_command(tmp_path):
  """gcloud stands for Google's, and says what it was asked to run."""
  stubs = {"gcloud": 'for last in "$@"; do :; done; echo "$last"'}
  script = str(FOLDER / "tpu-vm.sh")
  arguments = ["slice", "zone", "/mnt/x y", "gpt2_124m", "--name=it's mine"]
  code, output = run_with(stubs, tmp_path, script, *arguments)
  assert code == 0
  command = output.strip().removeprefix("--command=")
  assert "it's mine" in shlex.split(command)[-2], "quoted for the other shell"
  words = shlex.split(command)
  check_command(words[words.index("flaxlm") :])
  assert read_config(words[words.index("flaxlm") + 2 :]).runs_dir == "/mnt/x y/runs"
  code, _ = run_with(stubs, tmp_path, script, "slice")
  assert code == 2


@pytest.mark.parametrize("name", SETS)
def test_job_sets_run_a_command_that_is_one(name):
  job = yaml.safe_load((FOLDER / name).read_text())
  assert (job["apiVersion"], job["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
  (replicated,) = job["spec"]["replicatedJobs"]
  spec = replicated["template"]["spec"]
  assert spec["completionMode"] == "Indexed"
  assert spec["completions"] == spec["parallelism"]
  assert spec["template"]["spec"]["restartPolicy"] == "Never", "podFailurePolicy needs it"
  (container,) = spec["template"]["spec"]["containers"]
  check_command(container["command"])
  assert (
    spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"]
    == (container["name"])
  )


def test_every_pod_of_the_gpu_recipe_finds_its_job():
  """With the variables that the recipe sets, pod 1 is process 1 of the pods."""
  job = yaml.safe_load((FOLDER / "jobset-gpu.yaml").read_text())
  (replicated,) = job["spec"]["replicatedJobs"]
  spec = replicated["template"]["spec"]
  (container,) = spec["template"]["spec"]["containers"]
  environment = {entry["name"]: entry.get("value", "1") for entry in container["env"]}
  found = detect(environment)
  name = job["metadata"]["name"]
  # JobSet calls a pod SET-REPLICATED_JOB-REPLICA-INDEX, in the subdomain SET.
  host = f"{name}-{replicated['name']}-0-0.{name}"
  assert found == Job(1, spec["completions"], host, 8476, "the environment")


def test_the_tpu_recipe_opens_the_ports_that_are_used():
  job = yaml.safe_load((FOLDER / "gke-tpu.yaml").read_text())
  (replicated,) = job["spec"]["replicatedJobs"]
  spec = replicated["template"]["spec"]
  (container,) = spec["template"]["spec"]["containers"]
  machines, slices = spec["completions"], replicated["replicas"]
  hosts = ",".join(f"host{n}" for n in range(machines))
  environment = {
    "TPU_WORKER_HOSTNAMES": hosts,
    "TPU_WORKER_ID": "1",
    "MEGASCALE_NUM_SLICES": str(slices),
    "MEGASCALE_SLICE_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "host0",
  }
  found = detect(environment)
  assert found is not None
  assert (found.process, found.num_processes) == (machines + 1, machines * slices)
  ports = {entry["containerPort"] for entry in container["ports"]}
  assert {found.port, found.port + 1} <= ports
  chips = container["resources"]["limits"]["google.com/tpu"] * machines * slices
  assert read_config(container["command"][2:]).mesh == {
    "data": slices,
    "fsdp": chips // slices,
  }
