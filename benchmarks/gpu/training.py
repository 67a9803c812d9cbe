# SPDX-License-Identifier: Apache-2.0
"""Training steps: flaxlm's and compiled PyTorch's, each in a process of its own.

Both begin from the same parameters and see the same batches; the losses of the first steps
must agree before a speed counts. FLOPs are strict, of packed rows those of what queries
see, so the fraction of the published peak is the MFU.
"""

import dataclasses
import importlib.util
import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.cases import (
  LAYOUTS,
  PERIOD,
  Layout,
  TrainCase,
  batches_of,
  block_of_numbers,
  constant_of,
  offset_of,
  train_cases,
  visible_share,
)
from benchmarks.predictions.comparison import one_device_mesh
from flaxlm.benchmark.ceilings import this_device
from flaxlm.benchmark.report import Demand, Result, summarise, with_ratio
from flaxlm.benchmark.suites.train import (
  LOSS_TOLERANCES,
  check_losses,
  compare_losses,
  name_of,
  step_demand,
)
from flaxlm.benchmark.training_case import time_steps
from flaxlm.config import FusedKernel, mesh_shape
from flaxlm.cost import forward_work
from flaxlm.data.objectives import Batch
from flaxlm.nn.models import build_model
from flaxlm.planning.memory import training_memory
from flaxlm.planning.roofline import with_path
from flaxlm.platform import fused_kernel, start_jax
from flaxlm.training.optimizer import build_optimizer
from flaxlm.training.step import init_state, jit_train_step, put_batch

SIDES = ("flaxlm", "torch compiled")
GIB = 2**30


def obstacle(case: TrainCase, side: str) -> str | None:
  """Why a side cannot run a case here; None: nothing is known."""
  if side != "flaxlm":
    return None if importlib.util.find_spec("torch") else "PyTorch is not installed"
  device, sizes = this_device(), mesh_shape({})
  if device is None or device.usable_bytes is None:
    return None
  cfg, _ = with_path(case.cfg, sizes, device)
  needed = training_memory(cfg, sizes).total
  if needed <= device.usable_bytes:
    return None
  return f"needs {needed / GIB:.0f} GiB of {device.usable_bytes / GIB:.0f}"


def summarise_case(
  name: str, case: TrainCase, runs: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[Result]:
  """A figure for each layout that flaxlm ran, with the ratio where PyTorch ran it too.

  `runs` are the lines that `main` wrote, by side. Raises `FlaxLMError` if losses disagree.
  """
  results = []
  for layout in LAYOUTS:
    of = {side: [run for run in runs[side] if run["layout"] == layout] for side in SIDES}
    ours, theirs = of["flaxlm"], of["torch compiled"]
    if ours:
      results.append(summarise_layout(f"{name} {layout}", case, layout, ours, theirs))
  return results


def summarise_layout(
  name: str,
  case: TrainCase,
  layout: Layout,
  ours: Sequence[Mapping[str, Any]],
  theirs: Sequence[Mapping[str, Any]],
) -> Result:
  data = case.cfg.data
  rates = [rate for run in ours for rate in run["rates"]]
  gate = check_losses(ours[0]["losses"])
  text = f"{name} {data.batch_size}x{data.seq_len} {case.cfg.training.dtype}"
  result = summarise("train", text, rates, "tokens/s", gate, demand_of(case, layout))
  result.first_seconds = statistics.median(run["first_seconds"] for run in ours)
  result.seconds = case.tokens / result.median
  if not theirs:
    return result
  tolerance = LOSS_TOLERANCES[case.cfg.training.dtype]
  gate = compare_losses(ours[0]["losses"], theirs[0]["losses"], tolerance)
  seconds = lambda runs: [case.tokens / r for run in runs for r in run["rates"]]
  pairs = list(zip(seconds(ours), seconds(theirs), strict=False))
  our, their = zip(*pairs, strict=True)
  return with_ratio(result, "torch compiled", our, their, f"{gate}; {theirs[0]['note']}")


def demand_of(case: TrainCase, layout: Layout) -> Demand:
  """Strict FLOPs and the planned bytes of a step; packed queries see fewer keys."""
  demand, data = step_demand(case.cfg), case.cfg.data
  attention = 3 * forward_work(case.cfg.model, data.batch_size, data.seq_len).attention
  hidden = 1 - visible_share(case, layout)
  return dataclasses.replace(demand, flops=demand.flops - hidden * attention)


# -- In a process of its own ---------------------------------------------------------------


def main() -> None:
  """`SIDE CASE OUTPUT`: appends a line of JSON for each layout."""
  side, name, output, smoke = sys.argv[1:]
  case = train_cases(bool(int(smoke)))[name]
  if side == "flaxlm":
    start_jax()
    run: Callable[[TrainCase, Layout], dict[str, Any]] = run_flaxlm
  else:
    from benchmarks.gpu.torch_side import run_torch as run
  for layout in LAYOUTS:
    found = {"layout": layout} | run(case, layout)
    with Path(output).open("a", encoding="utf-8") as out:
      print(json.dumps(found), file=out, flush=True)


def run_flaxlm(
  case: TrainCase, layout: Layout, kernel: FusedKernel | None = None
) -> dict[str, Any]:
  """The step of `flaxlm train`. Of whole rows it is told that they are whole; `kernel` is
  attention's, in place of the device's."""
  cfg, mesh = case.cfg, one_device_mesh()
  model = build_model(cfg.model, cfg.training, kernel or fused_kernel())
  optimizer = build_optimizer(cfg.optimizer, num_steps=1)
  state = init_state(model, optimizer, mesh, seed=0)
  state = state._replace(params=given_params(state.params))
  train_step = jit_train_step(model, optimizer, cfg.training, mesh)

  def step(batch: Batch) -> jax.Array:
    nonlocal state
    state, metrics = train_step(state, put_batch(batch, mesh), np.uint32(0))
    return metrics["loss"]

  found = time_steps(case, batches_of(case, layout), step, jax.block_until_ready)
  stats = jax.devices()[0].memory_stats() or {}
  return found | {"peak_bytes": stats.get("peak_bytes_in_use"), "note": ""}


def given_params(params: Any) -> Any:
  """Parameters by the rule of `cases`, in place of these."""
  block = jnp.asarray(block_of_numbers())

  def given(path: Any, leaf: jax.Array) -> jax.Array:
    name, shape, dtype = name_of(path), leaf.shape, leaf.dtype
    sharding = leaf.sharding
    leaf.delete()
    if (constant := constant_of(name)) is not None:
      return jnp.full(shape, constant, dtype, device=sharding)
    make = jax.jit(numbers, static_argnames=("shape", "dtype"), out_shardings=sharding)
    return make(block, offset_of(name), shape=shape, dtype=dtype)

  return jax.tree.map_with_path(given, params)


def numbers(block: jax.Array, first: jax.Array, *, shape: Any, dtype: Any) -> jax.Array:
  size = int(np.prod(shape))
  assert size + PERIOD < 2**32
  places = (jnp.arange(size, dtype=jnp.uint32) + jnp.uint32(first)) % PERIOD
  return block[places].reshape(shape).astype(dtype)


def environment(folder: Path) -> dict[str, str]:
  """What is compiled is kept in a folder, for the next round. JAX may have all memory."""
  return os.environ | {
    "JAX_COMPILATION_CACHE_DIR": str(folder / "jax"),
    "TORCHINDUCTOR_CACHE_DIR": str(folder / "torch"),
    "XLA_PYTHON_CLIENT_PREALLOCATE": "true",
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.94",
  }


if __name__ == "__main__":
  main()
