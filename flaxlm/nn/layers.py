# SPDX-License-Identifier: Apache-2.0
"""The layers that are not attention: projections, norms, embeddings, feed-forward."""

import functools
import math
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxlm.config import ResolvedModel
from flaxlm.sharding import constrain, is_cut

# A masked score or logit; -inf would make NaN of an empty row, and of an entropy.
LOWEST = jnp.finfo(jnp.float32).min


class Einsum(nn.Module):
  """`einsum(equation, x, kernel)` for equations such as "BTD,DNH->BTNH".

  The letters that `x` ends and the kernel begins with are contracted. Everything about
  the parameter stands on the line that builds it: equation, shape, logical names.
  """

  equation: str
  shape: tuple[int, ...]
  names: tuple[str, ...]
  biased: bool = False
  init_scale: float = 1.0
  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32
  output_dtype: jnp.dtype | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    inputs, weights, outputs = self.equation.replace("->", ",").split(",")
    contracted = sum(letter in inputs for letter in weights)
    kept = len(outputs) - (len(weights) - contracted)
    assert inputs == outputs[:kept] + weights[:contracted], self.equation
    assert outputs == inputs[:kept] + weights[contracted:], self.equation
    if self.has_variable("params", "matrix"):  # laid out for decoding: decoding/weights.py
      y = matrix_dot(x.astype(self.dtype), self.variables["params"])
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
    kernel = kernel.astype(self.dtype)
    y = rows_dot(x.astype(self.dtype), kernel, contracted, self.output_dtype)
    if self.biased:
      zeros = nn.with_logical_partitioning(nn.initializers.zeros, self.names[contracted:])
      bias = self.param("bias", zeros, self.shape[contracted:], self.param_dtype)
      y += bias.astype(self.dtype)
    return y


def rows_dot(
  x: jax.Array, kernel: jax.Array, contracted: int, dtype: jnp.dtype | None = None
) -> jax.Array:
  """Contracts the last `contracted` dims of `x` with the first ones of `kernel`.

  As one plain matrix product: every kept dim of `x` is merged into rows. On the CPU the
  backward pass of a 3-D product runs at two thirds of the speed of a 2-D one. Rows that
  are cut over the mesh are left apart: merged, they would be gathered first.
  """
  if is_cut("norm_length"):
    return jnp.tensordot(x, kernel, contracted, preferred_element_type=dtype)
  size = math.prod(kernel.shape[:contracted])
  x_RI, kernel_IO = x.reshape(-1, size), kernel.reshape(size, -1)
  if dtype == jnp.float32 and x.dtype != dtype:
    y = wide_dot(x_RI, kernel_IO)
  else:
    y = jnp.dot(x_RI, kernel_IO, preferred_element_type=dtype)
  return y.reshape(x.shape[: x.ndim - contracted] + kernel.shape[contracted:])


@jax.custom_vjp
def wide_dot(x_RI: jax.Array, kernel_IO: jax.Array) -> jax.Array:
  """A product of narrow matrices in float32, whose gradient comes back narrow.

  As all others do: left to itself, it stays float32 and takes the kernel along, and two of
  the three products of a head run in float32.
  """
  return jnp.dot(x_RI, kernel_IO, preferred_element_type=jnp.float32)


def _wide_dot_backward(operands: tuple, grad_RO: jax.Array) -> tuple[jax.Array, jax.Array]:
  x_RI, kernel_IO = operands
  grad_RO = grad_RO.astype(x_RI.dtype)
  return grad_RO @ kernel_IO.T, x_RI.T @ grad_RO


wide_dot.defvjp(lambda x, kernel: (wide_dot(x, kernel), (x, kernel)), _wide_dot_backward)


def matrix_dot(x: jax.Array, params: Mapping[str, jax.Array]) -> jax.Array:
  """x . matrix^T (+ bias), (R, outputs), for parameters laid out for decoding.

  An int8 matrix has a scale per output, which is applied to the result.
  """
  matrix_OI = params["matrix"]
  x_RI = x.reshape(-1, matrix_OI.shape[1])
  on_cuda = matrix_sum if x_RI.shape[0] == 1 else matrix_first
  y = jax.lax.platform_dependent(x_RI, matrix_OI, cuda=on_cuda, default=matrix_first)
  if "scale" in params:
    y *= params["scale"]
  if "bias" in params:
    y += params["bias"].reshape(-1)
  return y


def matrix_first(x_RI: jax.Array, matrix_OI: jax.Array) -> jax.Array:
  """The product as a few rows on a CPU want it: up to 1.8 times as fast as x first
  (docs/LOG.md), and XLA would turn it round again if it saw the product and its transpose
  together.
  """
  if matrix_OI.dtype != x_RI.dtype:
    matrix_OI = tied_to(x_RI, matrix_OI).astype(x_RI.dtype)
  inputs = (((1,), (1,)), ((), ()))
  y_OR = jax.lax.dot_general(matrix_OI, x_RI, inputs, preferred_element_type=jnp.float32)
  apart = jax.lax.optimization_barrier
  return jax.lax.platform_dependent(y_OR, cpu=apart, default=lambda y_OR: y_OR).T


def matrix_sum(x_1I: jax.Array, matrix_OI: jax.Array) -> jax.Array:
  """One row's product as a sum, which XLA's GPU compiler reads the matrix for as it is: in
  a product it would be padded, widened, and merged with its neighbours, at every token.
  """
  return (matrix_OI.astype(jnp.float32) * x_1I.astype(jnp.float32)).sum(-1)[None]


def tied_to(x: jax.Array, matrix: jax.Array) -> jax.Array:
  """The matrix, as a value that a compiler cannot know before it knows x.

  Else XLA widens narrow matrices once, before a loop over tokens, and the loop reads them
  wide. A barrier says so to compilers of accelerators; the CPU's drops it too early.
  """
  if x.size == 0:
    return matrix
  is_number = x[(0,) * x.ndim] == x[(0,) * x.ndim]
  return jax.lax.platform_dependent(
    matrix,
    cpu=lambda matrix: jnp.where(is_number, matrix, 0).astype(matrix.dtype),
    default=lambda matrix: jax.lax.optimization_barrier((matrix, x))[0],
  )


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


def normalised(
  centred: bool,
  epsilon: float,
  x_BTD: jax.Array,
  scale_D: jax.Array,
  bias_D: jax.Array | None = None,
) -> jax.Array:
  """What the norms compute; of a narrow x, again for the backward pass, which would keep
  it in float32. A float32 x would save little, and cost a CPU time."""

  def normalise(x_BTD: jax.Array) -> jax.Array:
    x = x_BTD.astype(jnp.float32)
    if centred:
      x -= jnp.mean(x, -1, keepdims=True)
    x *= jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + epsilon)
    x *= scale_D
    if bias_D is not None:
      x += bias_D
    return x.astype(x_BTD.dtype)

  again = x_BTD.dtype != jnp.float32
  return (jax.checkpoint(normalise) if again else normalise)(x_BTD)


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
    if self.has_variable("params", "matrix"):  # laid out for decoding: the same table
      return
    init = nn.with_logical_partitioning(nn.initializers.normal(0.02), self.names)
    self.table = self.param("table", init, self.shape, self.param_dtype)

  def __call__(self, ids_BT: jax.Array) -> jax.Array:
    """Vectors (B, T, D). Ids must be in range: JAX clamps what is not."""
    if self.has_variable("params", "matrix"):
      params = self.variables["params"]
      x_BTD = params["matrix"][ids_BT].astype(self.dtype)
      return x_BTD * params["scale"][ids_BT][..., None] if "scale" in params else x_BTD
    return self.table.astype(self.dtype)[ids_BT]

  def logits(self, x_BTD: jax.Array) -> jax.Array:
    """x . table^T, (B, T, V) in float32 (Press & Wolf, 2017)."""
    if self.has_variable("params", "matrix"):
      logits_RV = matrix_dot(x_BTD.astype(self.dtype), self.variables["params"])
      return logits_RV.reshape(*x_BTD.shape[:2], -1)
    return rows_dot(x_BTD, self.table.astype(self.dtype).T, 1, jnp.float32)


class FeedForward(nn.Module):
  """down(f(up(x))), or down(f(gate(x)) * up(x)) when gated (Shazeer, 2020)."""

  cfg: ResolvedModel
  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    cfg = self.cfg
    D, F = cfg.width, cfg.ffn_width
    assert F is not None
    shared = dict(biased=cfg.biased, dtype=self.dtype, param_dtype=self.param_dtype)
    into = lambda name: Einsum("BTD,DF->BTF", (D, F), ("embed", "ffn"), name=name, **shared)
    h_BTF = into("up")(x_BTD)
    gate_BTF = into("gate")(x_BTD) if cfg.gated else None
    h_BTF = activated(cfg.activation, h_BTF, gate_BTF)
    h_BTF = constrain(h_BTF, "batch", "length", "act_ffn")
    scale = residual_scale(cfg.depth)
    return Einsum(
      "BTF,FD->BTD", (F, D), ("ffn", "embed"), init_scale=scale, name="down", **shared
    )(h_BTF)


@functools.partial(jax.checkpoint, static_argnums=0)
def activated(kind: str, h: jax.Array, gate: jax.Array | None) -> jax.Array:
  """f(h), or f(gate) h. Computed again for the backward pass: cheaper than to keep what
  its derivative is made of, several arrays of this size."""
  return activate(h, kind) if gate is None else activate(gate, kind) * h


def activate(x: jax.Array, kind: str) -> jax.Array:
  """The nonlinearity; "gelu" is the exact one, "gelu_tanh" GPT-2's approximation."""
  match kind:
    case "gelu":
      return jax.nn.gelu(x, approximate=False)
    case "gelu_tanh":
      return jax.nn.gelu(x, approximate=True)
    case "silu":
      return jax.nn.silu(x)
    case "relu":
      return jax.nn.relu(x)
  raise ValueError(f"unknown activation {kind!r}")


def residual_scale(depth: int) -> float:
  """Init scale of what adds to the residual stream, 2 L times (Radford et al., 2019)."""
  return (2 * depth) ** -0.5
