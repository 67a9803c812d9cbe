# SPDX-License-Identifier: Apache-2.0
"""The loss of a model's head in chunks of rows, with its gradient in the forward pass.

The loss is a sum over tokens, so the gradient of a chunk is known with its logits, which
are then let go: neither are the logits of all tokens (B, T, V) held, nor are any computed
again for the backward pass. What is kept is the gradient itself: that of the hidden vectors
(B, T, D), and that of the head, which is added up over the chunks in float32. Under
`jax.checkpoint` the head's products were four for three, and took a third longer.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# (head's parameters, x, targets, weights) -> (what is minimised, the loss that is told)
ChunkLoss = Callable[[Any, jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def summed_loss(
  of_chunk: ChunkLoss, head: Any, chunks: tuple, learns_head: bool = True
) -> tuple[jax.Array, jax.Array]:
  """The sums of `of_chunk` over `chunks`, x (C, B, T, D), targets and weights (C, B, T).

  Only the first has a gradient: for x and, if `learns_head`, for the head's parameters.
  """
  total, told = summed((of_chunk, learns_head), head, *chunks)
  return total, jax.lax.stop_gradient(told)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def summed(how: tuple[ChunkLoss, bool], head: Any, *chunks: jax.Array) -> tuple:
  """Without a gradient."""

  def add(sums: tuple, chunk: tuple) -> tuple[tuple, None]:
    return jax.tree.map(jnp.add, sums, how[0](head, *chunk)), None

  return jax.lax.scan(add, (jnp.zeros(()), jnp.zeros(())), chunks)[0]


def summed_forward(how: tuple[ChunkLoss, bool], head: Any, *chunks: jax.Array) -> tuple:
  of_chunk, learns_head = how

  def add(carried: tuple, chunk: tuple) -> tuple[tuple, jax.Array]:
    sums, grad_head = carried
    x, *others = chunk
    of = lambda learning: of_chunk(
      learning[0] if learns_head else head, learning[1], *others
    )
    total, pull, told = jax.vjp(of, (head if learns_head else None, x), has_aux=True)
    ((grad, grad_x),) = pull(jnp.ones_like(total))
    grad_head = jax.tree.map(lambda s, g: s + g.astype(s.dtype), grad_head, grad)
    return (jax.tree.map(jnp.add, sums, (total, told)), grad_head), grad_x

  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), head)
  first = ((jnp.zeros(()), jnp.zeros(())), zeros if learns_head else None)
  (sums, grad_head), grad_x = jax.lax.scan(add, first, chunks)
  return sums, (head if learns_head else None, grad_head, grad_x)


def summed_backward(how: tuple[ChunkLoss, bool], kept: tuple, grads: tuple) -> tuple:
  head, grad_head, grad_x = kept
  scale = grads[0]
  if grad_head is not None:
    grad_head = jax.tree.map(lambda g, x: (scale * g).astype(x.dtype), grad_head, head)
  return grad_head, scale.astype(grad_x.dtype) * grad_x, None, None


summed.defvjp(summed_forward, summed_backward)
