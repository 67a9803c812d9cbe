# SPDX-License-Identifier: Apache-2.0
"""XLA flags that a door sets before JAX starts, by platform, each with its reason.

A flag that the user set, in XLA_FLAGS or LIBTPU_INIT_ARGS, stands as it is. XLA aborts at
a flag that it does not know, so there are few, and tests show them to jaxlib.
"""

import importlib.util
import re
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import NamedTuple


class Flag(NamedTuple):
  name: str
  value: str
  reason: str  # and where that is from

  @property
  def line(self) -> str:
    """For the log of a run."""
    return f"XLA: --{self.name}={self.value}: {self.reason}"


GPU = (
  Flag(
    "xla_gpu_enable_latency_hiding_scheduler",
    "true",
    "moves collectives so that they run beside computation; off by default, on in "
    "NVIDIA's JAX images (docs.nvidia.com/jax-toolbox/environment-variables)",
  ),
  Flag(
    "xla_gpu_dot_merger_threshold_mb",
    "0",
    "products of one input stay apart: merged, they have their weights copied into one "
    "matrix at every token (a fifth of decoding on an H100: docs/LOG.md)",
  ),
)

# Within a slice libtpu's own defaults overlap collectives already: MaxText's list of such
# flags says so (benchmarks/xla_flags_library.py). Between slices they have to be asked for.
TPU_SLICES = (
  Flag(
    "xla_tpu_enable_data_parallel_all_reduce_opt",
    "true",
    "overlaps all-reduces between slices, over the data-centre network (MaxText, as above)",
  ),
  Flag(
    "xla_tpu_data_parallel_opt_different_sized_ops",
    "true",
    "lets those be pipelined over iterations whatever their sizes (MaxText, as above)",
  ),
)

VARIABLES: dict[tuple[Flag, ...], str] = {
  GPU: "XLA_FLAGS",
  TPU_SLICES: "LIBTPU_INIT_ARGS",
}


def flags_for(
  environment: Mapping[str, str], devices: Path = Path("/dev")
) -> tuple[Flag, ...]:
  """The flags of the platform that JAX will choose, as far as can be told before."""
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
  """Adds flags that are not there yet; returns those that it added."""
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
