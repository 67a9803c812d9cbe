# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts (Shazeer et al., 2017) in place of a feed-forward.

A router sends each token to the A most probable of E experts, and adds up their weighted
outputs. Either every choice is served (`dropless`: Gale et al., 2022), or each expert has
room for C choices of a row, and further ones are dropped (`with_capacity`: Lepikhin et al.,
2020). Padding is sent to no expert: its choice is E, one past the last. Experts have no
biases, whatever `cfg.biased` says of the other layers.

Letters, besides those of `flaxlm.nn`: M choices, in the order of their tokens (M = T A, or
B T A for a whole batch); R rows of one matrix product.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxlm.config import ResolvedModel
from flaxlm.nn.kernels.fusion import activate
from flaxlm.nn.kernels.grouped import grouped_dot
from flaxlm.nn.layers import Einsum, FeedForward, residual_scale
from flaxlm.sharding import axis_sizes_in_use, cutting_axes, on_members, partition_spec

Kernels = dict[str, jax.Array]

# Logical names of the experts' kernels, (E, D, F) and (E, F, D).
INWARDS = ("experts", "embed", "expert_ffn")
OUTWARDS = ("experts", "expert_ffn", "embed")


class MoE(nn.Module):
  """E experts, A of them per token, and shared experts that process every token."""

  cfg: ResolvedModel
  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x_BTD: jax.Array, real_BT: jax.Array | None = None, dropping: bool = True
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(B, T, D), and the router's losses, summed over the tokens that `real_BT` marks.

    `dropping=False` serves every choice, whatever `capacity_factor` says: for decoding,
    where a result must not depend on the rest of the batch.
    """
    cfg, moe = self.cfg, self.cfg.moe
    if real_BT is None:
      real_BT = jnp.ones(x_BTD.shape[:2], bool)
    logits_BTE = self.project("router", x_BTD, moe.num_experts)
    serve = functools.partial(dropless, cfg=cfg)
    if moe.capacity_factor is not None and dropping:
      even_share = x_BTD.shape[1] * moe.experts_per_token / moe.num_experts
      # A token chooses an expert at most once, so a row has at most T choices of it.
      capacity = min(max(1, math.ceil(moe.capacity_factor * even_share)), x_BTD.shape[1])
      serve = functools.partial(with_capacity, cfg=cfg, capacity=capacity)
    kernels = Experts(cfg, self.param_dtype, name="experts")()
    kernels = jax.tree.map(lambda kernel: kernel.astype(self.dtype), kernels)
    x_BTD = x_BTD.astype(self.dtype)
    y_BTD, experts_BTA = over_mesh(cfg, serve, x_BTD, logits_BTE, real_BT, kernels)
    if moe.num_shared_experts:
      y_BTD += self.shared(x_BTD)
    return y_BTD, router_losses(logits_BTE, experts_BTA, real_BT)

  def shared(self, x_BTD: jax.Array) -> jax.Array:
    """All shared experts, as one wide feed-forward (Dai et al., 2024, section 3.2)."""
    moe = self.cfg.moe
    width = moe.num_shared_experts * moe.expert_width
    cfg = dataclasses.replace(self.cfg, ffn_width=width, biased=False)
    y_BTD = FeedForward(cfg, self.dtype, self.param_dtype, name="shared")(x_BTD)
    if moe.shared_gated:  # Qwen 2 (Yang et al., 2024, section 2.2.2)
      y_BTD *= jax.nn.sigmoid(self.project("shared_gate", x_BTD, 1)).astype(y_BTD.dtype)
    return y_BTD

  def project(self, name: str, x_BTD: jax.Array, outputs: int) -> jax.Array:
    """A small projection, all in float32: rounding would change the chosen experts."""
    shape, names = (self.cfg.width, outputs), ("embed", "router")
    layer = Einsum("BTD,DE->BTE", shape, names, param_dtype=self.param_dtype, name=name)
    with jax.default_matmul_precision("float32"):  # TPUs would multiply in bfloat16
      return layer(x_BTD)


class Experts(nn.Module):
  """The kernels of all experts, by name: (E, D, F), but (E, F, D) for `down`."""

  cfg: ResolvedModel
  param_dtype: jnp.dtype

  @nn.compact
  def __call__(self) -> Kernels:
    moe, D = self.cfg.moe, self.cfg.width
    E, F = moe.num_experts, moe.expert_width
    kernel = functools.partial(ExpertKernel, param_dtype=self.param_dtype)
    into = ["gate", "up"] if self.cfg.gated else ["up"]
    kernels = {name: kernel((E, D, F), INWARDS, name=name)() for name in into}
    scale = residual_scale(self.cfg.depth)
    return kernels | {"down": kernel((E, F, D), OUTWARDS, scale, name="down")()}


class ExpertKernel(nn.Module):
  """One matrix for each expert, each initialised by its own fan-in."""

  shape: tuple[int, int, int]
  names: tuple[str, str, str]
  init_scale: float = 1.0
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self) -> jax.Array:
    init = nn.initializers.variance_scaling(
      self.init_scale**2, "fan_in", "truncated_normal", in_axis=1, out_axis=2, batch_axis=0
    )
    init = nn.with_logical_partitioning(init, self.names)
    return self.param("kernel", init, self.shape, self.param_dtype)


# -- Routing -------------------------------------------------------------------------------


def route(
  cfg: ResolvedModel, logits_BTE: jax.Array, real_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Each token's weights (B, T, A) in float32, and its experts (B, T, A), best first.

  Weights are the softmax over all experts or, if `normalized`, over the chosen ones.
  """
  moe = cfg.moe
  weights_BTA, experts_BTA = jax.lax.top_k(
    jax.nn.softmax(logits_BTE), moe.experts_per_token
  )
  if moe.normalized:
    weights_BTA /= weights_BTA.sum(-1, keepdims=True)
  return weights_BTA, jnp.where(real_BT[..., None], experts_BTA, moe.num_experts)


def router_losses(
  logits_BTE: jax.Array, experts_BTA: jax.Array, real_BT: jax.Array
) -> dict[str, jax.Array]:
  """The router's losses, summed over real tokens, so that the parts of a batch add up.

  `load_balance`: E sum_e f_e P_e of each row, where f_e is the share of its choices that
  went to e, and P_e the mean probability of e (Fedus et al., 2021, equation 4; row by row
  as in DeepSeek-V3, 2024, equation 17); 1 if the load is even. Dropped choices count too.
  `router_z`: the squared logsumexp of the logits (Zoph et al., 2022, equation 5).
  """
  E, A = logits_BTE.shape[-1], experts_BTA.shape[-1]
  chosen_BE = count(experts_BTA, E, (1, 2))
  probability_BE = jnp.where(real_BT[..., None], jax.nn.softmax(logits_BTE), 0).sum(1)
  num_tokens_B = jnp.maximum(real_BT.sum(-1), 1)
  load_balance_B = E * (chosen_BE * probability_BE).sum(-1) / (A * num_tokens_B)
  z_BT = jnp.square(jax.nn.logsumexp(logits_BTE, -1))
  return {
    "load_balance": load_balance_B.sum(),
    "router_z": jnp.where(real_BT, z_BT, 0).sum(),
  }


def count(experts: jax.Array, num_experts: int, dims: tuple[int, ...]) -> jax.Array:
  """How often each expert is chosen, summed over `dims`; E becomes the last dim."""
  return (experts[..., None] == jnp.arange(num_experts)).sum(dims)


# -- Running the experts -------------------------------------------------------------------


def over_mesh(
  cfg: ResolvedModel,
  serve: Callable,
  x_BTD: jax.Array,
  logits_BTE: jax.Array,
  real_BT: jax.Array,
  kernels: Kernels,
) -> tuple[jax.Array, jax.Array]:
  """Routes the tokens and runs the experts, each device of the mesh for its own rows.

  Kernels are sharded over `embed` (they are gathered here, and their gradients scattered
  again) and over `expert_ffn` (each device computes part of a sum). `serve` itself reaches
  the experts on other devices. Without a mesh, or on one device, nothing is sent.
  """
  # Axes of size 1 are left out: the TPU's compiler crashes on a sum over one device.
  sizes = {axis: size for axis, size in axis_sizes_in_use().items() if size > 1}
  if not sizes:
    weights_BTA, experts_BTA = route(cfg, logits_BTE, real_BT)
    return serve(x_BTD, weights_BTA, experts_BTA, kernels), experts_BTA

  embed, ffn, expert = map(cutting_axes, ("embed", "expert_ffn", "experts"))
  # A capacity applies to a whole row, and a single token to decode cannot be split: in both
  # cases every device along `context` serves whole rows.
  parts = math.prod(sizes[axis] for axis in cutting_axes("length"))
  cut_rows = cfg.moe.capacity_factor is None and x_BTD.shape[1] % parts == 0
  length = "length" if cut_rows else "key_length"
  rest = tuple(
    axis
    for axis in cutting_axes("batch") + cutting_axes(length)
    if axis not in embed + expert
  )

  def gather(name, kernel):
    dim = names_of(name).index("embed")
    return jax.lax.all_gather(kernel, embed, axis=dim, tiled=True)

  # Gathered kernels are not kept: the backward pass gathers them again. The barrier below
  # keeps a kernel from being gathered before its tokens are there; otherwise JAX would move
  # the gathers of all layers out of a pipeline's loop over microbatches.
  def kept(primitive, *_, **params):
    gathers = primitive is jax.lax.all_gather_p and params["axis_name"] == embed
    return not gathers and primitive is not jax.lax.optimization_barrier_p

  def on_device(x_BTD, logits_BTE, real_BT, kernels):
    vary = functools.partial(jax.lax.pcast, to="varying")
    kernels = vary(kernels, rest)  # so gradients are summed here, not in a loop
    if embed:
      kernels, _ = jax.lax.optimization_barrier((kernels, x_BTD))
      kernels = {name: gather(name, kernel) for name, kernel in kernels.items()}
    weights_BTA, experts_BTA = route(cfg, logits_BTE, real_BT)
    tokens = vary((x_BTD, weights_BTA, experts_BTA), ffn)
    y_BTD = jax.lax.psum(serve(*tokens, kernels, expert), ffn)
    return y_BTD, experts_BTA

  spec = lambda x, *names: partition_spec(names, x.shape, sizes)
  row = spec(real_BT, "batch", length)
  cut = {name: spec(kernel, *names_of(name)) for name, kernel in kernels.items()}
  if embed:
    on_device = jax.checkpoint(on_device, policy=kept)
  on_mesh = on_members(on_device, (row, row, row, cut), (row, row))
  return on_mesh(x_BTD, logits_BTE, real_BT, kernels)


def names_of(kernel: str) -> tuple[str, str, str]:
  """The logical names of an expert kernel's dims."""
  return OUTWARDS if kernel == "down" else INWARDS


def dropless(
  x_BTD: jax.Array,
  weights_BTA: jax.Array,
  experts_BTA: jax.Array,
  kernels: Kernels,
  mesh_axes: tuple[str, ...] = (),
  *,
  cfg: ResolvedModel,
) -> jax.Array:
  """Serves every choice: sorts them by expert, multiplies group by group, sorts them back.

  With experts sharded over `mesh_axes`, each device gathers the tokens of all of them and
  serves the choices of its own experts. Arrays have the size of the worst case, in which
  every choice is one of these.
  """
  E, D = kernels["up"].shape[:2]
  if mesh_axes:
    gather = functools.partial(jax.lax.all_gather, axis_name=mesh_axes, tiled=True)
    x_BTD, weights_BTA, experts_BTA = map(gather, (x_BTD, weights_BTA, experts_BTA))
    experts_BTA -= E * jax.lax.axis_index(mesh_axes)
  experts_M = experts_BTA.reshape(-1)
  experts_M = jnp.where((experts_M >= 0) & (experts_M < E), experts_M, E)
  order_M = jnp.argsort(experts_M)  # choices that are not served here come last
  sizes_E = count(experts_M, E, (0,))

  A = experts_BTA.shape[-1]
  h_MD = x_BTD.reshape(-1, D)[order_M // A]
  h_MD = feed_forward(cfg, h_MD, kernels, lambda h, kernel: grouped_dot(h, kernel, sizes_E))
  y_BTAD = h_MD[jnp.argsort(order_M)].reshape(*experts_BTA.shape, D)
  y_BTD = (y_BTAD * weights_BTA[..., None]).sum(2).astype(x_BTD.dtype)
  return jax.lax.psum_scatter(y_BTD, mesh_axes, tiled=True) if mesh_axes else y_BTD


def with_capacity(
  x_BTD: jax.Array,
  weights_BTA: jax.Array,
  experts_BTA: jax.Array,
  kernels: Kernels,
  mesh_axes: tuple[str, ...] = (),
  *,
  cfg: ResolvedModel,
  capacity: int,
) -> jax.Array:
  """Each expert serves the first C choices of every row; later ones are dropped.

  Choices are ordered by token, then by probability, so that whether a token is served
  depends on no later token. With experts sharded over `mesh_axes`, served tokens are sent
  to their experts, and the results sent back.
  """
  (B, T, A), D, C = experts_BTA.shape, x_BTD.shape[-1], capacity
  E = cfg.moe.num_experts
  experts_BM = experts_BTA.reshape(B, T * A)
  order_BM = jnp.argsort(experts_BM, -1)  # stable: the choices of an expert stay in order
  sizes_BE = count(experts_BM, E, (1,))
  starts_BE = jnp.cumsum(sizes_BE, -1) - sizes_BE

  places_BEC = starts_BE[..., None] + jnp.arange(C)
  places_BX = places_BEC.reshape(B, E * C)  # some, not taken, are past the end
  tokens_BX = jnp.take_along_axis(order_BM, places_BX, 1, mode="clip") // A
  h_BXD = jnp.take_along_axis(x_BTD, tokens_BX[..., None], 1)
  taken_BEC = jnp.arange(C) < sizes_BE[..., None]
  h_EBCD = jnp.where(taken_BEC[..., None], h_BXD.reshape(B, E, C, D), 0).swapaxes(0, 1)
  if mesh_axes:
    exchange = functools.partial(jax.lax.all_to_all, axis_name=mesh_axes, tiled=True)
    h_EBCD = exchange(h_EBCD, split_axis=0, concat_axis=1)
  h_ERD = h_EBCD.reshape(h_EBCD.shape[0], -1, D)
  h_ERD = feed_forward(cfg, h_ERD, kernels, functools.partial(jnp.einsum, "ERX,EXY->ERY"))
  h_EBCD = h_ERD.reshape(h_EBCD.shape)
  if mesh_axes:
    h_EBCD = exchange(h_EBCD, split_axis=1, concat_axis=0)

  ranks_BM = jnp.argsort(order_BM, -1)
  padded_starts = jnp.pad(starts_BE, ((0, 0), (0, 1)))  # padding has chosen expert E
  slots_BM = ranks_BM - jnp.take_along_axis(padded_starts, experts_BM, 1)
  served_BM = (slots_BM < C) & (experts_BM < E)
  places_BM = jnp.where(served_BM, experts_BM * C + slots_BM, 0)
  h_BXD = h_EBCD.swapaxes(0, 1).reshape(B, E * C, D)
  y_BMD = jnp.take_along_axis(h_BXD, places_BM[..., None], 1)
  weights_BM = weights_BTA.reshape(B, T * A) * served_BM
  y_BTAD = (y_BMD * weights_BM[..., None]).reshape(B, T, A, D)
  return y_BTAD.sum(2).astype(x_BTD.dtype)


def feed_forward(
  cfg: ResolvedModel, x: jax.Array, kernels: Kernels, dot: Callable
) -> jax.Array:
  """A `FeedForward`'s computation; `dot` multiplies each row by its expert's kernel."""
  h = dot(x, kernels["up"])
  gate = dot(x, kernels["gate"]) if cfg.gated else None
  return dot(activate(h, cfg.activation, gate), kernels["down"])
