# SPDX-License-Identifier: Apache-2.0
"""Where a figure comes from: the commit, the packages, the flags, the device."""

import os
import platform
from importlib import metadata
from pathlib import Path

PACKAGES = ("flaxlm", "jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers")
ACCELERATOR_PACKAGES = ("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")
# Variables that change the speed of the same program.
FLAGS = (
  "XLA_FLAGS",
  "LIBTPU_INIT_ARGS",
  "OMP_NUM_THREADS",
  "NPROC",
  "CUDA_VISIBLE_DEVICES",
)


def versions() -> dict[str, str]:
  found = {"python": platform.python_version()}
  for package in (*PACKAGES, *ACCELERATOR_PACKAGES):
    try:
      found[package] = metadata.version(package)
    except metadata.PackageNotFoundError:
      continue
  return found


def flags() -> dict[str, str]:
  """Those environment variables that change speeds and are set."""
  jax_flags = [name for name in os.environ if name.startswith(("JAX_", "MALLOC_"))]
  return {name: os.environ[name] for name in sorted({*FLAGS, *jax_flags} & {*os.environ})}


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
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    return next(
      line.split(":")[1].strip() for line in lines if line.startswith("model name")
    )
  except (OSError, StopIteration):
    return platform.processor() or platform.machine()


def commit(checkout: Path = Path(__file__).parents[2]) -> str | None:
  """The commit of the checkout that holds this file, read from .git; None without one."""
  try:
    git = checkout / ".git"
    if git.is_file():  # a worktree: "gitdir: PATH"
      git = checkout / git.read_text("utf-8").removeprefix("gitdir:").strip()
    head = (git / "HEAD").read_text("utf-8").strip()
    name = head.removeprefix("ref:").strip()
    if name == head:
      return head[:12]
    common = git / "commondir"
    shared = git / common.read_text("utf-8").strip() if common.is_file() else git
    for folder in (git, shared):
      if (folder / name).is_file():
        return (folder / name).read_text("utf-8").strip()[:12]
    for line in (shared / "packed-refs").read_text("utf-8").splitlines():
      if line.endswith(f" {name}"):
        return line[:12]
  except (OSError, UnicodeDecodeError):
    pass
  return None
