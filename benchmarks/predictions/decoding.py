# SPDX-License-Identifier: Apache-2.0
"""Predicts a decoded token from its parts: reading weights, attention, operations.

Each part is timed in a loop, as a decoding step runs it, because a single call costs 10 us
on a CPU, and on a GPU more than a matrix product takes.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from benchmarks.predictions.comparison import compare, part_side, unmeasured_device
from benchmarks.predictions.models import for_decoding
from flaxlm.benchmark.measure import BenchOptions, Side, measure
from flaxlm.benchmark.report import Result
from flaxlm.benchmark.suites.decode import answer_sides, random_model, random_request
from flaxlm.config import ResolvedConfig, ResolvedModel, mesh_shape
from flaxlm.devices import Device
from flaxlm.nn.kernels.cached import attend_cached
from flaxlm.nn.kernels.products import matrix_dot
from flaxlm.nn.masks import Scoring, Sight
from flaxlm.planning.decoding import plan_decoding, read_parameters
from flaxlm.planning.memory import kv_cache_bytes
from flaxlm.planning.products import weight_products

PROMPT, MAX_NEW = 32, 65
STEPS = 16  # of a loop
OPERATIONS = 32  # pairs of operations in a step
WEIGHT_READS = 4  # of all weights, in a loop
MIN_SECONDS = 1e-9
ONE_DEVICE = mesh_shape({})


def predict_decoding(name: str, cfg: ResolvedConfig, options: BenchOptions) -> list[Result]:
  """Predicted / measured time per token of greedy decoding of one row, without prefill."""
  cfg = for_decoding(cfg)
  new = min(MAX_NEW, cfg.model.context - PROMPT)
  slots = 1 << (PROMPT + new - 1).bit_length()  # the cache grows by powers of two
  on_cpu = jax.default_backend() == "cpu"
  operation, num_operations = operation_side(cfg)
  model, params = random_model(cfg)
  request = random_request(cfg, 1, PROMPT, new)
  sides = {
    "weights": part_side(read_weights, weight_matrices(cfg)),
    "operation": operation,
    "decode": answer_sides(model, params, request)["steps"],
  }
  if on_cpu:
    attention = functools.partial(attend_repeatedly, cfg.model)
    sides["attention"] = part_side(attention, *query_and_cache(cfg, slots))
  timings = measure(sides, options)
  per_call = {"weights": WEIGHT_READS, "operation": num_operations, "decode": new - 1}
  seconds = {
    name: [round_seconds / per_call.get(name, STEPS) for round_seconds in timing.rounds]
    for name, timing in timings.items()
  }
  predict = lambda device: plan_decoding(cfg, ONE_DEVICE, device, 1, slots).seconds
  predicted = [
    predict(measured_device(cfg, slots, {part: s[number] for part, s in seconds.items()}))
    for number in range(options.rounds)
  ]
  median = lambda part: timings[part].median / per_call.get(part, STEPS)
  parts = {"weights": median("weights"), "an operation": median("operation")}
  if on_cpu:
    parts["attention"] = cfg.model.depth * median("attention")
  token = dataclasses.replace(timings["decode"], rounds=seconds["decode"])
  return compare(f"decode {name}", predicted, token, parts, predict)


def measured_device(
  cfg: ResolvedConfig, slots: int, seconds: Mapping[str, float]
) -> Device:
  """A device with the rates of one round; `seconds` has the time of each part, once."""
  dtype = cfg.training.dtype
  item_size = jnp.dtype(dtype).itemsize
  reading, rates = seconds["weights"], {}
  if "attention" in seconds:
    cache_bytes = kv_cache_bytes(cfg.model, 1, slots, item_size) / cfg.model.depth
    rates["cache"] = cache_bytes / seconds["attention"]
  else:
    # The planner counts a GPU's products, and attention, among the operations.
    num_matrices = sum(weight_products(cfg.model, 1).values())
    reading = max(reading - num_matrices * seconds["operation"], MIN_SECONDS)
  return dataclasses.replace(
    unmeasured_device(),
    peak_flops={dtype: math.inf},
    pass_bandwidths=rates,
    operation_seconds=seconds["operation"],
    memory_bandwidth=read_parameters(cfg, 1) * item_size / reading,
  )


# -- What is timed -------------------------------------------------------------------------


def weight_matrices(cfg: ResolvedConfig) -> list[jax.Array]:
  """One matrix (outputs, inputs) for each that a decoding step reads."""
  products = weight_products(cfg.model, 1)
  shapes = [(p.columns, p.inner) for p, count in products.items() for _ in range(count)]
  return [jnp.ones(shape, cfg.training.dtype) for shape in shapes]


def read_weights(matrices: list[jax.Array]) -> jax.Array:
  """Each matrix times a vector that depends on the previous product, in a loop.

  A GPU replays such a loop as one graph.
  """

  def read(seen: jax.Array, _: None) -> tuple[jax.Array, None]:
    for matrix in matrices:
      vector = jnp.full((1, matrix.shape[1]), 1e-30 * seen, matrix.dtype)
      seen = matrix_dot(vector, {"matrix": matrix})[0, 0]
    return seen, None

  return jax.lax.scan(read, jnp.float32(0.0), length=WEIGHT_READS)[0]


def query_and_cache(cfg: ResolvedConfig, slots: int) -> tuple[jax.Array, ...]:
  """A query, and a layer's keys, values and mask."""
  model, dtype = cfg.model, cfg.training.dtype
  kv_1KSH = jnp.ones((1, model.num_kv_heads, slots, model.head_dim), dtype)
  q_11NH = jnp.ones((1, 1, model.num_heads, model.head_dim), dtype)
  return q_11NH, kv_1KSH, kv_1KSH, jnp.ones((1, 1, slots), bool)


def attend_repeatedly(
  model: ResolvedModel,
  q_11NH: jax.Array,
  k_1KSH: jax.Array,
  v_1KSH: jax.Array,
  mask_11S: jax.Array,
) -> jax.Array:
  """Attention over a cache, in which the output of one step is the query of the next."""
  scoring = Scoring(model.attention_scale or 1.0)

  def step(q_11NH: jax.Array, _: None) -> tuple[jax.Array, None]:
    return attend_cached(q_11NH, k_1KSH, v_1KSH, Sight(mask_11S), scoring), None

  return jax.lax.scan(step, q_11NH, length=STEPS)[0]


def operation_side(cfg: ResolvedConfig) -> tuple[Side, int]:
  """A chain of tiny operations, and how many kernels XLA makes of it."""
  x_1D = jnp.ones((1, cfg.model.width), cfg.training.dtype)
  compiled = jax.jit(operation_chain).lower(x_1D).compile()
  num_kernels = STEPS * max(1, (compiled.as_text() or "").count(" fusion("))
  return Side(compiled, lambda: (x_1D,), queued=True), num_kernels


def operation_chain(x_1D: jax.Array) -> jax.Array:
  """Sums with arithmetic between them, each dependent on the one before.

  The loop's body has as many as a decoding step, because XLA runs a short body faster. The
  barriers keep a GPU's compiler from merging them into one kernel.
  """

  def body(x_1D: jax.Array, _: None) -> tuple[jax.Array, None]:
    for _number in range(OPERATIONS):
      total = jax.lax.optimization_barrier(x_1D.sum())
      x_1D = jax.lax.optimization_barrier(x_1D * 0.5 + total)
    return x_1D, None

  return jax.lax.scan(body, x_1D, length=STEPS)[0]
