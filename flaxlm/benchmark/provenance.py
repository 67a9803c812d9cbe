# SPDX-License-Identifier: Apache-2.0
"""Where a figure comes from: the commit, the packages, the flags, the device."""

import functools
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
  *("flaxlm", "jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers"),
  *("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin"),
)
# Variables that change the speed of the same program.
FLAGS = ("LIBTPU_INIT_ARGS", "OMP_NUM_THREADS", "NPROC", "CUDA_VISIBLE_DEVICES")
FLAG_PREFIXES = ("JAX_", "MALLOC_", "XLA_FLAGS")


@functools.cache
def origin_of_run() -> dict[str, Any]:
  """The fields of a result that say where it was measured. Asked once: the code that runs
  is what was loaded, whatever is committed later."""
  return dict(versions=versions(), flags=flags(), device=device(), commit=commit())


def versions() -> dict[str, str]:
  found = {"python": platform.python_version()}
  for package in PACKAGES:
    try:
      found[package] = metadata.version(package)
    except metadata.PackageNotFoundError:
      continue
  return found


def flags() -> dict[str, str]:
  """Those environment variables that change speeds and are set."""
  return {
    name: value
    for name, value in sorted(os.environ.items())
    if name in FLAGS or name.startswith(FLAG_PREFIXES)
  }


def device() -> str:
  """The accelerator's name as JAX gives it, or the CPU's and its usable cores."""
  import jax  # not needed to compare files

  devices = jax.devices()
  if devices[0].platform != "cpu":
    return f"{len(devices)} x {devices[0].device_kind}"
  name = f"{processor()}, {len(os.sched_getaffinity(0))} cores"
  return name if len(devices) == 1 else f"{name}, {len(devices)} simulated devices"


def processor() -> str:
  try:
    for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
      if line.startswith("model name"):
        return line.split(":")[1].strip()
  except OSError:
    pass
  return platform.processor() or platform.machine()


def commit(checkout: Path = Path(__file__).parents[2]) -> str | None:
  """The commit of the checkout that holds this file; None without one, or without git.

  The folder is named, so that an installed package does not report the commit of whatever
  repository happens to enclose it.
  """
  command = ["git", f"--git-dir={checkout / '.git'}", "rev-parse", "HEAD"]
  try:
    found = subprocess.run(command, capture_output=True, text=True, check=True)
  except (OSError, subprocess.CalledProcessError):
    return None
  return found.stdout.strip()[:12]
