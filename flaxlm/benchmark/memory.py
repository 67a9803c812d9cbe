# SPDX-License-Identifier: Apache-2.0
"""Memory: passes over arrays of growing size, and the way between host and device.

Bytes are counted as STREAM counts them (McCalpin, 1995): what the program reads and
writes, not what a processor fetches before it overwrites a line.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from flaxlm.benchmark.measure import Setting, Side, agree, measure, timed
from flaxlm.benchmark.report import Result, Work
from flaxlm.errors import FlaxLMError

MIB = 2**20
FACTOR = 1.5  # exact in float32
ROW = 1024  # elements


def bench_memory(setting: Setting) -> list[Result]:
  """GB/s of reading, of scaling, of adding two arrays into a third, and of transfers."""
  sizes = setting.pick((1,), (1, 8, 32, 128, 512), (512, 2048))
  results = []
  for size in sizes:
    results += bench_passes(size, setting)
  return results + bench_transfer(setting.pick(1, 64, 1024), setting)


# Name: the pass, how many of its three arrays it touches, and what it makes of x=1, y=2.
# Reading is a matrix times a vector, as in decoding: reductions are slower on CPUs.
PASSES = {
  "read": (lambda x, y: x.reshape(-1, ROW) @ jnp.ones(ROW, x.dtype), 1, float(ROW)),
  "scale": (lambda x, y: FACTOR * x, 2, FACTOR),
  "triad": (lambda x, y: x + FACTOR * y, 3, 1 + 2 * FACTOR),
}


def bench_passes(size: int, setting: Setting) -> list[Result]:
  """Each pass touches `size` MiB in all."""
  results = []
  for name, (function, arrays, expected) in PASSES.items():
    length = size * MIB // arrays // 4
    total = float(arrays * length * 4)
    x, y = jnp.ones(length), jnp.full(length if arrays == 3 else 1, 2.0)
    side = Side(jax.jit(function), functools.partial(tuple, (x, y)))
    timing = measure({name: side}, setting)[name]
    work = Work(0.0, total, footprint=total)
    result = timed(("memory", f"{name} {size} MiB"), timing, "GB/s", total, work)
    result.correct = agree("every element", timing.result, np.float64(expected), 0.0)
    results.append(result)
  return results


def bench_transfer(size: int, setting: Setting) -> list[Result]:
  """From host memory to the device's and back; on a CPU, where they are one, a copy."""
  host = np.arange(size * MIB // 4, dtype=np.float32)
  on_device = jax.device_put(host)
  fresh = jax.jit(lambda x: x + 0)  # an array remembers its copy on the host
  # On a CPU `device_put` and `asarray` copy nothing: they lend the memory.
  cpu = jax.default_backend() == "cpu"
  put = functools.partial(jnp.array, copy=True) if cpu else jax.device_put
  sides = {
    "to device": Side(put, lambda: (host,)),
    "to host": Side(np.array if cpu else np.asarray, lambda: (fresh(on_device),)),
  }
  results = []
  for name, side in sides.items():
    timing = measure({name: side}, setting)[name]
    result = timed(("memory", f"{name} {size} MiB"), timing, "GB/s", float(host.nbytes))
    result.correct = agree("every element", timing.result, host, 0.0)
    if np.shares_memory(np.asarray(timing.result), host):
      raise FlaxLMError(f"a speed without a result: {name} copied nothing")
    results.append(result)
  return results
