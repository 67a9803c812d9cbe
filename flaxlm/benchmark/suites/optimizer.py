# SPDX-License-Identifier: Apache-2.0
"""The optimizer's update alone: gradients and state in, new parameters and state out.

Every rule reads gradients and parameters, writes parameters, and reads and writes its
moments. Muon's Newton-Schulz iterations are counted as FLOPs on top.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flaxlm.benchmark.measure import BenchOptions, Side, measure_alone, timed, wrong_result
from flaxlm.benchmark.report import Demand, Result
from flaxlm.config import OptimizerConfig
from flaxlm.planning.products import NEWTON_SCHULZ_STEPS
from flaxlm.training.optimizer import build_optimizer

# Arrays of the parameters' size in the optimizer's state.
MOMENTS = {"adamw": 2, "lion": 1, "sgd": 1, "muon": 1}


def bench_optimizer(options: BenchOptions) -> list[Result]:
  """Milliseconds of an update by rule, on the kernels of a transformer's blocks."""
  depth, width = options.pick((1, 8), (4, 384), (12, 2048))
  results = []
  for kind in MOMENTS:
    params = make_params(depth, width)
    optimizer = build_optimizer(
      OptimizerConfig(kind=kind, schedule="constant", warmup_steps=0, weight_decay=0.0),  # type: ignore[arg-type]
      num_steps=1,
    )
    # The gradient is that of |p|^2 / 2, which is p, so that every rule must shorten p.
    update = jax.jit(functools.partial(apply_update, optimizer), donate_argnums=(0, 1))
    state = jax.jit(optimizer.init)(params)
    side = Side(update, functools.partial(copied, params, state))
    timing = measure_alone(side, options)
    gate = shortens(kind, params, timing.result[0])
    count = sum(x.size for x in jax.tree.leaves(params))
    total = 4.0 * count * (3 + 2 * MOMENTS[kind])
    footprint = 4.0 * count * (2 + MOMENTS[kind])
    flops = muon_flops(params) if kind == "muon" else 0.0
    demand = Demand(flops, total, footprint=footprint)
    case = f"{kind} {count / 1e6:.3g}M parameters"
    results.append(timed("optimizer", case, timing, "ms", gate, demand=demand))
  return results


def apply_update(optimizer: Any, params: Any, state: Any, gradient: Any) -> tuple[Any, Any]:
  updates, state = optimizer.update(gradient, state, params)
  return optax.apply_updates(params, updates), state


@jax.jit
def copied(params: Any, state: Any) -> tuple[Any, Any, Any]:
  """The arguments of an update, copied because it overwrites them; the gradient is p."""
  copy = lambda tree: jax.tree.map(jnp.copy, tree)
  return copy(params), copy(state), copy(params)


def make_params(depth: int, width: int) -> Any:
  """The kernels of `depth` blocks, with the model's names."""
  rng = np.random.default_rng(0)
  D, F, N = width, 4 * width, 4
  array = lambda *shape: jnp.asarray(0.1 * rng.standard_normal(shape, np.float32))
  heads = {name: {"kernel": array(depth, D, N, D // N)} for name in "qkv"}
  return {
    "blocks": {
      "attention": {**heads, "o": {"kernel": array(depth, N, D // N, D)}},
      "ffn": {"up": {"kernel": array(depth, D, F)}, "down": {"kernel": array(depth, F, D)}},
    }
  }


def muon_flops(params: Any) -> float:
  """Each Newton-Schulz step on (n, m), n <= m: X X^T, its square, and their sum times X."""
  flops = 0.0
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    depth, *dims = leaf.shape
    rows = dims[0] * dims[1] if path[-2].key == "o" else dims[0]
    n, m = sorted((rows, leaf.size // depth // rows))
    flops += depth * NEWTON_SCHULZ_STEPS * (2.0 * n * n * m * 2 + 2.0 * n**3)
  return flops


def shortens(kind: str, before: Any, after: Any) -> str:
  """Checks that the update made the parameters shorter, which also means finite."""
  old, new = (float(optax.tree.norm(tree)) for tree in (before, after))
  if not new < old:
    raise wrong_result(f"{kind} took |p| from {old} to {new}")
  return f"a step down |p|^2 took |p| from {old:.4f} to {new:.4f}"
