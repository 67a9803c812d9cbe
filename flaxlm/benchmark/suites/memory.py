# SPDX-License-Identifier: Apache-2.0
"""Memory: passes over arrays of growing size, and transfers between host and device.

Bytes are counted as STREAM counts them (McCalpin, 1995): those that the program reads and
writes, without the lines that a processor fetches only to overwrite them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from flaxlm.benchmark.measure import (
  BenchOptions,
  Side,
  agree,
  measure_alone,
  timed,
  wrong_result,
)
from flaxlm.benchmark.report import Demand, Result

MIB = 2**20
FACTOR = 1.5  # exact in float32
ROW = 1024  # elements


def bench_memory(options: BenchOptions) -> list[Result]:
  """GB/s of reading, scaling, adding two arrays into a third, and transfers."""
  results = []
  for size in options.pick((1,), (1, 8, 32, 128, 512), (512, 2048)):
    results += bench_passes(size, options)
  return results + bench_transfer(options.pick(1, 64, 1024), options)


# Name: the pass, how many arrays it reads and writes, and its result for x=1, y=2.
# Reading is a matrix times a vector, as in decoding, because reductions are slower on CPUs.
PASSES = {
  "read": (lambda x, y: x.reshape(-1, ROW) @ jnp.ones(ROW, x.dtype), 1, float(ROW)),
  "scale": (lambda x, y: FACTOR * x, 2, FACTOR),
  "triad": (lambda x, y: x + FACTOR * y, 3, 1 + 2 * FACTOR),
}


def bench_passes(size: int, options: BenchOptions) -> list[Result]:
  """Each pass, reading and writing `size` MiB in all."""
  results = []
  for name, (function, arrays, expected) in PASSES.items():
    length = size * MIB // arrays // 4
    total = float(arrays * length * 4)
    x, y = jnp.ones(length), jnp.full(length if arrays == 3 else 1, 2.0)
    side = Side(jax.jit(function), functools.partial(tuple, (x, y)))
    timing = measure_alone(side, options)
    gate = agree("every element", timing.result, np.float64(expected), 0.0)
    demand = Demand(0.0, total, footprint=total)
    case = f"{name} {size} MiB"
    results.append(timed("memory", case, timing, "GB/s", gate, total, demand))
  return results


def bench_transfer(size: int, options: BenchOptions) -> list[Result]:
  """From host memory to the device's and back; a copy on a CPU, where both are the same."""
  host = np.arange(size * MIB // 4, dtype=np.float32)
  on_device = jax.device_put(host)
  fresh = jax.jit(lambda x: x + 0)  # an array keeps its copy on the host
  # On a CPU `device_put` and `asarray` would share the memory and copy nothing.
  cpu = jax.default_backend() == "cpu"
  put = functools.partial(jnp.array, copy=True) if cpu else jax.device_put
  sides = {
    "to device": Side(put, lambda: (host,)),
    "to host": Side(np.array if cpu else np.asarray, lambda: (fresh(on_device),)),
  }
  results = []
  for name, side in sides.items():
    timing = measure_alone(side, options)
    gate = agree("every element", timing.result, host, 0.0)
    if np.shares_memory(np.asarray(timing.result), host):
      raise wrong_result(f"{name} copied nothing")
    case = f"{name} {size} MiB"
    results.append(timed("memory", case, timing, "GB/s", gate, float(host.nbytes)))
  return results
