# SPDX-License-Identifier: Apache-2.0
"""Collectives along each axis of a mesh, by size.

The bandwidth is the bus bandwidth of nccl-tests: the bytes that cross the busiest link in
the best algorithm, which can be compared with the link's own rate for any number of devices
n. With b the larger of the bytes into and out of one device, and t the time:

  all_reduce      2 b (n - 1) / n / t
  all_gather        b (n - 1) / n / t       b: the output
  reduce_scatter    b (n - 1) / n / t       b: the input
  all_to_all        b (n - 1) / n / t
  permute           b / t                   each device sends everything to its neighbour
"""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flaxlm.benchmark.measure import BenchOptions, Side, agree, measure_alone, timed
from flaxlm.benchmark.report import Result
from flaxlm.errors import ConfigError
from flaxlm.sharding import make_mesh

# What each device does with its values, given an axis of n devices.
KINDS = {
  "all_gather": lambda x, axis, n: jax.lax.all_gather(x, axis, tiled=True),
  "reduce_scatter": lambda x, axis, n: jax.lax.psum_scatter(x, axis, tiled=True),
  "all_reduce": lambda x, axis, n: jax.lax.psum(x, axis),
  "all_to_all": lambda x, axis, n: jax.lax.all_to_all(x, axis, 0, 0, tiled=True),
  "permute": lambda x, axis, n: jax.lax.ppermute(
    x, axis, [(place, (place + 1) % n) for place in range(n)]
  ),
}


def bench_collectives(options: BenchOptions) -> list[Result]:
  """GB/s of bus bandwidth. Raises `ConfigError` if there is only one device."""
  mesh = make_mesh(options.mesh)
  axes = [axis for axis, size in mesh.shape.items() if size > 1]
  if not axes:
    raise ConfigError(
      "collectives need more than one device", "on a CPU: --simulated-devices 8"
    )
  results = []
  for axis in axes:
    for kind in KINDS:
      for size in options.pick((2**12,), (2**16, 2**20, 2**24), (2**20, 2**24, 2**28)):
        results.append(bench_collective(kind, axis, size, mesh, options))
  return results


def bench_collective(
  kind: str, axis: str, num_bytes: int, mesh: Mesh, options: BenchOptions
) -> Result:
  """One collective of float32 numbers; the larger of input and output has `num_bytes`."""
  n = mesh.shape[axis]
  length = num_bytes // 4 // n * n
  local = length // n if kind == "all_gather" else length
  whole = np.arange(mesh.size * local, dtype=np.float32).reshape(mesh.size, local) % 1009
  spec = PartitionSpec(mesh.axis_names)
  x = jax.device_put(whole, NamedSharding(mesh, spec))
  function = jax.shard_map(
    lambda x_1N: KINDS[kind](x_1N[0], axis, n)[None],
    mesh=mesh,
    in_specs=spec,
    out_specs=spec,
  )
  timing = measure_alone(Side(jax.jit(function), lambda: (x,)), options)
  gate = agree("every device", timing.result, reference(kind, whole, mesh, axis), 1e-6)
  bus = bus_bytes(kind, 4 * length, n)
  case = f"{kind} {axis}={n} {4 * length / 2**20:.3g} MiB"
  return timed("collectives", case, timing, "GB/s", gate, bus)


def bus_bytes(kind: str, num_bytes: float, n: int) -> float:
  """Bytes over the busiest link, by the formulas above."""
  share = (n - 1) / n
  return num_bytes * {"all_reduce": 2 * share, "permute": 1.0}.get(kind, share)


def reference(kind: str, whole: np.ndarray, mesh: Mesh, axis: str) -> np.ndarray:
  """The values (devices, values) that every device should hold, computed by numpy."""
  place, n = mesh.axis_names.index(axis), mesh.shape[axis]
  grid = np.moveaxis(whole.reshape(*mesh.devices.shape, -1), place, 0)  # (n, ..., values)
  parts = np.stack(np.split(grid, n, -1)) if grid.shape[-1] >= n else grid
  match kind:
    case "all_gather":
      out = np.stack([np.concatenate(list(grid), -1)] * n)
    case "all_reduce":
      out = np.stack([grid.sum(0)] * n)
    case "reduce_scatter":
      out = parts.sum(1)
    case "all_to_all":
      out = np.concatenate(list(np.moveaxis(parts, 1, 0)), -1)
    case "permute":
      out = np.roll(grid, 1, 0)
  return np.moveaxis(out, 0, place).reshape(mesh.size, -1)
