# SPDX-License-Identifier: Apache-2.0
"""How a model runs: dtypes, kernels, the loop over its layers, rematerialisation.

None of this changes what the parameters are. In training and in checkpoints the layers'
parameters are stacked along L; decoding keeps a dict for each layer (`is_split`). Layers
run as a loop (`run_scanned`) or unrolled (`run_unrolled`), and `REMAT_POLICIES` says what
each layer keeps for the backward pass.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxlm.config import NO_KERNEL, FusedKernel, TrainingConfig


@dataclasses.dataclass(frozen=True)
class Execution:
  """How a model runs, for models that have the same parameters."""

  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32
  remat: str = "none"
  scanned: bool = False
  narrow_cache: bool = False  # keys and values in int8
  weights_kernel: str | None = None  # of decoding's products: see nn.kernels.few_rows
  microbatches: int | None = None  # of a pipeline; None: one for each stage
  repeats: int = 1  # rounds of a pipeline
  sequence_parallel: bool = False
  matmul: str = "full"  # how projections of blocks multiply: see nn.quantized
  attention: str = "auto"  # the path over whole rows: see nn.kernels.paths
  kernel: FusedKernel = NO_KERNEL  # of the devices, which nothing in nn asks

  @classmethod
  def of(
    cls, training: TrainingConfig | None = None, kernel: FusedKernel = NO_KERNEL
  ) -> "Execution":
    """What a config says of it; None: all in float32, with every layer unrolled.

    `kernel` is the value of `platform.fused_kernel` on the devices that will run the model.
    The default suits one that is only traced.
    """
    if training is None:
      return cls(kernel=kernel)
    return cls(
      dtype=jnp.dtype(training.dtype),
      param_dtype=jnp.dtype(training.param_dtype),
      remat=training.remat,
      scanned=training.scanned,
      microbatches=training.pipeline_microbatches,
      repeats=training.pipeline_repeats,
      sequence_parallel=training.sequence_parallel,
      matmul=training.matmul,
      attention=training.attention,
      kernel=kernel,
    )

  @property
  def dtypes(self) -> dict[str, jnp.dtype]:
    return dict(dtype=self.dtype, param_dtype=self.param_dtype)

  @property
  def product(self) -> str:
    """How a block's projections multiply in training: `training.matmul`, but "cpu" for full
    products on a CPU."""
    return "cpu" if self.kernel.on_cpu and self.matmul == "full" else self.matmul

  @property
  def projections(self) -> dict[str, Any]:
    """How a block's projections multiply."""
    return dict(matmul=self.product, kernel=self.weights_kernel, **self.dtypes)

  @property
  def cache_dtype(self) -> jnp.dtype:
    return jnp.dtype(jnp.int8) if self.narrow_cache else self.dtype


# What is kept of a block besides its input, by `training.remat`.
ATTENTION = "attention"  # the name of attention's output

NARROW_PRODUCT = "narrow_product"  # the name of a product that has its own gradient

REMAT_POLICIES = {
  "full": None,
  "dots": jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    # JAX does not look for products inside a function with its own gradient.
    jax.checkpoint_policies.save_only_these_names(NARROW_PRODUCT),
  ),
  "attention": jax.checkpoint_policies.save_only_these_names(ATTENTION),
  "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=[ATTENTION],
    offload_src="device",
    offload_dst="pinned_host",
  ),
}


def with_remat(layer: "Layer", execution: Execution, is_looped: bool) -> "Layer":
  """The layer, keeping for its backward pass only what `run.remat` says.

  Outside a loop, XLA has to be kept from merging what is computed twice into one.
  """
  if execution.remat == "none":
    return layer
  policy = REMAT_POLICIES[execution.remat]
  return jax.checkpoint(layer, policy=policy, prevent_cse=not is_looped)


def stacked_class(module: type[nn.Module], depth: int, in_axes: tuple) -> Any:
  """A class of `depth` copies of `module`, whose parameters are stacked along L.

  It only initialises the parameters; `run_scanned` and `run_unrolled` run the layers.
  Unrolled by Linen, each layer's gradient would be as large as that of all layers.
  """
  return nn.scan(
    module,
    variable_axes={"params": 0},
    split_rngs={"params": True},
    in_axes=in_axes,
    length=depth,
    metadata_params={nn.PARTITION_NAME: "layers"},
  )


# A layer is a function of x and of its own inputs: its parameters, key and cache.
Layer = Callable[[jax.Array, Any], tuple[jax.Array, Any]]


def run_layers(
  layers: list[Layer], period: int, scanned: bool, x: jax.Array, params: Any, *others: Any
) -> tuple[jax.Array, Any]:
  """Runs `layers`, of which each `period` differ: (x, their outputs stacked along L).

  `params` are stacked or split, and the layers' `others` (keys, states) are stacked.
  Parameters that are split are not stacked again for a loop.
  """
  if scanned and not is_split(params):
    return run_scanned(layers, period, x, (params, *others))
  count = len(layers)
  unstacked = [unstack(other, count) for other in others]
  layer_inputs = zip(split_blocks(params, count), *unstacked, strict=True)
  x, outputs = run_unrolled(layers, x, list(layer_inputs))
  return x, stack_trees(outputs)


def run_unrolled(layers: list[Layer], x: jax.Array, layer_inputs: list) -> tuple[Any, list]:
  """Runs `layers` one after the other, each with its own inputs; lists their outputs."""
  outputs = []
  for layer, inputs in zip(layers, layer_inputs, strict=True):
    x, output = layer(x, inputs)
    outputs.append(output)
  return x, outputs


def stack_trees(trees: list) -> Any:
  return jax.tree.map(lambda *parts: jnp.stack(parts), *trees)


def run_scanned(
  layers: list[Layer], period: int, x: jax.Array, stacked: Any
) -> tuple[jax.Array, Any]:
  """The same as a loop over periods of `period` different layers.

  Layers that do not fill a period run unrolled, after the loop.
  """
  if period == 1:  # no slices in the loop: the backward pass would keep a copy of each
    return jax.lax.scan(layers[0], x, stacked)
  count = len(layers) // period
  looped = count * period
  in_loop = jax.tree.map(lambda s: s[:looped].reshape(count, period, *s.shape[1:]), stacked)

  def run_period(x: jax.Array, inputs: Any) -> tuple[jax.Array, Any]:
    x, outputs = run_unrolled(layers[:period], x, unstack(inputs, period))
    return x, stack_trees(outputs)

  x, outputs = jax.lax.scan(run_period, x, in_loop)
  outputs = jax.tree.map(lambda s: s.reshape(looped, *s.shape[2:]), outputs)
  if looped < len(layers):
    rest = jax.tree.map(lambda s: s[looped:], stacked)
    rest = unstack(rest, len(layers) - looped)
    x, more = run_unrolled(layers[looped:], x, rest)
    join = lambda *parts: jnp.concatenate(parts)
    outputs = jax.tree.map(join, outputs, stack_trees(more))
  return x, outputs


def is_split(params: Any) -> bool:
  """Whether each layer has its own dict of parameters, {"0": ..., "1": ...}.

  Decoding uses this form: slicing a stacked array would copy it at every token.
  """
  return "0" in params


def split_blocks(params: Any, depth: int) -> list[Any]:
  """The parameters of each layer, whether they are stacked or split."""
  if is_split(params):
    return [params[str(n)] for n in range(depth)]
  return unstack(params, depth)


def unstack(stacked: Any, count: int) -> list[Any]:
  """The slices of a stacked tree, whose gradients are stacked in one operation.

  By default JAX makes each slice's gradient as large as the whole tree and adds them up.
  """
  leaves, tree = jax.tree.flatten(stacked)
  has_gradient = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)  # keys have none
  slices = [
    _unstack(leaf) if has_gradient(leaf) else [leaf[n] for n in range(count)]
    for leaf in leaves
  ]
  return [jax.tree.unflatten(tree, [s[n] for s in slices]) for n in range(count)]


@jax.custom_vjp
def _unstack(stacked: jax.Array) -> tuple[jax.Array, ...]:
  return tuple(stacked)


_unstack.defvjp(
  lambda stacked: (tuple(stacked), None), lambda _, grads: (jnp.stack(grads),)
)
