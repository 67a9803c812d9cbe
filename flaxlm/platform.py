# SPDX-License-Identifier: Apache-2.0
"""Starting JAX: its devices, XLA's flags, malloc, and the compile cache.

A command calls `start_jax` once, before anything touches a device. A flag that the user has
set, in XLA_FLAGS or LIBTPU_INIT_ARGS, is not changed. XLA aborts on unknown flags, so there
are few, each with its reason, and tests check that jaxlib accepts them.
"""

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from flaxlm.config import MOST_DEVICES, NO_KERNEL, SPLASH, TILED, FusedKernel, cudnn
from flaxlm.errors import ConfigError


class Flag(NamedTuple):
  name: str
  value: str
  reason: str  # with its source

  @property
  def line(self) -> str:
    """For the log of a run."""
    return f"XLA: --{self.name}={self.value}: {self.reason}"


GPU = (
  Flag(
    "xla_gpu_enable_latency_hiding_scheduler",
    "true",
    "overlaps collectives with computation; off by default, on in NVIDIA's JAX images "
    "(docs.nvidia.com/jax-toolbox/environment-variables)",
  ),
  Flag(
    "xla_gpu_dot_merger_threshold_mb",
    "0",
    "keeps products of one input separate; merging them copies their weights into one "
    "matrix at every token (a fifth of decoding on an H100: docs/LOG.md)",
  ),
)

# Within a slice, libtpu overlaps collectives by default, according to MaxText's list of
# such flags (benchmarks/xla_flags_library.py). Between slices it needs these flags.
TPU_SLICES = (
  Flag(
    "xla_tpu_enable_data_parallel_all_reduce_opt",
    "true",
    "overlaps all-reduces between slices, over the data-centre network (MaxText, as above)",
  ),
  Flag(
    "xla_tpu_data_parallel_opt_different_sized_ops",
    "true",
    "pipelines those over iterations whatever their sizes (MaxText, as above)",
  ),
)

VARIABLES: dict[tuple[Flag, ...], str] = {
  GPU: "XLA_FLAGS",
  TPU_SLICES: "LIBTPU_INIT_ARGS",
}


def start_jax(
  simulated_devices: int | None = None, cache_dir: Path | None = None
) -> tuple[Flag, ...]:
  """Sets up JAX, once per process: devices, memory, and the persistent compile cache.

  Returns the XLA flags that it set. Raises `ConfigError` if it cannot provide the devices.
  """
  if simulated_devices is not None and not 1 <= simulated_devices <= MOST_DEVICES:
    raise ConfigError(
      f"simulated_devices is {simulated_devices}", f"it can be 1 to {MOST_DEVICES}"
    )
  keep_freed_memory()
  leave_out_absent_tpu(os.environ)
  flags: tuple[Flag, ...] = ()
  if simulated_devices is None:
    give_threads(os.environ, jax.config.values["jax_num_cpu_devices"])
    flags = set_flags(os.environ, flags_for(os.environ))
  else:
    if os.environ.get("JAX_PLATFORMS", "cpu") != "cpu":
      raise ConfigError("simulated_devices works on the CPU only", "set JAX_PLATFORMS=cpu")
    jax.config.update("jax_platforms", "cpu")
    give_threads(os.environ, simulated_devices)
    try:
      jax.config.update("jax_num_cpu_devices", simulated_devices)
    except RuntimeError:  # the backend is up already: a notebook or a test process
      if jax.device_count() != simulated_devices:
        raise ConfigError(
          f"JAX already runs with {jax.device_count()} devices",
          "set simulated_devices before the first use of JAX",
        ) from None
  if cache_dir is not None and jax.config.values["jax_compilation_cache_dir"] is None:
    keep_programs(cache_dir)
  return flags


def give_threads(environment: MutableMapping[str, str], simulated_devices: int) -> None:
  """Has XLA take four threads for each of several simulated devices, unless told otherwise.

  By default all of them share as many threads as there are devices, and an exchange holds
  one while it waits. A device that waits in two at once leaves another one none, and they
  wait for each other: XLA aborts after 40 s (a pipeline did, with two micro-batches).
  """
  if simulated_devices > 1:  # XLA's CPU client reads it; many devices have more than enough
    threads = max(simulated_devices, min(4 * simulated_devices, 64))
    environment.setdefault("NPROC", str(threads))


def compile_quickly() -> None:
  """From now on programs compile faster and run slower: for a process that runs each of
  them once, on tiny arrays."""
  jax.config.update("jax_disable_most_optimizations", True)


def keep_programs(folder: Path) -> bool:
  """Keeps compiled programs in a folder, for other processes; returns whether it does.

  Where the folder cannot be written every process compiles for itself.
  """
  try:
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)  # its files are executed: nobody else may write them
  except OSError:
    return False
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
  return True


def leave_out_absent_tpu(
  environment: Mapping[str, str], devices: Path = Path("/dev")
) -> bool:
  """Chooses the CPU where libtpu is installed, as to plan for TPUs, but there is no TPU.

  JAX would load libtpu to look for one, and libtpu prints lines of warnings. It is
  left to JAX wherever something hints at an accelerator: a choice of the user's (in the
  environment or in jax.config, where JAX also puts the TPUs that it sees on the PCI bus),
  devices of a TPU or a GPU, variables of a TPU's host, or another plugin of JAX. Returns
  whether it chose. To be called before the first use of a device.
  """
  if jax.config.values["jax_platforms"] or importlib.util.find_spec("libtpu") is None:
    return False
  device_files = ("accel*", "vfio/[0-9]*", "nvidia[0-9]*", "kfd", "dxg")
  if any(True for pattern in device_files for _ in devices.glob(pattern)):
    return False
  variables = ("TPU_WORKER", "TPU_ACCELERATOR", "TPU_NAME", "JAX_FORCE_TPU", "MEGASCALE_")
  if any(name.startswith(variables) for name in environment):
    return False
  plugins = importlib.metadata.entry_points(group="jax_plugins")
  if any("cuda" not in plugin.name for plugin in plugins):  # there is no NVIDIA GPU
    return False
  jax.config.update("jax_platforms", "cpu")
  return True


def fused_kernel() -> FusedKernel:
  """The fused attention kernel of the devices at hand. Calling this starts JAX's backend.

  `build_model` takes it as an argument, because nothing in `nn` queries devices.
  """
  device = jax.devices()[0]
  if device.platform == "tpu":
    return SPLASH
  if device.platform == "cpu":
    return TILED
  if device.platform != "gpu" or "cuda" not in device.client.platform_version:
    return NO_KERNEL
  generation = int(device.compute_capability.split(".")[0])
  if generation < 9:
    return cudnn(128 if generation == 8 else 0)
  return cudnn(256, packed=cudnn_version() >= PACKED_SINCE)


PACKED_SINCE = 90600  # cuDNN 9.6, as jax's own test of packed documents


def cudnn_version() -> int:
  """That of the library that JAX found, such as 91002 for 9.10.2; 0: none is known."""
  try:
    from jax._src.lib import cuda_versions  # no public function tells

    return int(cuda_versions.cudnn_get_version()) if cuda_versions else 0
  except (ImportError, AttributeError, RuntimeError):
    return 0


FP8_GENERATION = (8, 9)  # Ada, the first NVIDIA GPU whose tensor cores multiply them


def check_matmul(kind: str) -> None:
  """Raises `ConfigError` if the devices at hand cannot multiply as `training.matmul` says.

  A CPU computes the same numbers, slowly. Calling this starts JAX's backend.
  """
  device = jax.devices()[0]
  if kind != "fp8" or device.platform == "cpu":
    return
  cure = "--training.matmul=full"
  if device.platform != "gpu" or "cuda" not in device.client.platform_version:
    raise ConfigError(
      f"training.matmul=fp8 is for NVIDIA GPUs, not {device.platform}", cure
    )
  if tuple(map(int, device.compute_capability.split("."))) < FP8_GENERATION:
    raise ConfigError(
      f"training.matmul=fp8 needs compute capability 8.9, as Ada and Hopper have: "
      f"{device.device_kind} has {device.compute_capability}",
      cure,
    )


def keep_freed_memory() -> None:
  """Tells glibc's malloc to keep what a step frees for the next step, on the CPU.

  By default, every step maps every large buffer from the kernel again, page by page: a
  sixth to a third of the time of a training step on two cores (docs/LOG.md). Does nothing
  if the user has set a MALLOC_ variable, or with another C library.

  Only the main thread's arena can keep blocks above 64 MiB, so programs must run in the
  thread that calls them. One arena for all threads would work too, but they would wait for
  each other: compiling took up to twice as long.
  """
  libc = ctypes.CDLL(None)
  user_set = any(name.startswith("MALLOC_") for name in os.environ)
  if user_set or not hasattr(libc, "gnu_get_libc_version"):
    return
  jax.config.update("jax_cpu_enable_async_dispatch", False)
  trim_threshold, most_mappings = -1, -4  # malloc.h
  libc.mallopt(most_mappings, 0)  # a threshold is an int: blocks from 2 GiB on exceed it
  libc.mallopt(trim_threshold, -1)  # never


def release_freed_memory() -> None:
  """Gives back what `keep_freed_memory` has kept, where it was much and came once."""
  libc = ctypes.CDLL(None)
  if hasattr(libc, "malloc_trim"):
    libc.malloc_trim(0)


def free_memory(devices: Sequence[jax.Device]) -> int:
  """The bytes that devices have left, together; of those that do not tell, which share the
  host's memory as a CPU does, all that the host has."""
  stats = [device.memory_stats() or {} for device in devices]
  if all("bytes_limit" in found and "bytes_in_use" in found for found in stats):
    return sum(found["bytes_limit"] - found["bytes_in_use"] for found in stats)
  return host_memory()


def host_memory(limit: Path = Path("/sys/fs/cgroup/memory.max")) -> int:
  """The bytes of memory that this process can have: the machine's, or its container's."""
  size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  with contextlib.suppress(OSError, ValueError):  # none, or `max`
    size = min(size, int(limit.read_text()))
  return size


def flags_for(
  environment: Mapping[str, str], devices: Path = Path("/dev")
) -> tuple[Flag, ...]:
  """The flags of the platform that JAX is likely to choose."""
  chosen = environment.get("JAX_PLATFORMS", "")
  if chosen in ("", "cuda", "gpu"):
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    if any(devices.glob("nvidia[0-9]*")) and any(map(importlib.util.find_spec, plugins)):
      return GPU
  if chosen in ("", "tpu") and environment.get("MEGASCALE_NUM_SLICES", "1") != "1":
    return TPU_SLICES
  return ()


def set_flags(
  environment: MutableMapping[str, str], flags: tuple[Flag, ...]
) -> tuple[Flag, ...]:
  """Adds flags that are not set yet; returns those that it added."""
  if not flags:
    return ()
  variable = VARIABLES[flags]
  before = environment.get(variable, "")
  given = set(re.findall(r"--(\w+)", before))
  added = tuple(flag for flag in flags if flag.name not in given)
  text = " ".join(f"--{flag.name}={flag.value}" for flag in added)
  if text:
    environment[variable] = f"{before} {text}".strip()
  return added
