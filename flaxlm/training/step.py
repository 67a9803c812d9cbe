# SPDX-License-Identifier: Apache-2.0
"""The training step: traced, pure, and sharded by the logical names of its parameters."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from flaxlm.config import DataConfig, DpoConfig, LoraConfig, TrainingConfig
from flaxlm.data.objectives import Batch
from flaxlm.nn.base import LanguageModel
from flaxlm.nn.kernels.paths import training_path
from flaxlm.nn.lora import abstract_adapters, abstract_frozen
from flaxlm.nn.models import abstract_params, init_params
from flaxlm.sharding import (
  axis_sizes_in_use,
  batch_parts,
  batch_sharding,
  like_parameters,
  use_mesh,
)
from flaxlm.training.accumulation import accumulate
from flaxlm.training.fused_loss import summed_loss
from flaxlm.training.layers import LOADS, forward_with_loads, layer_sizes
from flaxlm.training.logprobs import cut_rows, drops_units, forward, learning_pass
from flaxlm.training.losses import cross_entropy
from flaxlm.training.optimizer import Optimizer
from flaxlm.training.policy import policy_weights
from flaxlm.training.preference import eval_sums, num_pairs, preference_and_gradient

Metrics = dict[str, Any]  # arrays, and dicts of arrays
LAYERS = "layers"  # among the metrics of a step: those of each layer
NO_LORA = LoraConfig()
ABSTRACT_SEED = jax.ShapeDtypeStruct((), jnp.uint32)


class TrainState(NamedTuple):
  """Everything that changes from step to step, which a checkpoint holds, and the rest.

  With adapters, `params` are the adapters, and `frozen` is everything else (nn/lora.py).
  `reference` is a copy of the parameters that the run began from, where its objective
  compares with them; with adapters there is none, as `frozen` is those parameters.
  """

  step: Any
  params: Any  # what learns
  opt_state: Any
  frozen: Any = None
  reference: Any = None

  @property
  def reference_params(self) -> Any:
    """The parameters to compare with, with or without adapters (training/logprobs.py)."""
    return self.frozen if self.reference is None else self.reference


def train_step(
  model: LanguageModel,
  optimizer: Optimizer,
  cfg: TrainingConfig,
  state: TrainState,
  batch: Batch,
  seed: jax.Array,
  dpo: DpoConfig | None = None,
) -> tuple[TrainState, Metrics]:
  """One optimizer step on one global batch.

  The loss is the mean over the batch's weighted tokens or, with `dpo`, over its pairs of
  answers, whatever its micro-batches. If the loss or the gradient is not finite, only the
  step counter changes, and `metrics["finite"]` is false.

  Dropout's key is the seed's with the step's number folded in. With accumulation it is
  split into one key for each micro-batch.
  """
  key = jax.random.fold_in(jax.random.key(seed), state.step)
  held = dict(params=state.params, frozen=state.frozen)
  learn: Callable
  if dpo is None:
    num_targets = jnp.maximum(batch.weights_BT.sum(), 1.0)
    learn = functools.partial(loss_and_gradient, model, cfg)
  else:
    num_targets = jnp.maximum(num_pairs(batch), 1.0)
    held["reference"] = state.reference_params
    learn = functools.partial(preference_and_gradient, model, cfg, dpo)
  of_part = lambda held, batch, key: learn(batch=batch, key=key, **held)
  how = attention_path(model, batch), drops_units(model, state.frozen)
  parts = cfg.accumulation_steps
  sums, gradient = accumulate(of_part, parts, held, batch, key, *how)
  means = jax.tree.map(lambda x: x / num_targets, {"loss": sums} if dpo is None else sums)
  loss = means["loss"]
  scale = 1 / num_targets  # XLA would keep an array of quotients, but not of products
  gradient = jax.tree.map(lambda g: g * scale, gradient)
  gradient_norm = optax.tree.norm(gradient)
  finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)

  updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  # The gradient is float32; parameters and moments keep their own dtypes.
  keep = lambda new, old: jnp.where(finite, new, old).astype(old.dtype)
  new_state = TrainState(
    step=state.step + 1,
    params=jax.tree.map(keep, params, state.params),
    opt_state=jax.tree.map(keep, opt_state, state.opt_state),
    frozen=state.frozen,
    reference=state.reference,
  )
  metrics = {
    **means,
    "gradient_norm": gradient_norm,
    "learning_rate": optimizer.learning_rate(state.step),
    "tokens": tokens_read(batch),
    "finite": finite,
  }
  if cfg.log_layers:
    metrics[LAYERS] = layer_sizes(gradient, updates, state.params)
  return new_state, metrics


def attention_path(model: LanguageModel, batch: Batch) -> str | None:
  """The path of attention in a training step; None for an RNN."""
  source_BS = batch.source_BS
  lengths = batch.tokens_BT.shape[1], 0 if source_BS is None else source_BS.shape[1]
  path = training_path(model.cfg, model.execution, axis_sizes_in_use(), *lengths)
  return path and path.name


def tokens_read(batch: Batch) -> jax.Array:
  """The number of tokens that are not padding, of targets and sources: for the speed."""
  if batch.segments_BT is None:
    return jnp.float32(batch.tokens_BT.size)
  count = jnp.sum(batch.segments_BT > 0, dtype=jnp.float32)
  if batch.source_segments_BS is not None:
    count += jnp.sum(batch.source_segments_BS > 0, dtype=jnp.float32)
  return count


def loss_and_gradient(
  model: LanguageModel,
  cfg: TrainingConfig,
  params: Any,
  batch: Batch,
  key: jax.Array,
  frozen: Any = None,
) -> tuple[jax.Array, Any]:
  """The summed loss over a batch's weighted tokens, and the gradient of what is minimised.

  What is minimised is the loss with label smoothing, plus the experts' own losses; the
  loss that is returned has neither. What is `frozen` has no gradient, and none is computed.
  """

  def minimised(params: Any) -> tuple[jax.Array, jax.Array]:
    params, output = learning_pass(model, params, frozen, batch, key)
    total, loss_sum = losses_of(
      model, cfg, params, output.value, batch, learns_head=frozen is None
    )
    moe = model.cfg.moe
    weights = {"load_balance": moe.load_balance_weight, "router_z": moe.router_z_weight}
    for name, loss in output.losses.items():
      total += weights[name] * loss
    return total, loss_sum

  (_, loss_sum), gradient = jax.value_and_grad(minimised, has_aux=True)(params)
  return loss_sum, gradient


def losses_of(
  model: LanguageModel,
  cfg: TrainingConfig,
  params: Any,
  x_BTD: jax.Array,
  batch: Batch,
  learns_head: bool = True,
) -> tuple[jax.Array, jax.Array]:
  """(the summed loss with label smoothing, the same without, which has no gradient) of the
  hidden vectors (B, T, D).

  With `loss_chunks` above 1 the logits (B, T, V), the largest array of a step, are computed
  for a chunk of each row at a time, with their gradient (training/fused_loss.py).
  """

  def of_chunk(
    params: Any, x_BTD: ArrayLike, targets_BT: ArrayLike, weights_BT: ArrayLike
  ) -> tuple[jax.Array, jax.Array]:
    logits_BTV = model.apply({"params": params}, x_BTD, method="logits")
    loss_sum = (cross_entropy(logits_BTV, targets_BT) * weights_BT).sum()
    if not cfg.label_smoothing:
      return loss_sum, loss_sum
    smoothing, num_ids = cfg.label_smoothing, model.cfg.num_ids
    smoothed_BT = cross_entropy(logits_BTV, targets_BT, smoothing, num_ids)
    return (smoothed_BT * weights_BT).sum(), loss_sum

  weights_BT: ArrayLike = batch.weights_BT
  if batch.advantages_BT is not None:
    weights_BT = policy_weights(weights_BT, batch.advantages_BT)
  if cfg.loss_chunks == 1:
    total, loss_sum = of_chunk(params, x_BTD, batch.targets_BT, weights_BT)
  else:
    arrays = x_BTD, batch.targets_BT, weights_BT
    chunks = tuple(cut_rows(x, cfg.loss_chunks) for x in arrays)
    head = model.head_params(params)
    total, loss_sum = summed_loss(of_chunk, head, chunks, learns_head)
  return total, jax.lax.stop_gradient(loss_sum)


def eval_step(
  model: LanguageModel,
  params: Any,
  batch: Batch,
  reference: Any = None,
  dpo: DpoConfig | None = None,
  counts_loads: bool = False,
) -> Metrics:
  """Sums over a batch: the loss in nats, the tokens; for an encoder also the hits, where
  the likeliest token is the right one. With `dpo` those of `preference.eval_sums`.

  With `counts_loads` also how often each expert of each layer was chosen, (L, E).
  """
  if dpo is not None:
    return eval_sums(model, dpo, params, reference, batch)
  loads: Metrics = {}
  if counts_loads:
    output, loads[LOADS] = forward_with_loads(model, params, batch)
  else:
    output = forward(model, params, batch)
  logits_BTV = output.value
  nats_BT = cross_entropy(logits_BTV, batch.targets_BT) * batch.weights_BT
  sums = {"nats": nats_BT.sum(), "tokens": batch.weights_BT.sum()}
  if model.cfg.family == "encoder":
    hits_BT = logits_BTV.argmax(-1) == batch.targets_BT
    sums["hits"] = (hits_BT * batch.weights_BT).sum()
  return sums | loads


# -- Under jit: the state is made sharded, and keeps its layout ----------------------------


@functools.lru_cache(maxsize=8)  # a run calls it three times, for half a second each
def abstract_state(
  model: LanguageModel,
  optimizer: Optimizer,
  mesh: Mesh,
  lora: LoraConfig = NO_LORA,
  has_reference: bool = False,
) -> TrainState:
  """The shapes, dtypes and shardings of the state, without computing it.

  It `has_reference` if the objective compares with what the run began from.
  """
  params, frozen = abstract_params(model, mesh), None
  reference = params if has_reference and not lora.rank else None
  if lora.rank:
    params = abstract_adapters(model, lora, mesh)
    frozen = abstract_frozen(model, lora, mesh)
  moments = jax.eval_shape(optimizer.init, params)
  opt_state = like_parameters(moments, params, mesh, optimizer.sharded)
  replicated = NamedSharding(mesh, PartitionSpec())
  step = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
  return TrainState(step, params, opt_state, frozen, reference)


def init_state(
  model: LanguageModel, optimizer: Optimizer, mesh: Mesh, seed: int
) -> TrainState:
  """The state of step 0. Each shard is made on the device that keeps it."""
  abstract = abstract_state(model, optimizer, mesh)

  def init(seed: jax.Array) -> TrainState:
    params = nn.unbox(init_params(model, seed))
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

  # It runs once: on a CPU, full optimisation by LLVM would take longer than running it.
  # Whoever asks JAX for no optimisation has even less.
  on_cpu, unoptimized = jax.default_backend() == "cpu", "jax_disable_most_optimizations"
  quickly = on_cpu and not jax.config.read(unoptimized)
  options = {"xla_backend_optimization_level": 1} if quickly else None
  # No mesh is set: the activations are those of one dummy row, and need no layout.
  jitted = jax.jit(init, out_shardings=shardings_of(abstract), compiler_options=options)
  return jitted(np.uint32(seed))


class TrainStep(NamedTuple):
  """A jitted training step, which sets its mesh."""

  jitted: Any
  mesh: Mesh

  def __call__(
    self, state: TrainState, batch: Batch, seed: ArrayLike
  ) -> tuple[TrainState, Metrics]:
    with use_mesh(self.mesh):
      return self.jitted(state, batch, seed)

  def lower(self, state: TrainState, batch: Batch) -> jax.stages.Lowered:
    """Lowers the step for abstract arguments. Once it is compiled, calls reuse it."""
    with use_mesh(self.mesh):
      return self.jitted.lower(state, batch, ABSTRACT_SEED)


def jit_train_step(
  model: LanguageModel,
  optimizer: Optimizer,
  cfg: TrainingConfig,
  mesh: Mesh,
  lora: LoraConfig = NO_LORA,
  dpo: DpoConfig | None = None,
) -> TrainStep:
  """`train_step` under `jit`. The state is donated, and keeps its layout."""
  step = functools.partial(train_step, model, optimizer, cfg, dpo=dpo)
  abstract = abstract_state(model, optimizer, mesh, lora, dpo is not None)
  state_shardings = shardings_of(abstract)
  replicated = NamedSharding(mesh, PartitionSpec())
  jitted = jax.jit(
    step,
    in_shardings=(state_shardings, batch_sharding(mesh), replicated),
    out_shardings=(state_shardings, replicated),
    donate_argnums=0,
    compiler_options=step_options(cfg, mesh),
  )
  return TrainStep(jitted, mesh)


def step_options(cfg: TrainingConfig, mesh: Mesh) -> dict[str, Any] | None:
  """What the compiler is told about a training step on these devices.

  On a CPU, to see that nothing overwrites an optimizer's moments too early: by default it
  copies them first, at every step.

  On a GPU, to leave products of 8-bit floats to cuBLASLt: XLA's own kernels, which come
  first by default, would widen them and multiply in 16 bits, and so would products that
  are merged (seen in what is compiled for Hopper).
  """
  platform = mesh.devices.flat[0].platform
  if platform == "cpu":
    return {"xla_cpu_copy_insertion_use_region_analysis": True}
  if platform in ("gpu", "cuda") and cfg.matmul == "fp8":
    return {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}
  return None


def abstract_batch(cfg: DataConfig, mesh: Mesh) -> Batch:
  """The shapes, dtypes and shardings of a global batch."""
  sharding = batch_sharding(mesh)

  def array(length: int, dtype: Any) -> Any:
    return jax.ShapeDtypeStruct((cfg.batch_size, length), dtype, sharding=sharding)

  ids, weights = array(cfg.seq_len, jnp.int32), array(cfg.seq_len, jnp.float32)
  if cfg.objective == "reward":
    return Batch(ids, ids, ids, ids, weights, advantages_BT=weights)
  if cfg.objective != "seq2seq":
    return Batch(ids, ids, ids, ids, weights)
  source = array(cfg.source_length, jnp.int32)
  return Batch(ids, ids, ids, ids, weights, source, source, source)


def jit_eval_step(
  model: LanguageModel,
  mesh: Mesh,
  dpo: DpoConfig | None = None,
  counts_loads: bool = False,
) -> Callable[..., Metrics]:
  """`eval_step` under `jit`, of parameters, a batch and, with `dpo`, the reference."""
  step = functools.partial(eval_step, model, dpo=dpo, counts_loads=counts_loads)
  # The sums are replicated: every process reads them.
  jitted = jax.jit(step, out_shardings=NamedSharding(mesh, PartitionSpec()))
  return use_mesh(mesh)(jitted)


def jit_all_finite(mesh: Mesh) -> Callable[[Any], jax.Array]:
  """A function that says whether every number of a tree of arrays is finite.

  A rate that is too large makes infinite parameters of a finite gradient. The step itself
  does not ask: it would have to keep the old state until the new one is known.
  """

  def all_finite(tree: Any) -> jax.Array:
    wrong = [jnp.sum(~jnp.isfinite(x), dtype=jnp.float32) for x in jax.tree.leaves(tree)]
    return sum(wrong, jnp.float32(0)) == 0

  return jax.jit(all_finite, out_shardings=NamedSharding(mesh, PartitionSpec()))


def shardings_of(tree: Any) -> Any:
  return jax.tree.map(lambda x: x.sharding, tree)


def put_batch(batch: Batch, mesh: Mesh) -> Batch:
  """The global batch on the devices, from this process's rows in the order of its parts."""
  sharding = batch_sharding(mesh)
  parts, num_parts = batch_parts(mesh, jax.process_index())

  def put(rows: np.ndarray) -> jax.Array:
    size = len(rows) // len(parts)
    shape = (num_parts * size, *rows.shape[1:])
    places = {part: n for n, part in enumerate(parts)}

    def shard(index: Any) -> np.ndarray:
      start, stop, _ = index[0].indices(shape[0])
      mine = places[start // size] * size + start % size
      return rows[slice(mine, mine + stop - start), *index[1:]]

    return jax.make_array_from_callback(shape, sharding, shard)

  return jax.tree.map(put, batch)
