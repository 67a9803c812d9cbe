# SPDX-License-Identifier: Apache-2.0
"""Starting JAX as one of several processes, and leaving it again.

First comes the rendezvous, then `jax.distributed.initialize`, which is given every value
that it would otherwise guess. For a process that is alone nothing is started.
"""

import atexit
import contextlib
import operator
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jaxlib

from flaxlm.config import Config, knobs
from flaxlm.distributed.detect import TOKEN, Job, detect, metadata_of
from flaxlm.distributed.peers import Alone, Peers
from flaxlm.distributed.rendezvous import meet
from flaxlm.errors import ConfigError, exit_code_of, first_line
from flaxlm.version import __version__

BIND = "FLAXLM_BIND"
DEVICES = "JAX_LOCAL_DEVICE_IDS"
# JAX's own heartbeat, in ours: `peers` should notice a lost process first, because JAX
# aborts with a C++ stack.
JAX_HEARTBEATS = 3


@contextlib.contextmanager
def joined(cfg: Config) -> Iterator[Alone]:
  """The processes of this job, once all of them have met and JAX has started.

  When an error leaves the block, the other processes are told and end too.
  """
  job = detect(os.environ, metadata_of(os.environ))
  if job is None:
    yield Alone()
    return
  bind, token = os.environ.get(BIND) or None, os.environ.get(TOKEN, "")
  meeting = meet(job, claims(cfg), cfg.job.start_seconds, bind, token)
  peers = Peers(job.process, meeting, cfg.job.heartbeat_seconds)
  try:
    with only_ours_on_stdout():
      start_runtime(job, meeting.coordinator, meeting.bind, cfg.job.heartbeat_seconds)
      yield peers
      peers.agree("the end")
  except BaseException as e:
    peers.explain()  # collectives and saves also fail because another process has died
    peers.leave(e)
    # JAX's own shutdown would wait minutes for the others.
    code = exit_code_of(e)
    atexit.register(lambda: (sys.stderr.flush(), os._exit(code)))
    raise
  peers.leave()
  jax.distributed.shutdown()


def claims(cfg: Config) -> dict[str, str]:
  """Values that have to be the same on all processes: versions, and all config fields."""
  fields = {name: str(operator.attrgetter(name)(cfg)) for name, _, _ in knobs(Config)}
  versions = {
    "flaxlm": __version__,
    "jax": jax.__version__,
    "jaxlib": jaxlib.__version__,
    "Python": platform.python_version(),
  }
  return versions | fields


def start_runtime(job: Job, coordinator: str, bind: str, heartbeat: float) -> None:
  """`jax.distributed.initialize`, with every value given that it could detect itself."""
  # `peers` agrees on the last step, and the training loop handles SIGTERM.
  jax.config.update("jax_enable_preemption_service", False)
  try:
    jax.distributed.initialize(
      coordinator_address=coordinator,
      num_processes=job.num_processes,
      process_id=job.process,
      local_device_ids=device_ids(job, os.environ),
      cluster_detection_method="deactivate",
      heartbeat_timeout_seconds=max(100, int(JAX_HEARTBEATS * heartbeat)),
      coordinator_bind_address=bind or None,
    )
  except RuntimeError as e:
    raise ConfigError(
      f"JAX cannot start as process {job.process}: {first_line(e)}",
      "do not start JAX in any other way in this process",
    ) from e


def device_ids(job: Job, environment: Mapping[str, str]) -> list[int] | None:
  """This process's share of the machine's GPUs; None: all that it sees.

  A launcher that binds a GPU to each process shows each process only that one.
  """
  if DEVICES in environment:  # JAX reads it
    return None
  count = num_gpus(environment)
  if job.local_processes == 1 or count < job.local_processes:
    return None
  if count % job.local_processes:
    raise ConfigError(
      f"{count} GPUs for {job.local_processes} processes on this machine",
      f"start as many as divide {count}, or set CUDA_VISIBLE_DEVICES",
    )
  each = count // job.local_processes
  return [*range(each * job.local_process, each * (job.local_process + 1))]


def num_gpus(environment: Mapping[str, str], devices: Path = Path("/dev")) -> int:
  """The number of NVIDIA GPUs that this process sees, found without starting CUDA."""
  if environment.get("JAX_PLATFORMS", "cuda") not in ("cuda", "gpu"):
    return 0
  visible = environment.get("CUDA_VISIBLE_DEVICES")
  if visible is not None:
    return len([part for part in visible.split(",") if part.strip()])
  return len(list(devices.glob("nvidia[0-9]*")))


@contextlib.contextmanager
def only_ours_on_stdout() -> Iterator[None]:
  """Sends what libraries print, such as Gloo, to stderr: stdout is for results."""
  try:
    target = sys.stdout.fileno()
  except (OSError, ValueError, AttributeError):  # stdout is captured and has no descriptor
    yield
    return
  sys.stdout.flush()
  ours = os.fdopen(os.dup(target), "w", encoding="utf-8")
  os.dup2(sys.stderr.fileno(), target)
  before: Any = sys.stdout
  sys.stdout = ours
  try:
    yield
  finally:
    ours.flush()
    os.dup2(ours.fileno(), target)
    sys.stdout = before
    ours.close()
