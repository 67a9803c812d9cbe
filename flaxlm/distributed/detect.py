# SPDX-License-Identifier: Apache-2.0
"""Which job this process belongs to, by the environment variables that its launcher sets.

| launcher | process | count | address of process 0 |
|---|---|---|---|
| a user, `flaxlm launch` | JAX_PROCESS_ID | JAX_NUM_PROCESSES | JAX_COORDINATOR_ADDRESS |
| Open MPI's mpirun | OMPI_COMM_WORLD_RANK | OMPI_COMM_WORLD_SIZE | OMPI_MCA_orte_hnp_uri |
| Slurm's srun | SLURM_PROCID | SLURM_STEP_NUM_TASKS | first of SLURM_STEP_NODELIST |
| GKE, TPU slices | TPU_WORKER_ID | TPU_WORKER_HOSTNAMES | the first of them |
| Cloud TPU VM | agent-worker-number | worker-network-endpoints | the first of them |

The first row that applies decides. JAX_COORDINATOR_ADDRESS, or JAX_COORDINATOR_PORT alone,
replaces the coordinator of any row. The last row asks the machine's metadata server.
"""

import ipaddress
import re
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from flaxlm.errors import ConfigError

ADDRESS, COUNT, PROCESS = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
PORT = "JAX_COORDINATOR_PORT"
TOKEN = "FLAXLM_JOB_TOKEN"  # a secret of the job: its processes know each other by it
LOCAL = "FLAXLM_LOCAL_PROCESSES"  # processes of each machine, which are numbered in turn
TPU_PORT = 8482  # JAX's own choice, which the firewalls of TPU networks let through
SLICES, SLICE = "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID"
LOOPBACK = "127.0.0.1"
METADATA = "http://{}/computeMetadata/v1/instance/attributes/{}"

Environment = Mapping[str, str]
Metadata = Callable[[str], str | None]


@dataclass(frozen=True)
class Job:
  """One of several processes. `host` and `port` are the address of process 0."""

  process: int
  num_processes: int
  host: str
  port: int
  source: str
  local_process: int = 0  # this process among those of this machine
  local_processes: int = 1

  @property
  def one_host(self) -> bool:
    return self.num_processes == self.local_processes or is_loopback(self.host)


def detect(environment: Environment, metadata: Metadata = lambda _: None) -> Job | None:
  """The job of this process; None if it is alone.

  `metadata` reads an attribute of a Cloud TPU VM. Raises `ConfigError`, which names the
  variables, if only some of them are set or they contradict each other.
  """
  job = (
    _plain(environment)
    or _open_mpi(environment)
    or _slurm(environment)
    or _gke(environment)
    or _tpu_vm(environment, metadata)
  )
  if job is None:
    if ADDRESS in environment:
      raise ConfigError(
        f"{ADDRESS} is set, but neither {COUNT} nor {PROCESS}, and no launcher was found",
        f"set all three, or unset {ADDRESS}",
      )
    return None
  if job.num_processes < 1:
    raise ConfigError(
      f"{job.source}: a job of {job.num_processes} processes", "it has 1 or more"
    )
  if not 0 <= job.process < job.num_processes:
    raise ConfigError(
      f"{job.source}: process {job.process} of {job.num_processes}",
      f"processes are counted from 0 to {job.num_processes - 1}",
    )
  if job.num_processes == 1:
    return None
  if ADDRESS in environment:
    host, port = parse_address(environment[ADDRESS])
    job = replace(job, host=host, port=port)
  else:
    host = LOOPBACK if job.one_host else job.host
    job = replace(job, host=host, port=_number(environment, PORT, str(job.port)))
  if not job.host:
    raise ConfigError(
      f"{job.source} does not say where process 0 is", f"set {ADDRESS}=HOST:PORT"
    )
  return job


def _plain(environment: Environment) -> Job | None:
  given = [name for name in (COUNT, PROCESS) if name in environment]
  if not given:
    return None
  missing = [name for name in (ADDRESS, COUNT, PROCESS) if name not in environment]
  if missing:
    raise ConfigError(
      f"{' and '.join(given)} set, but not {' and '.join(missing)}",
      f"set {ADDRESS}, {COUNT} and {PROCESS}, or none of them",
    )
  host, port = parse_address(environment[ADDRESS])
  count, process = _number(environment, COUNT), _number(environment, PROCESS)
  local = max(1, _number(environment, LOCAL, "1"))
  return Job(process, count, host, port, "the environment", process % local, local)


def _open_mpi(environment: Environment) -> Job | None:
  names = [
    f"OMPI_COMM_WORLD_{part}" for part in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
  ]
  if names[0] not in environment:
    return None
  numbers = _numbers(environment, names)
  # Open MPI 4 gives mpirun's addresses, Open MPI 5 only the name of the job.
  uri = environment.get("OMPI_MCA_orte_hnp_uri", "")
  found = re.search(r"tcp://([^,:]+)|tcp6://\[([^,\]]+)", uri)
  host = (found.group(1) or found.group(2)) if found else ""
  port = _port_of(uri or environment.get("PMIX_NAMESPACE", ""))
  return Job(numbers[0], numbers[1], host, port, "Open MPI", numbers[2], numbers[3])


def _slurm(environment: Environment) -> Job | None:
  # An sbatch script belongs to a job but is not a step: only srun sets a step's node list.
  nodes = environment.get("SLURM_STEP_NODELIST")
  if nodes is None or "SLURM_PROCID" not in environment:
    return None
  count = "SLURM_STEP_NUM_TASKS"
  names = ["SLURM_PROCID", count if count in environment else "SLURM_NTASKS"]
  process, num_processes, local = _numbers(environment, [*names, "SLURM_LOCALID"])
  on_node = environment.get("SLURM_STEP_TASKS_PER_NODE", "1")
  node = _number(environment, "SLURM_NODEID", "0")
  step = f"{environment.get('SLURM_JOB_ID')}.{environment.get('SLURM_STEP_ID')}"
  return Job(
    process,
    num_processes,
    first_node(nodes),
    _port_of(step),
    "Slurm",
    local,
    tasks_on_node(on_node, node),
  )


def _gke(environment: Environment) -> Job | None:
  hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get(
    "TPU_WORKER_HOSTNAMES"
  )
  if not hosts:
    return None
  return _slices(environment, hosts.split(","), "GKE", "TPU_WORKER_ID")


def _tpu_vm(environment: Environment, metadata: Metadata) -> Job | None:
  worker, endpoints = metadata("agent-worker-number"), metadata("worker-network-endpoints")
  if worker is None or endpoints is None:
    return None
  # Each endpoint is a host, or an older name:id:ip.
  hosts = [endpoint.split(":")[-1] for endpoint in endpoints.split(",")]
  about = dict(re.findall(r"^(MEGASCALE_\w+): '([^']*)'", metadata("tpu-env") or "", re.M))
  about = {**about, **environment, "agent-worker-number": worker}
  return _slices(about, hosts, "Cloud TPU VM", "agent-worker-number")


def _slices(environment: Environment, hosts: list[str], source: str, worker: str) -> Job:
  """Slices of TPUs side by side: the processes of the first slice are numbered first."""
  given = environment.get
  slices = _number(environment, SLICES) if given(SLICES) else 1
  current = _number(environment, SLICE) if given(SLICE) else 0
  num_processes = len(hosts) * slices
  process = current * len(hosts)
  if num_processes > 1:
    process += _numbers(environment, [worker])[0]
  first = given("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0]
  return Job(process, num_processes, first.split(":")[0], TPU_PORT, source)


# -- What the variables hold -------------------------------------------------------------


def _numbers(environment: Environment, names: list[str]) -> list[int]:
  missing = [name for name in names if name not in environment]
  if missing:
    there = next((name for name in names if name in environment), "the job")
    raise ConfigError(
      f"{there} is set, but not {' and '.join(missing)}",
      f"set {ADDRESS}, {COUNT} and {PROCESS} yourself",
    )
  return [_number(environment, name) for name in names]


def _number(environment: Environment, name: str, default: str = "") -> int:
  text = environment.get(name, default).strip()
  if not re.fullmatch(r"[0-9]{1,9}", text):
    raise ConfigError(f"{name} is {text!r}", "it is a number from 0 on")
  return int(text)


def parse_address(text: str) -> tuple[str, int]:
  """`host:port` or `[ipv6]:port`."""
  host, _, port = text.strip().rpartition(":")
  host = host.removeprefix("[").removesuffix("]")
  if not host or not port.isdecimal() or not 0 < int(port) < 65535:
    raise ConfigError(f"{ADDRESS} is {text!r}", "as in node001:12345")
  return host, int(port)


def first_node(nodes: str) -> str:
  """`node001` of `node[001-015,020],other`: the first of a Slurm node list."""
  found = re.match(r"([^,\[]*)(?:\[([^,\-\]]*)[^\]]*\]([^,\[]*))?", nodes)
  assert found is not None, "an empty match at least"
  return "".join(part or "" for part in found.groups())


def tasks_on_node(text: str, node: int) -> int:
  """Tasks on a node of a Slurm step: `4(x2),3` means 4 on nodes 0 and 1, and 3 on 2."""
  for tasks, _, times in re.findall(r"(\d+)(\(x(\d+)\))?", text):
    node -= int(times or 1)
    if node < 0:
      return int(tasks)
  return 1


def is_loopback(host: str) -> bool:
  if host == "localhost":
    return True
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return False


def _port_of(name: str) -> int:
  """A port derived from a job's name, above those that systems assign by themselves."""
  return 61_440 + zlib.crc32(name.encode()) % 4_000


# -- Metadata of Cloud TPU VMs -----------------------------------------------------------


def metadata_of(environment: Environment) -> Metadata:
  """A reader of this machine's attributes; on a machine without TPUs it finds nothing."""
  chips = [path for path in ("/dev/accel0", "/dev/vfio/0") if Path(path).exists()]
  if not chips or "TPU_SKIP_MDS_QUERY" in environment:
    return lambda _: None
  server = environment.get("GCE_METADATA_IP", "metadata.google.internal")
  return lambda name: read_attribute(server, name)


def read_attribute(server: str, name: str) -> str | None:
  """An attribute of a Google machine; None if it, or such a machine, does not exist."""
  request = urllib.request.Request(
    METADATA.format(server, name), headers={"Metadata-Flavor": "Google"}
  )
  # Not through a proxy, which knows nothing about the machine that asks.
  direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
  try:
    with direct.open(request, timeout=5) as answer:
      return answer.read(65_536).decode()
  except (urllib.error.URLError, TimeoutError, ValueError):
    return None
