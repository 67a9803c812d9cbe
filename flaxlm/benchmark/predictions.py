# SPDX-License-Identifier: Apache-2.0
"""The planner against the clock: step times that `planning.roofline` predicts from ceilings
of this run, for five small models, training and decoding one row.

A `Device` is built from what this machine reaches at the shapes at hand: every matrix
product of the model, alone; norms, activations and softmax, forward and backward; the
cross-entropy; an update; for decoding all matrices one after the other, attention over a
cache, an operation that does nothing. Then the planner's formulas say how long a step
takes, and the step itself is timed in the same rounds. Nothing is fitted, and no model has
a factor of its own.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh

from flaxlm.benchmark.attention import Shape, operands, with_gradients
from flaxlm.benchmark.ceilings import this_device
from flaxlm.benchmark.decode import random_model, random_request
from flaxlm.benchmark.matmul import multiply
from flaxlm.benchmark.measure import Setting, Side, Timing, measure
from flaxlm.benchmark.report import Result, summarise
from flaxlm.config import (
  MESH_AXES,
  DataConfig,
  ModelConfig,
  OptimizerConfig,
  ResolvedConfig,
  ResolvedModel,
  TrainingConfig,
  mesh_shape,
)
from flaxlm.data.objectives import next_token
from flaxlm.decoding.generate import generate
from flaxlm.decoding.sampling import make_sampling
from flaxlm.decoding.weights import prepare_params
from flaxlm.errors import FlaxLMError
from flaxlm.nn.attention import (
  Placement,
  Reach,
  Scoring,
  Sight,
  attend_cached,
  attend_cudnn,
  visible,
)
from flaxlm.nn.layers import activate, build_norm, matrix_dot
from flaxlm.nn.models import build_model
from flaxlm.planning.cost import forward_work
from flaxlm.planning.devices import ANY, Device
from flaxlm.planning.memory import (
  StateBytes,
  kv_cache_bytes,
  residual_bytes,
  state_bytes,
)
from flaxlm.planning.products import (
  Product,
  training_products,
  weight_products,
)
from flaxlm.planning.roofline import (
  LOGIT_PASSES,
  PASSES,
  plan_decoding,
  plan_training,
  read_parameters,
  traffic_parts,
  with_path,
)
from flaxlm.platform import kernel_head_dim
from flaxlm.training.losses import cross_entropy
from flaxlm.training.optimizer import build_optimizer
from flaxlm.training.step import compile_train_step, init_state, put_batch

PROMPT, NEW = 32, 65  # at most
CHAIN, STEPS = 32, 16  # pairs of operations of a step, steps of a block
READS = 4  # of all weights, in a loop
SHORTEST = 1e-9  # seconds
ROUND_SECONDS = 0.05  # there are some thirty figures a model


def models(setting: Setting) -> dict[str, ResolvedConfig]:
  """Five shapes, no two alike: width, depth, heads, vocabulary, rows."""
  if setting.size == "tiny":
    return {"tiny": gpt(1, 16, 2, context=48, vocab_size=64, batch_size=2)}
  if setting.size == "large":
    run = TrainingConfig(dtype="bfloat16")
    return {
      "gpt2 12x768": gpt(
        12, 768, 12, context=1024, vocab_size=50_304, batch_size=16, training=run
      ),
      "llama 16x2048": shape(
        16,
        2048,
        16,
        num_kv_heads=8,
        context=2048,
        vocab_size=32_000,
        batch_size=4,
        training=run,
      ),
    }
  muon = OptimizerConfig(kind="muon", learning_rate=1e-2)
  llama = functools.partial(shape, num_kv_heads=2)
  found = {
    "nanogpt 4x128": gpt(4, 128, 4, context=128, vocab_size=256, batch_size=8),
    "stdlib_tiny 4x128": shape(4, 128, 4, context=256, vocab_size=4096, batch_size=8),
    "wide 2x768": gpt(2, 768, 12, context=128, vocab_size=8192, batch_size=4),
    "llama 4x384": llama(4, 384, 6, context=256, vocab_size=4096, batch_size=4),
    "deep 16x96": shape(16, 96, 3, context=128, vocab_size=512, batch_size=8),
  }
  found["stdlib_tiny 4x128"] = dataclasses.replace(
    found["stdlib_tiny 4x128"], optimizer=muon
  )
  return found


def shape(
  depth: int,
  width: int,
  heads: int,
  *,
  vocab_size: int,
  batch_size: int,
  training: TrainingConfig = TrainingConfig(),  # noqa: B008 - frozen
  **model: Any,
) -> ResolvedConfig:
  """A LLaMA-like one, rows as long as its context."""
  resolved = ModelConfig(
    depth=depth, width=width, num_heads=heads, vocab_size=vocab_size, **model
  ).resolve()
  data = DataConfig(seq_len=resolved.context, batch_size=batch_size)
  return ResolvedConfig(model=resolved, data=data, training=training)


gpt = functools.partial(
  shape, positions="learned", norm="layernorm", activation="gelu", gated=False
)


def bench_predictions(setting: Setting) -> list[Result]:
  """Predicted / measured time of each model's training step, and of a decoded token."""
  short = dataclasses.replace(
    setting,
    round_seconds=min(ROUND_SECONDS, setting.round_seconds),
  )
  results = []
  for name, cfg in models(setting).items():
    results += predict_training(name, cfg, short)
    results += predict_decoding(name, cfg, short)
  return results


# -- Training ------------------------------------------------------------------------------


def predict_training(name: str, cfg: ResolvedConfig, setting: Setting) -> list[Result]:
  sizes = mesh_shape({})
  cfg, path = with_path(cfg, sizes, here())
  dtype = cfg.training.dtype
  products = training_products(cfg)
  passes = traffic_pieces(cfg)
  pieces = {part: side for part, (side, _) in passes.items()}
  if path is not None and path.name == "cudnn":
    pieces["attention"] = attention_side(cfg)
  sides = {**product_sides(products, dtype), **pieces, "step": training_side(cfg)}
  timings: dict[Any, Timing] = measure(sides, setting)
  loss = float(timings["step"].result[0])
  if not np.isfinite(loss):
    raise FlaxLMError(f"a speed without a result: the loss of {name} is {loss}")
  plans = []
  for number in range(setting.rounds):
    rates = {
      product: product.flops / timings[product].rounds[number] for product in products
    }
    device = dataclasses.replace(
      here(), peak_flops={dtype: max(rates.values())}, product_rates=rates
    )
    bandwidths = {
      part: num_bytes / timings[part].rounds[number]
      for part, (_, num_bytes) in passes.items()
    }
    device = dataclasses.replace(
      device, pass_bandwidths=bandwidths, memory_bandwidth=bandwidths["update"]
    )
    if "attention" in pieces:
      work = forward_work(cfg.model, cfg.data.batch_size, cfg.data.seq_len)
      whole = cfg.model.depth * timings["attention"].rounds[number]
      device = dataclasses.replace(device, attention_rate=3 * work.attention / whole)
    plans.append(plan_training(cfg, sizes, device))
  predicted = [plan.times.seconds for plan in plans]
  attention = timings["attention"].median if "attention" in pieces else 0.0
  parts = {"attention": cfg.model.depth * attention}
  parts["products"] = (plans[-1].times.compute or 0.0) - parts["attention"]
  parts |= {
    part: num_bytes / (device.pass_bandwidths.get(part) or bandwidths["update"])
    for part, num_bytes in traffic_parts(cfg, sizes, state_of(cfg)).items()
  }
  listed = [f"{part} {1e3 * seconds:.3g}" for part, seconds in parts.items() if seconds]
  note = f"the last round's: {', '.join(listed)}"
  results = [ratio(f"train {name}", predicted, timings["step"], note)]
  predict = lambda sheet: plan_training(cfg, sizes, sheet).times.seconds
  return [*results, *by_data_sheet(f"train {name}", predict, timings["step"])]


def state_of(cfg: ResolvedConfig) -> StateBytes:
  return state_bytes(cfg.model, cfg.training, cfg.optimizer, mesh_shape({}))


def here() -> Device:
  """What is known of this device without measuring."""
  kind: Any = jax.default_backend()
  return dataclasses.replace(ANY, kind=kind, kernel_head_dim=kernel_head_dim())


def product_sides(products: Mapping[Product, int], dtype: str) -> dict[Any, Side]:
  """Each product alone, on numbers of its own."""
  sides: dict[Any, Side] = {}
  for product in products:
    M, K, N, G = product
    lead = (G,) if G > 1 else ()
    operands = jnp.ones((*lead, M, K), dtype), jnp.ones((*lead, K, N), dtype)
    sides[product] = Side(jax.jit(multiply), functools.partial(tuple, operands), True)
  return sides


def traffic_pieces(cfg: ResolvedConfig) -> dict[str, tuple[Side, float]]:
  """By part of a step's traffic: something that does nothing else, and its bytes as the
  planner counts them."""
  model, R = cfg.model, cfg.data.batch_size * cfg.data.seq_len
  assert model.vocab_size and model.ffn_width
  blocks, ids, dtype = block_passes(model), jnp.zeros(R, jnp.int32), cfg.training.dtype
  scores = (cfg.data.batch_size, model.num_heads, cfg.data.seq_len, cfg.data.seq_len // 2)
  if cfg.training.attention == "cudnn":  # which keeps none
    scores = (0, 0, 0, 1)
  inputs = (
    jnp.ones((R, model.width), dtype),
    jnp.ones((R, model.ffn_width), dtype),
    jnp.ones(scores),
  )
  activations = PASSES * residual_bytes(blocks, inputs)
  logits = jnp.ones((R, model.vocab_size))
  loss = jax.value_and_grad(lambda x: cross_entropy(x, ids).mean())
  # The rule's own sums; Muon's matrix products are counted as such.
  rule = OptimizerConfig(kind="adamw", warmup_steps=0)
  optimizer = build_optimizer(rule, 1000)
  mesh = one_device()
  state = init_state(build_model(model), optimizer, mesh, seed=0)

  def update(state: Any, gradient: Any) -> Any:
    updates, new = optimizer.update(gradient, state.opt_state, state.params)
    return optax.apply_updates(state.params, updates), new

  adamw = dataclasses.replace(cfg, optimizer=rule)
  update_bytes = traffic_parts(adamw, mesh_shape({}), state_of(adamw))["update"]
  return {
    "activations": (piece(with_gradient(blocks), inputs), activations),
    "logits": (piece(loss, (logits,)), LOGIT_PASSES * logits.nbytes),
    "update": (piece(update, (state, state.params)), update_bytes),
  }


def piece(function: Callable, arguments: tuple) -> Side:
  """Part of a larger program, with arguments of its own."""
  return Side(jax.jit(function), lambda: arguments, queued=True)


def attention_side(cfg: ResolvedConfig) -> Side:
  """One layer's attention over whole rows, forward and backward, as the step has it."""
  model, data = cfg.model, cfg.data
  assert model.num_kv_heads and model.head_dim and model.attention_scale
  shape = Shape(
    data.batch_size, data.seq_len, model.num_heads, model.num_kv_heads, model.head_dim
  )
  slots_BT = jnp.broadcast_to(jnp.arange(shape.T), (shape.B, shape.T))
  segments_BT = jnp.ones_like(slots_BT)
  sight = Sight(visible(Placement(slots_BT, segments_BT, segments_BT), shape.T))
  scoring = Scoring(model.attention_scale)
  path = lambda q, k, v: attend_cudnn(q, k, v, sight, scoring, Reach())
  arrays = tuple(operands(shape, cfg.training.dtype))
  return piece(functools.partial(with_gradients, path), arrays)


def block_passes(cfg: ResolvedModel) -> Callable:
  """What a block does between its products: a norm, an activation, a softmax."""
  norm = build_norm(cfg)
  variables = nn.unbox(norm.init(jax.random.key(0), jnp.ones((1, cfg.width))))

  def passes(inputs: tuple) -> tuple:
    x_RD, h_RF, scores = inputs
    out = activate(h_RF, cfg.activation) * (h_RF if cfg.gated else 1.0)
    exp = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    return norm.apply(variables, x_RD), out, (exp, exp.sum(-1))

  return passes


def with_gradient(function: Callable) -> Callable:
  def run(*inputs: Any) -> Any:
    out, pull = jax.vjp(function, inputs)
    return out, pull(out)

  return run


def training_side(cfg: ResolvedConfig) -> Side:
  """The step of `flaxlm train`, on one batch over and over; it returns the loss, and the
  state to wait for."""
  mesh = one_device()
  model = build_model(cfg.model, cfg.training, kernel_head_dim())
  optimizer = build_optimizer(cfg.optimizer, cfg.training.num_steps)
  step = compile_train_step(model, optimizer, cfg.training, mesh)
  B, T = cfg.data.batch_size, cfg.data.seq_len
  assert cfg.model.vocab_size
  window = np.random.default_rng(0).integers(1, cfg.model.vocab_size, (B, T + 1))
  batch = put_batch(next_token(window, np.full(B, T + 1), bos_id=0), mesh)
  state, seed = init_state(model, optimizer, mesh, seed=0), jnp.uint32(0)

  def call() -> tuple[jax.Array, Any]:
    nonlocal state
    state, metrics = step(state, batch, seed)
    return metrics["loss"], state

  return Side(call, queued=True)


# -- Decoding ------------------------------------------------------------------------------


def predict_decoding(name: str, cfg: ResolvedConfig, setting: Setting) -> list[Result]:
  """Of one row, greedily, the prompt apart. What is timed alone is timed as a step has it,
  in a loop: a call of its own costs a CPU 10 us, and a GPU more than a product takes.
  """
  cfg, dtype = for_decoding(cfg), cfg.training.dtype
  model, params = random_model(cfg)
  params = prepare_params(params, cfg.model)
  new = min(NEW, cfg.model.context - PROMPT)
  request = random_request(cfg, 1, PROMPT, new)
  greedy = make_sampling(1, temperature=0.0)
  slots = 1 << (PROMPT + new - 1).bit_length()  # the cache has room for whole buckets

  def started() -> tuple[Any, Callable[[], list]]:
    answer = generate(model, params, request, greedy)
    return next(answer), lambda: list(answer)

  weights = weight_arrays(cfg)
  x_1D = jnp.ones((1, cfg.model.width), dtype)
  compiled = jax.jit(chain).lower(x_1D).compile()
  num_kernels = STEPS * max(1, (compiled.as_text() or "").count(" fusion("))
  sides = {
    "stream": piece(stream, (weights,)),
    "operation": Side(compiled, lambda: (x_1D,), queued=True),
    "decode": Side(lambda _, rest: rest(), started),
  }
  on_cpu = jax.default_backend() == "cpu"
  if on_cpu:
    sides["cache"] = piece(functools.partial(look_back, cfg.model), cached(cfg, slots))
  timings: dict[Any, Timing] = measure(sides, setting)
  item = jnp.dtype(dtype).itemsize
  num_bytes = read_parameters(cfg, 1) * item
  cache_bytes = kv_cache_bytes(cfg.model, 1, slots, item) / cfg.model.depth
  predicted = []
  for number in range(setting.rounds):
    operation = timings["operation"].rounds[number] / num_kernels
    reading, rates = timings["stream"].rounds[number] / READS, {}
    if on_cpu:
      rates["cache"] = STEPS * cache_bytes / timings["cache"].rounds[number]
    else:  # the planner counts a GPU's products, and attention, among the operations
      reading = max(reading - len(weights) * operation, SHORTEST)
    device = dataclasses.replace(
      here(),
      peak_flops={dtype: math.inf},
      pass_bandwidths=rates,
      operation_seconds=operation,
      memory_bandwidth=num_bytes / reading,
    )
    predicted.append(plan_decoding(cfg, mesh_shape({}), device, 1, slots).seconds)
  token = timings["decode"]
  per_token = [seconds / (new - 1) for seconds in token.rounds]
  token = dataclasses.replace(token, rounds=per_token)
  parts = {
    "weights": timings["stream"].median / READS,
    "an operation": timings["operation"].median / num_kernels,
  }
  if on_cpu:
    parts["attention"] = cfg.model.depth * timings["cache"].median / STEPS
  note = ", ".join(f"{part} {1e3 * seconds:.3g}" for part, seconds in parts.items())
  results = [ratio(f"decode {name}", predicted, token, note)]
  predict = lambda sheet: plan_decoding(cfg, mesh_shape({}), sheet, 1, slots).seconds
  return [*results, *by_data_sheet(f"decode {name}", predict, token)]


def for_decoding(cfg: ResolvedConfig) -> ResolvedConfig:
  """With parameters as wide as the computation."""
  dtype = cfg.training.dtype
  return dataclasses.replace(cfg, training=TrainingConfig(dtype=dtype, param_dtype=dtype))


def weight_arrays(cfg: ResolvedConfig) -> list[jax.Array]:
  """One of each matrix (outputs, inputs) that a decoding step reads."""
  products = weight_products(cfg.model, 1)
  shapes = [(p.columns, p.inner) for p, count in products.items() for _ in range(count)]
  return [jnp.ones(shape, cfg.training.dtype) for shape in shapes]


def stream(weights: list[jax.Array]) -> jax.Array:
  """Each matrix times a vector, one after the other: each waits for the one before. In a
  loop, as decoding has it, which a GPU replays as one graph."""

  def read(seen: jax.Array, _: None) -> tuple[jax.Array, None]:
    for matrix in weights:
      vector = jnp.full((1, matrix.shape[1]), 1e-30 * seen, matrix.dtype)
      seen = matrix_dot(vector, {"matrix": matrix})[0, 0]
    return seen, None

  return jax.lax.scan(read, jnp.float32(0.0), length=READS)[0]


def cached(cfg: ResolvedConfig, slots: int) -> tuple[jax.Array, ...]:
  """A query, and a layer's keys, values and mask."""
  model, dtype = cfg.model, cfg.training.dtype
  assert model.num_kv_heads and model.head_dim
  kv_1KSH = jnp.ones((1, model.num_kv_heads, slots, model.head_dim), dtype)
  q_11NH = jnp.ones((1, 1, model.num_heads, model.head_dim), dtype)
  return q_11NH, kv_1KSH, kv_1KSH, jnp.ones((1, 1, slots), bool)


def look_back(
  model: ResolvedModel,
  q_11NH: jax.Array,
  k_1KSH: jax.Array,
  v_1KSH: jax.Array,
  mask_11S: jax.Array,
) -> jax.Array:
  """Attention over a cache, again and again."""
  scoring = Scoring(model.attention_scale or 1.0)

  def step(q_11NH: jax.Array, _: None) -> tuple[jax.Array, None]:
    return attend_cached(q_11NH, k_1KSH, v_1KSH, Sight(mask_11S), scoring), None

  return jax.lax.scan(step, q_11NH, length=STEPS)[0]


def chain(x_1D: jax.Array) -> jax.Array:
  """Kernels that wait for each other and do next to nothing: sums, and the arithmetic
  between them; as many in a loop as a decoding step has: XLA runs a short body faster.
  The barriers are for GPUs, whose compiler makes one kernel of what it can."""

  def body(x_1D: jax.Array, _: None) -> tuple[jax.Array, None]:
    for _number in range(CHAIN):
      total = jax.lax.optimization_barrier(x_1D.sum())
      x_1D = jax.lax.optimization_barrier(x_1D * 0.5 + total)
    return x_1D, None

  return jax.lax.scan(body, x_1D, length=STEPS)[0]


def one_device() -> Mesh:
  """The rates are those of one device, so the models run on one."""
  axes = (1,) * len(MESH_AXES)
  types = (AxisType.Auto,) * len(MESH_AXES)
  return jax.make_mesh(axes, MESH_AXES, axis_types=types, devices=jax.devices()[:1])


def by_data_sheet(
  case: str, predict: Callable[[Device], float | None], measured: Timing
) -> list[Result]:
  """What the device table alone predicts, where it has this device."""
  sheet = this_device()
  if sheet is None or not sheet.peak_flops:
    return []
  predicted = [predict(sheet)] * len(measured.rounds)
  return [ratio(f"{case}, by data sheet", predicted, measured)]


def ratio(
  case: str, seconds: Sequence[float | None], measured: Timing, note: str = ""
) -> Result:
  """The figure, and in milliseconds what it is made of."""
  predicted = [s for s in seconds if s is not None]
  ratios = [p / m for p, m in zip(predicted, measured.rounds, strict=True)]
  result = summarise("predictions", case, ratios, "predicted / measured")
  result.seconds = measured.median
  milliseconds = 1e3 * float(np.median(predicted)), 1e3 * measured.median
  result.correct = "predicted {:.4g} ms, measured {:.4g} ms".format(*milliseconds)
  result.correct += f" ({note})" if note else ""
  return result
