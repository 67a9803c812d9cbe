# SPDX-License-Identifier: Apache-2.0
"""Training speed on shapes of nanoGPT's recipes, against PyTorch if asked.

Each side runs in a fresh process of its own, one round of each side in turn. All start from
the same parameters, see the same batches and update with the same AdamW; the losses of
their first steps must agree before a speed counts. FLOPs are strict (see `cost`),
so that the fraction of the published peak is the MFU.
"""

import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flaxlm.benchmark.ceilings import this_device
from flaxlm.benchmark.measure import BenchOptions, run_python, within, wrong_result
from flaxlm.benchmark.report import Demand, Result, summarise, with_ratio
from flaxlm.benchmark.training_case import CASES, OPTIMIZER, Case, find_case, time_steps
from flaxlm.config import DataConfig, ResolvedConfig, TrainingConfig, mesh_shape
from flaxlm.cost import step_cost
from flaxlm.data.objectives import Windows, next_token
from flaxlm.devices import ANY
from flaxlm.nn.models import abstract_params, build_model
from flaxlm.planning.roofline import traffic_parts, with_path
from flaxlm.platform import fused_kernel, start_jax
from flaxlm.sharding import make_mesh
from flaxlm.training.optimizer import build_optimizer
from flaxlm.training.step import init_state, jit_train_step, put_batch

# Every round starts one process per side.
MAX_ROUNDS, MAX_ROUNDS_ALONE = 3, 2
LOSS_TOLERANCES = {"float32": 2e-4, "bfloat16": 1e-2}  # relative, over the first steps
CHECKED_STEPS = 4
PEERS = {"torch": ("torch eager", "torch compiled")}


def bench_train(options: BenchOptions) -> list[Result]:
  """Tokens per second of each case, and the ratios to PyTorch, eager and compiled.

  Raises `FlaxLMError` if a side fails, or if their losses disagree.
  """
  results = []
  for name, case in CASES[options.size].items():
    names = ["flaxlm", *PEERS.get(options.peer or "", ())]
    sides: dict[str, list[dict[str, Any]]] = {side: [] for side in names}
    with tempfile.TemporaryDirectory() as folder:
      inputs = Path(folder) / "inputs.npz"
      write_inputs(case, inputs)
      most = MAX_ROUNDS if options.peer else MAX_ROUNDS_ALONE
      for number in range(min(most, options.rounds)):
        order = list(sides) if number % 2 == 0 else list(reversed(sides))
        for side in order:
          sides[side].append(run_side(side, name, inputs))
    results += summarise_sides(name, case, sides)
  return results


def summarise_sides(
  name: str, case: Case, sides: dict[str, list[dict[str, Any]]]
) -> list[Result]:
  """One result without peers, else one for each peer."""
  seconds = {side: [case.tokens / run["rate"] for run in sides[side]] for side in sides}
  losses = {side: runs[0]["losses"] for side, runs in sides.items()}
  ours = sides["flaxlm"]
  gate, demand = check_losses(losses["flaxlm"]), training_demand(case, ours[0]["devices"])
  rates = [run["rate"] for run in ours]
  result = summarise("train", name, rates, "tokens/s", gate, demand)
  result.first_seconds = statistics.median(run["first_seconds"] for run in ours)
  result.seconds = case.tokens / result.median
  compared = []
  for peer in [side for side in sides if side != "flaxlm"]:
    tolerance = LOSS_TOLERANCES[case.dtype]
    gate = compare_losses(losses["flaxlm"], losses[peer], tolerance)
    compared.append(with_ratio(result, peer, seconds["flaxlm"], seconds[peer], gate))
  return compared or [result]


def training_demand(case: Case, num_devices: int = 1) -> Demand:
  """Of one step on one device: strict FLOPs, and the bytes that the planner counts."""
  cfg = ResolvedConfig(
    model=case.model,
    data=DataConfig(seq_len=case.model.context, batch_size=case.batch_size),
    optimizer=OPTIMIZER,
    training=TrainingConfig(dtype=case.dtype),
  )
  return step_demand(cfg, num_devices)


def step_demand(cfg: ResolvedConfig, num_devices: int = 1) -> Demand:
  """Of one step of a config on one device."""
  sizes = mesh_shape({})
  cfg, _ = with_path(cfg, sizes, this_device() or ANY)
  num_bytes = sum(traffic_parts(cfg, sizes).values())
  flops = step_cost(cfg).strict_flops
  return Demand(flops / num_devices, num_bytes / num_devices, cfg.training.dtype)


def check_losses(losses: list[float]) -> str:
  """Without a peer the losses must at least be finite."""
  if not np.isfinite(losses).all():
    raise wrong_result(f"the losses are {losses}")
  return f"losses of {len(losses)} steps are finite: {losses[0]:.3f} to {losses[-1]:.3f}"


def compare_losses(
  ours: list[float], theirs: list[float], tolerance: float = LOSS_TOLERANCES["float32"]
) -> str:
  error = float(np.max(np.abs(np.subtract(ours, theirs)) / np.abs(theirs)))
  return within(f"losses of {len(ours)} steps agree", error, tolerance)


def run_side(side: str, case: str, inputs: Path) -> dict[str, Any]:
  """One side's rate and first losses, from a process of its own that runs `main`."""
  module = "flaxlm.benchmark.suites.train"
  output = run_python("-m", module, side, case, str(inputs))
  return json.loads(output.splitlines()[-1])


def write_inputs(case: Case, path: Path) -> None:
  """Writes initial parameters, by their names in our tree, and windows of tokens."""
  rng = np.random.default_rng(0)
  shapes = abstract_params(build_model(case.model), make_mesh({"data": -1}))
  arrays = {}
  for place, leaf in jax.tree.leaves_with_path(shapes):
    name = name_of(place)
    mean = 1.0 if name.endswith("scale") else 0.0
    arrays[name] = np.asarray(rng.normal(mean, 0.02, leaf.shape), np.float32)
  shape = (CHECKED_STEPS, case.batch_size, case.model.context + 1)
  windows = rng.integers(1, case.model.vocab_size, shape)
  np.savez(path, allow_pickle=False, windows=windows, **arrays)


def name_of(path: Any) -> str:
  """A parameter's name in the file of inputs, like blocks/attention/q/kernel."""
  return "/".join(part.key for part in path)


# -- In that process -----------------------------------------------------------------------


def main() -> None:
  side, name, path = sys.argv[1:]
  case, inputs = find_case(name), dict(np.load(path, allow_pickle=False))
  if side == "flaxlm":
    print(json.dumps(flaxlm_side(case, inputs)))
  else:
    from flaxlm.benchmark.peers.torch_training import torch_side

    print(json.dumps(torch_side(case, inputs, compiled=side == "torch compiled")))


def flaxlm_side(case: Case, inputs: dict[str, np.ndarray]) -> dict[str, Any]:
  """The same train step, batches and mesh as `flaxlm train`."""
  start_jax()
  mesh = make_mesh({"data": -1})
  training = TrainingConfig(dtype=case.dtype)
  model = build_model(case.model, training, fused_kernel())
  optimizer = build_optimizer(OPTIMIZER, num_steps=1)
  state = init_state(model, optimizer, mesh, seed=0)
  given = lambda path, x: jax.device_put(inputs[name_of(path)], x.sharding)
  state = state._replace(params=jax.tree.map_with_path(given, state.params))
  train_step = jit_train_step(model, optimizer, training, mesh)
  seed = jax.numpy.uint32(0)
  lengths_B = np.full(case.batch_size, case.model.context + 1)

  def step(window: np.ndarray) -> jax.Array:
    nonlocal state
    windows = Windows(window, window == 0, lengths_B)
    batch = put_batch(next_token(windows, end_id=0), mesh)
    state, metrics = train_step(state, batch, seed)
    return metrics["loss"]

  found = time_steps(case, inputs["windows"], step, jax.block_until_ready)
  return found | {"devices": mesh.size}


if __name__ == "__main__":
  main()
