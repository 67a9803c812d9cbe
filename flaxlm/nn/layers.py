# SPDX-License-Identifier: Apache-2.0
"""The layers that are not attention: projections, norms, embeddings, feed-forward."""

from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from flaxlm.config import ResolvedModel
from flaxlm.nn.kernels.fusion import activated, normalised
from flaxlm.nn.kernels.products import matrix_dot, rows_dot, table_dot
from flaxlm.nn.quantized import projected
from flaxlm.sharding import (
  axis_sizes_in_use,
  constrain,
  cutting_axes,
  is_one_member,
  on_members,
  partition_spec,
)

# Projections by name, and how many dims of their kernel are contracted.
PROJECTIONS = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1, "head": 1}


class Einsum(nn.Module):
  """`einsum(equation, x, kernel)` for equations such as "BTD,DNH->BTNH".

  The letters at the end of `x` that are also at the start of the kernel are contracted. The
  line that builds the module says all about its parameter: equation, shape, logical names.
  """

  equation: str
  shape: tuple[int, ...]
  names: tuple[str, ...]
  biased: bool = False
  init_scale: float = 1.0
  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32
  output_dtype: jnp.dtype | None = None
  matmul: str = "full"  # Execution.product, for the projections of a block
  kernel: str | None = None  # of decoding's products, for the same

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    inputs, weights, outputs = self.equation.replace("->", ",").split(",")
    contracted = sum(letter in inputs for letter in weights)
    kept = len(outputs) - (len(weights) - contracted)
    assert inputs == outputs[:kept] + weights[:contracted], self.equation
    assert outputs == inputs[:kept] + weights[contracted:], self.equation
    if (laid_out := laid_out_for_decoding(self)) is not None:
      y = matrix_dot(x.astype(self.dtype), laid_out, self.kernel)
      y = y.astype(self.output_dtype or self.dtype)
      return y.reshape(x.shape[:kept] + self.shape[contracted:])
    init = nn.initializers.variance_scaling(
      self.init_scale**2,
      "fan_in",
      "truncated_normal",
      in_axis=tuple(range(contracted)),
      out_axis=tuple(range(contracted, len(weights))),
    )
    kernel = self.param(
      "kernel",
      nn.with_logical_partitioning(init, self.names),
      self.shape,
      self.param_dtype,
    )
    x = x.astype(self.dtype)
    kernel = kernel.astype(self.dtype)
    y = projected(self.matmul, x, kernel, contracted, self.output_dtype)
    if self.has_variable("params", "kernel_scale"):  # an int8 base, see nn/lora.py
      y *= self.variables["params"]["kernel_scale"].astype(y.dtype)
    if self.has_variable("params", "lora_a"):
      y += adapter_dot(self, x, contracted).astype(y.dtype)
    if self.biased:
      zeros = nn.with_logical_partitioning(nn.initializers.zeros, self.names[contracted:])
      bias = self.param("bias", zeros, self.shape[contracted:], self.param_dtype)
      y += bias.astype(self.dtype)
    return y


def laid_out_for_decoding(module: nn.Module) -> Mapping[str, jax.Array] | None:
  """A projection's parameters, if decoding/weights.py has made its kernel a matrix."""
  if not module.has_variable("params", "matrix"):
    return None
  return module.variables["params"]


def adapter_dot(module: Einsum, x: jax.Array, contracted: int) -> jax.Array:
  """What a projection's low-rank adapter adds to its output: scale B (A x)."""
  params = module.variables["params"]
  if "lora_dropout" in params and module.has_rng("dropout"):
    kept = 1 - params["lora_dropout"]
    mask = draw_mask(module.make_rng("dropout"), kept, x.shape)
    x = jnp.where(mask, x / kept.astype(x.dtype), 0)
  low = rows_dot(x, params["lora_a"].astype(x.dtype), contracted)
  y = rows_dot(low, params["lora_b"].astype(x.dtype), 1)
  return y * params["lora_scale"].astype(x.dtype)


class Dropout(nn.Module):
  """Zeroes a share `rate` of numbers, and divides the others by 1 - rate.

  The same ones on every mesh (Srivastava et al., 2014).
  """

  rate: float

  @nn.compact
  def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
    if deterministic or not self.rate:
      return x
    kept = 1 - self.rate
    return jnp.where(draw_mask(self.make_rng("dropout"), kept, x.shape), x / kept, 0)


def draw_mask(key: jax.Array, kept: ArrayLike, shape: Sequence[int]) -> jax.Array:
  """Which numbers of an activation (B, ...) are kept: each with the probability `kept`.

  A member of `data` that computes its own rows (training/accumulation.py) draws those of
  all members, of which a compiler only computes what is taken.
  """
  if not is_one_member("data"):
    return jax.random.bernoulli(key, kept, tuple(shape))
  masks = jax.random.bernoulli(key, kept, (jax.lax.axis_size("data"), *shape))
  return jax.lax.dynamic_index_in_dim(masks, jax.lax.axis_index("data"), 0, False)


class RMSNorm(nn.Module):
  """x / rms(x) * scale, in float32 (Zhang & Sennrich, 2019)."""

  epsilon: float

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    init = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
    scale_D = self.param("scale", init, (x_BTD.shape[-1],), jnp.float32)
    return normalised(False, self.epsilon, x_BTD, scale_D)


class LayerNorm(nn.Module):
  """(x - mean) / std * scale + bias, in float32 (Ba et al., 2016)."""

  epsilon: float
  biased: bool = True

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    width = x_BTD.shape[-1]
    ones = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
    zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("norm",))
    scale_D = self.param("scale", ones, (width,), jnp.float32)
    bias_D = self.param("bias", zeros, (width,), jnp.float32) if self.biased else None
    return normalised(True, self.epsilon, x_BTD, scale_D, bias_D)


def build_norm(cfg: ResolvedModel, name: str | None = None) -> nn.Module:
  if cfg.norm == "layernorm":
    return LayerNorm(cfg.norm_epsilon, cfg.norm_biased, name=name)
  return RMSNorm(cfg.norm_epsilon, name=name)


class Embedding(nn.Module):
  """A trainable table (V, D): ids to vectors, and, when tied, vectors to logits."""

  shape: tuple[int, int]
  names: tuple[str, str]
  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32

  def setup(self):
    if laid_out_for_decoding(self) is not None:  # the same table
      return
    init = nn.with_logical_partitioning(nn.initializers.normal(0.02), self.names)
    self.table = self.param("table", init, self.shape, self.param_dtype)

  def __call__(self, ids_BT: jax.Array) -> jax.Array:
    """Vectors (B, T, D). Ids must be in range: JAX silently clamps others."""
    if (params := laid_out_for_decoding(self)) is not None:
      x_BTD = params["matrix"][ids_BT].astype(self.dtype)
      return x_BTD * params["scale"][ids_BT][..., None] if "scale" in params else x_BTD
    table_VD = self.table.astype(self.dtype)
    if is_one_member("data") and self.names[1] == "embed":
      return look_up(table_VD, self.names, ids_BT)
    return table_VD[ids_BT]

  def logits(self, x_BTD: jax.Array) -> jax.Array:
    """x . table^T, (B, T, V) in float32 (Press & Wolf, 2017)."""
    if (params := laid_out_for_decoding(self)) is not None:
      logits_RV = matrix_dot(x_BTD.astype(self.dtype), params)
      return logits_RV.reshape(*x_BTD.shape[:2], -1)
    return table_dot(x_BTD, self.table.astype(self.dtype))


def look_up(table_VD: jax.Array, names: Sequence[str], ids_BT: jax.Array) -> jax.Array:
  """The rows (B, T, D) of a table that a mesh cuts: each device has its share of them.

  XLA would find out by itself what to exchange, but its partitioner aborts where an axis of
  the mesh is left out, as `data` is in training/accumulation.py (jaxlib 0.10 and 0.11).
  """
  sizes = {axis: size for axis, size in axis_sizes_in_use().items() if size > 1}
  if not sizes:
    return table_VD[ids_BT]
  vocab, embed = map(cutting_axes, names)
  rows = cutting_axes("batch") + cutting_axes("length")
  rest = tuple(axis for axis in rows if axis not in embed)

  def on_device(table_VD: jax.Array, ids_BT: jax.Array) -> jax.Array:
    table_VD = jax.lax.pcast(table_VD, rest, to="varying")
    table_VD = jax.lax.all_gather(table_VD, embed, axis=1, tiled=True)
    if not vocab:
      return table_VD[ids_BT]
    ids_BT = ids_BT - len(table_VD) * jax.lax.axis_index(vocab)
    is_here_BT = (ids_BT >= 0) & (ids_BT < len(table_VD))
    x_BTD = table_VD[jnp.where(is_here_BT, ids_BT, 0)]
    return jax.lax.psum(jnp.where(is_here_BT[..., None], x_BTD, 0), vocab)

  spec = lambda x, *names: partition_spec(names, x.shape, sizes)
  of_rows, of_table = spec(ids_BT, "batch", "length"), spec(table_VD, *names)
  return on_members(on_device, (of_table, of_rows), of_rows)(table_VD, ids_BT)


class FeedForward(nn.Module):
  """down(f(up(x))), or down(f(gate(x)) * up(x)) when gated (Shazeer, 2020)."""

  cfg: ResolvedModel
  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32
  matmul: str = "full"
  kernel: str | None = None

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    cfg = self.cfg
    D, F = cfg.width, cfg.ffn_width
    dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    shared = dict(biased=cfg.biased, matmul=self.matmul, kernel=self.kernel, **dtypes)
    into = lambda name: Einsum("BTD,DF->BTF", (D, F), ("embed", "ffn"), name=name, **shared)
    h_BTF = into("up")(x_BTD)
    gate_BTF = into("gate")(x_BTD) if cfg.gated else None
    h_BTF = activated(cfg.activation, h_BTF, gate_BTF)
    h_BTF = constrain(h_BTF, "batch", "length", "act_ffn")
    scale = residual_scale(cfg.depth)
    return Einsum(
      "BTF,FD->BTD", (F, D), ("ffn", "embed"), init_scale=scale, name="down", **shared
    )(h_BTF)


def residual_scale(depth: int) -> float:
  """Init scale of the 2 L projections that add to the residual stream (Radford et al.,
  2019)."""
  return (2 * depth) ** -0.5
