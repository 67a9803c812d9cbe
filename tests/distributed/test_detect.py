# SPDX-License-Identifier: Apache-2.0
"""The job that the environment describes, for each supported launcher."""

import http.server
import threading

import pytest

from flaxlm.distributed.detect import (
  Job,
  detect,
  first_node,
  metadata_of,
  parse_address,
  read_attribute,
  tasks_on_node,
)
from flaxlm.errors import ConfigError

PLAIN = {
  "JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234",
  "JAX_NUM_PROCESSES": "4",
  "JAX_PROCESS_ID": "3",
}
# As srun sets them for `-N 2 -n 8`, in the sixth task.
SLURM = {
  "SLURM_JOB_ID": "77",
  "SLURM_STEP_ID": "0",
  "SLURM_NTASKS": "8",
  "SLURM_STEP_NUM_TASKS": "8",
  "SLURM_PROCID": "5",
  "SLURM_LOCALID": "1",
  "SLURM_NODEID": "1",
  "SLURM_STEP_NODELIST": "gpu[03-04]",
  "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}
ONE_NODE = {
  "SLURM_NODEID": "0",
  "SLURM_LOCALID": "5",
  "SLURM_STEP_TASKS_PER_NODE": "8",
  "SLURM_STEP_NODELIST": "gpu03",
}
# As mpirun of Open MPI 4 sets them.
OPEN_MPI = {
  "OMPI_COMM_WORLD_RANK": "2",
  "OMPI_COMM_WORLD_SIZE": "4",
  "OMPI_COMM_WORLD_LOCAL_RANK": "0",
  "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
  "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
GKE = {"TPU_WORKER_HOSTNAMES": "job-0-0.svc,job-0-1.svc", "TPU_WORKER_ID": "1"}
SLICES = {
  "MEGASCALE_NUM_SLICES": "2",
  "MEGASCALE_SLICE_ID": "1",
  "MEGASCALE_COORDINATOR_ADDRESS": "first-0.svc:8080",
}


def whereabouts(job: Job | None) -> tuple:
  assert job is not None
  return job.process, job.num_processes, job.host, job.local_process, job.local_processes


@pytest.mark.parametrize(
  ("environment", "expected"),
  [
    (PLAIN, (3, 4, "10.0.0.1", 0, 1)),
    (PLAIN | {"FLAXLM_LOCAL_PROCESSES": "2"}, (3, 4, "10.0.0.1", 1, 2)),
    (SLURM, (5, 8, "gpu03", 1, 4)),
    (SLURM | ONE_NODE, (5, 8, "127.0.0.1", 5, 8)),
    (SLURM | {"JAX_COORDINATOR_ADDRESS": "ib03:99"}, (5, 8, "ib03", 1, 4)),
    (SLURM | PLAIN, (3, 4, "10.0.0.1", 0, 1)),
    (OPEN_MPI, (2, 4, "10.96.0.1", 0, 2)),
    (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, (2, 4, "127.0.0.1", 0, 4)),
    (GKE, (1, 2, "job-0-0.svc", 0, 1)),
    (GKE | SLICES, (3, 4, "first-0.svc", 0, 1)),
    (GKE | {"TPU_PROCESS_ADDRESSES": "a:8476,b:8476"}, (1, 2, "a", 0, 1)),
  ],
)
def test_the_job_of_an_environment(environment, expected):
  assert whereabouts(detect(environment)) == expected


@pytest.mark.parametrize(
  "environment",
  [
    {},
    {"SLURM_JOB_ID": "77", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"},  # no srun
    {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},
    {"TPU_WORKER_HOSTNAMES": "localhost"},
    PLAIN | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"},
    {"JAX_COORDINATOR_PORT": "1234"},
  ],
)
def test_alone(environment):
  assert detect(environment) is None


def without(environment: dict[str, str], *names: str) -> dict[str, str]:
  return {name: value for name, value in environment.items() if name not in names}


@pytest.mark.parametrize(
  ("environment", "named"),
  [
    (without(PLAIN, "JAX_PROCESS_ID"), "not JAX_PROCESS_ID"),
    (without(PLAIN, "JAX_COORDINATOR_ADDRESS"), "not JAX_COORDINATOR_ADDRESS"),
    (without(PLAIN, "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"), "neither"),
    (PLAIN | {"JAX_PROCESS_ID": "4"}, "process 4 of 4"),
    (PLAIN | {"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID is '-1'"),
    (PLAIN | {"JAX_NUM_PROCESSES": "0", "JAX_PROCESS_ID": "0"}, "a job of 0 processes"),
    (PLAIN | {"JAX_NUM_PROCESSES": "many"}, "JAX_NUM_PROCESSES is 'many'"),
    (PLAIN | {"JAX_COORDINATOR_ADDRESS": "node"}, "JAX_COORDINATOR_ADDRESS is 'node'"),
    (without(SLURM, "SLURM_LOCALID"), "not SLURM_LOCALID"),
    (without(OPEN_MPI, "OMPI_COMM_WORLD_SIZE"), "not OMPI_COMM_WORLD_SIZE"),
    (without(OPEN_MPI, "OMPI_MCA_orte_hnp_uri"), "does not say where process 0 is"),
    (without(GKE, "TPU_WORKER_ID"), "not TPU_WORKER_ID"),
  ],
)
def test_what_is_half_set_is_named(environment, named):
  with pytest.raises(ConfigError, match=named):
    detect(environment)


def test_all_processes_of_a_step_find_one_port_and_those_of_another_step_their_own():
  ports = {
    step: {
      detect(SLURM | {"SLURM_PROCID": str(n), "SLURM_STEP_ID": step}).port for n in range(8)
    }
    for step in "01"
  }
  assert len(ports["0"]) == len(ports["1"]) == len(ports["0"] | ports["1"]) - 1
  assert all(61_440 <= port < 65_536 for port in ports["0"] | ports["1"])
  assert detect(SLURM | {"JAX_COORDINATOR_PORT": "99"}).port == 99


@pytest.mark.parametrize(
  ("nodes", "first"),
  [
    ("node001", "node001"),
    ("node001,other", "node001"),
    ("node[001-015],other", "node001"),
    ("node[001,007-015]", "node001"),
    ("a[3-4]-ib", "a3-ib"),
  ],
)
def test_first_node(nodes, first):
  assert first_node(nodes) == first


def test_tasks_on_node():
  assert [tasks_on_node("4(x2),3", node) for node in range(3)] == [4, 4, 3]


def test_addresses():
  assert parse_address("[fe80::1]:99") == ("fe80::1", 99)
  for text in ("", ":99", "host:", "host:0", "host:70000", "host:http"):
    with pytest.raises(ConfigError):
      parse_address(text)


# -- Cloud TPU VMs: what a metadata server says --------------------------------------------

ATTRIBUTES = {
  "agent-worker-number": "1",
  "worker-network-endpoints": "a:b:10.0.0.2,c:d:10.0.0.3",
  "tpu-env": "TYPE: 'v5e-16'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'",
}


class Server(http.server.BaseHTTPRequestHandler):
  def do_GET(self):
    value = ATTRIBUTES.get(self.path.rsplit("/", 1)[1])
    asked_rightly = self.headers["Metadata-Flavor"] == "Google"
    self.send_response(200 if value and asked_rightly else 404)
    self.end_headers()
    self.wfile.write((value or "").encode())

  def log_message(self, *_):
    pass


def test_a_tpu_vm_asks_its_metadata_server():
  with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"127.0.0.1:{server.server_port}"
    try:
      job = detect({}, lambda name: read_attribute(address, name))
      assert read_attribute(address, "nothing") is None
    finally:
      server.shutdown()
      thread.join()
  assert whereabouts(job) == (3, 4, "10.0.0.2", 0, 1)
  assert read_attribute(address, "tpu-env") is None, "nobody answers any more"


def test_who_has_no_tpu_asks_nobody():
  assert metadata_of({"TPU_SKIP_MDS_QUERY": "1"})("agent-worker-number") is None
