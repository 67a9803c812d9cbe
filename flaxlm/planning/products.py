# SPDX-License-Identifier: Apache-2.0
"""The matrix products of a training step and of a decoding step, one by one.

FLOPs alone predict the time of a step where every product runs at the same rate. On a CPU
a small product, or a batch of small ones, runs at a third of the rate of a large one. Where
the shapes at hand were measured, predictions use those rates (`Device.product_rates`).
"""

import functools
import math
from collections import Counter
from typing import NamedTuple

import flax.linen as nn
import jax

from flaxlm.config import FUSED, ResolvedConfig, ResolvedModel
from flaxlm.cost import computed_blocks, forward_work, routed_weights
from flaxlm.nn.models import boxed_shapes, build_model
from flaxlm.training.optimizer import matrix_dims

NEWTON_SCHULZ_STEPS = 5  # optax's muon


class Product(NamedTuple):
  """`batch` products of (rows, inner) and (inner, columns)."""

  rows: int
  inner: int
  columns: int
  batch: int = 1

  @property
  def flops(self) -> float:
    return 2.0 * self.batch * self.rows * self.inner * self.columns

  @property
  def elements(self) -> int:
    """Elements of both operands and of the result."""
    M, K, N, G = self
    return G * (M * K + K * N + M * N)

  @property
  def text(self) -> str:
    M, K, N, G = self
    return (f"{G} x " if G > 1 else "") + f"{M}x{K}x{N}"

  @property
  def gradients(self) -> tuple["Product", "Product"]:
    """The products of the backward pass: gradients of the left and of the right operand."""
    M, K, N, G = self
    return Product(M, N, K, G), Product(K, M, N, G)


Products = Counter[Product]


def is_listed(cfg: ResolvedConfig) -> bool:
  """Whether this module can list the products of a resolved config: those of dense decoders
  without remat, accumulation, adapters, or a loss in chunks."""
  model, training = cfg.model, cfg.training
  return (
    model.family == "decoder"
    and not model.moe.num_experts
    and training.remat == "none"
    and training.accumulation_steps == training.loss_chunks == 1
    and not cfg.lora.rank
  )


def training_products(cfg: ResolvedConfig) -> Products:
  """How often each product occurs in a training step on one device: in the forward pass,
  the backward pass and the update. Those inside a fused attention kernel are left out."""
  model = cfg.model
  B, T = cfg.data.batch_size, cfg.data.seq_len
  K, H, G = model.num_kv_heads, model.head_dim, model.num_heads // model.num_kv_heads
  forward = weight_products(model, B * T)
  blocked = cfg.training.attention not in FUSED
  for kind in model.layer_kinds() if blocked else "":
    for queries, seen in computed_blocks(T, model.window_of(kind)):
      forward[Product(G * queries, H, seen, B * K)] += 1
      forward[Product(G * queries, seen, H, B * K)] += 1
  found = Counter(forward)
  for _ in range(cfg.reference_passes):
    found.update(forward)
  for product, count in forward.items():
    for gradient in product.gradients:
      found[gradient] += count
  if cfg.optimizer.kind == "muon":
    found.update(muon_products(model))
  return found


def narrow_flops(cfg: ResolvedConfig) -> float:
  """FLOPs of a step whose operands `training.matmul` rounds to 8 bits: those of the blocks'
  projections, not of experts, of their router or of the head (`nn.quantized`). int8 leaves
  the gradients of kernels as they are; of a frozen kernel there is none."""
  training, model = cfg.training, cfg.model
  if training.matmul == "full":
    return 0.0
  work = forward_work(model, cfg.data.batch_size, cfg.data.seq_len, cfg.source_length)
  tokens = cfg.data.batch_size * cfg.data.seq_len
  once = work.matmul - 2.0 * tokens * model.depth * routed_weights(model)
  passes = 2 + (training.matmul == "fp8" and not cfg.lora.rank) + cfg.reference_passes
  again = once - work.added if training.remat not in ("none", "dots") else 0.0
  return passes * once + again


def weight_products(model: ResolvedModel, rows: int) -> Products:
  """The products with weights of a forward pass over `rows` tokens: of all layers and the
  head."""
  D, F, L = model.width, model.ffn_width, model.depth
  queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
  found = Counter[Product]()
  for inner, columns, count in (
    (D, queries, L),
    (D, keys, 2 * L),
    (queries, D, L),
    (D, F, L * (2 if model.gated else 1)),
    (F, D, L),
    (D, model.vocab_size, 1),
  ):
    found[Product(rows, inner, columns)] += count
  return found


def muon_products(model: ResolvedModel) -> Products:
  """The products of Newton-Schulz on every kernel of the blocks, each layer's as a matrix
  of shape (n, m), n <= m: X X^T, its square, and that times X, in each iteration (Jordan,
  2024)."""
  found = Counter[Product]()
  for n, m, layers in _kernels(model):
    for inner, columns in ((m, n), (n, n), (n, m)):
      found[Product(n, inner, columns, layers)] += NEWTON_SCHULZ_STEPS
  return found


@functools.lru_cache(maxsize=8)
def _kernels(model: ResolvedModel) -> list[tuple[int, int, int]]:
  """(n, m, number of matrices) of every kernel that Muon updates, as Muon reshapes them."""
  params = nn.unbox(boxed_shapes(build_model(model)))
  is_view = lambda x: x is None or hasattr(x, "reduction_axis")
  views = jax.tree.leaves(matrix_dims(params), is_leaf=is_view)
  found = []
  for leaf, view in zip(jax.tree.leaves(params), views, strict=True):
    if view is not None:
      inner = math.prod(leaf.shape[axis] for axis in view.reduction_axis)
      outer = math.prod(leaf.shape[axis] for axis in view.output_axis)
      n, m = sorted((inner, outer))
      found.append((n, m, leaf.size // (n * m)))
  return found
