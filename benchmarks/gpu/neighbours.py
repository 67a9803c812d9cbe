# SPDX-License-Identifier: Apache-2.0
"""What stands between a layer's products, alone: the residual sum with its norm, and the
activation, each forward and backward.

The bytes are those that one kernel would read and write, so the fraction of the measured
limit says how far XLA's kernels are from passes over memory. The gradients of norms stand
beside those that JAX derives.
"""

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.cases import TrainCase, train_cases
from flaxlm.benchmark.measure import BenchOptions, Side, agree, measure, timed
from flaxlm.benchmark.report import Demand, Result, as_json, with_ratio
from flaxlm.benchmark.suites.attention import TOLERANCES
from flaxlm.nn.kernels.fusion import activated, normalise, normalised
from flaxlm.platform import start_jax

DERIVED = "derived by JAX"


class Neighbour(NamedTuple):
  """`call(*arrays, *params)`; `derived` is the same by JAX's own gradients."""

  call: Callable[..., Any]
  arrays: int  # operands of tokens x `width`
  width: int
  outputs: int  # of the same size
  params: tuple[jax.Array, ...] = ()
  derived: Callable[..., Any] | None = None


def main() -> None:
  """`OUTPUT SMOKE`: appends a line for each figure."""
  output, smoke = sys.argv[1:]
  start_jax()
  options = BenchOptions(rounds=1 if int(smoke) else 5)
  for name, case in train_cases(bool(int(smoke))).items():
    for result in bench_case(name, case, options):
      with Path(output).open("a", encoding="utf-8") as out:
        print(as_json(result), file=out, flush=True)


def bench_case(name: str, case: TrainCase, options: BenchOptions) -> Iterator[Result]:
  """Milliseconds of each neighbour in one layer. Raises `FlaxLMError` if one is wrong."""
  data, dtype = case.cfg.data, case.cfg.training.dtype
  rng = np.random.default_rng(0)
  for what, one in neighbours(case).items():
    shape = (data.batch_size, data.seq_len, one.width)
    drawn = rng.standard_normal((one.arrays, *shape), np.float32)
    operands = (*(jnp.asarray(x, dtype) for x in drawn), *one.params)
    calls = {"flaxlm": one.call} | ({DERIVED: one.derived} if one.derived else {})
    sides = {
      side: Side(jax.jit(call), functools.partial(tuple, operands), queued=True)
      for side, call in calls.items()
    }
    timings = measure(sides, options)
    timing = timings["flaxlm"]
    wide = (jnp.asarray(x, jnp.float32) for x in operands)
    pairs = zip(timing.result, jax.jit(one.call)(*wide), strict=True)
    gate = "; ".join(
      agree(f"result {number}", ours, exact, TOLERANCES[dtype])
      for number, (ours, exact) in enumerate(pairs)
    )
    total = float((one.arrays + one.outputs) * operands[0].nbytes)
    text = f"{name} {what} {'x'.join(map(str, shape))} {dtype}"
    demand = Demand(0.0, total, dtype, footprint=total)
    result = timed("neighbours", text, timing, "ms", gate, demand=demand)
    if one.derived:
      their = timings[DERIVED].rounds
      result = with_ratio(result, DERIVED, timing.rounds, their, gate)
    yield result


def neighbours(case: TrainCase) -> Mapping[str, Neighbour]:
  """By name, those of a layer."""
  model, D = case.cfg.model, case.cfg.model.width
  centred = model.norm == "layernorm"
  how = (centred, model.norm_epsilon)
  params = (jnp.ones(D), jnp.zeros(D)) if centred and model.norm_biased else (jnp.ones(D),)
  norm = functools.partial(normalised, *how)

  @jax.checkpoint
  def derived(s_BTD: jax.Array, scale_D: jax.Array, bias_D: Any = None) -> jax.Array:
    return normalise(*how, s_BTD, scale_D, bias_D)

  def activate(h_BTF: jax.Array, gate_BTF: jax.Array | None = None) -> jax.Array:
    return activated(model.activation, h_BTF, gate_BTF)

  F, inputs = model.ffn_width, 2 if model.gated else 1
  backward = functools.partial(norm_gradients, norm)
  by_jax = functools.partial(norm_gradients, derived)
  return {
    "sum and norm": Neighbour(functools.partial(sum_and_norm, norm), 2, D, 2, params),
    "sum and norm backward": Neighbour(backward, 3, D, 1, params, by_jax),
    "activation": Neighbour(lambda *hs: (activate(*hs),), inputs, F, 1),
    "activation backward": Neighbour(
      lambda grad, *hs: jax.vjp(activate, *hs)[1](grad), inputs + 1, F, inputs
    ),
  }


def sum_and_norm(
  norm: Callable[..., jax.Array], x_BTD: jax.Array, y_BTD: jax.Array, *params: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """As in nn/block.py: the new residual stream, and the next branch's input."""
  s_BTD = x_BTD + y_BTD
  return s_BTD, norm(s_BTD, *params)


def norm_gradients(
  norm: Callable[..., jax.Array],
  s_BTD: jax.Array,
  grad_s_BTD: jax.Array,
  grad_h_BTD: jax.Array,
  *params: jax.Array,
) -> tuple[jax.Array, ...]:
  """Of both that were added, from those of both results, and of the norm's parameters."""
  grad_BTD, *of_params = jax.vjp(norm, s_BTD, *params)[1](grad_h_BTD)
  return grad_s_BTD + grad_BTD, *of_params


if __name__ == "__main__":
  main()
