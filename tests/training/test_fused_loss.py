# SPDX-License-Identifier: Apache-2.0
"""The loss in chunks, whose gradient is made in the forward pass, is the loss of all."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxlm.config import ModelConfig, TrainingConfig
from flaxlm.data.objectives import Batch
from flaxlm.nn.models import build_model, init_params
from flaxlm.training.step import losses_of

B, T = 2, 8
SIZES = dict(depth=1, width=16, num_heads=2, vocab_size=40, num_ids=37, context=T)
HEADS = {
  "tied": dict(tied_embeddings=True),
  "of_its_own": dict(tied_embeddings=False, logit_softcap=5.0),
  "bert": dict(
    tied_embeddings=True, head_biased=True, head_transform=True, logit_scale=0.5
  ),
}


def some(head, dtype="float32"):
  """(model, config, parameters, hidden vectors, batch); some weights are below 0."""
  cfg = TrainingConfig(label_smoothing=0.1, dtype=dtype)
  model = build_model(ModelConfig(**SIZES, **HEADS[head]), cfg)
  params = nn.unbox(jax.jit(init_params, static_argnums=0)(model, 0))
  keys = jax.random.split(jax.random.key(0), 4)
  params = jax.tree.map(
    lambda x: x + 0.1 * jnp.sin(jnp.arange(x.size)).reshape(x.shape), params
  )
  ids = jax.random.randint(keys[0], (2, B, T), 0, 37)
  weights, advantages = jax.random.normal(keys[1], (2, B, T))
  ones = jnp.ones((B, T), jnp.int32)
  batch = Batch(*ids, ones, ones, jnp.abs(weights), advantages_BT=advantages)
  x = jax.random.normal(keys[2], (B, T, 16), dtype)
  return model, cfg, params, x, batch


def loss_and_gradients(model, cfg, params, x, batch, chunks, **options):
  cfg = dataclasses.replace(cfg, loss_chunks=chunks)

  def minimised(params, x):
    total, told = losses_of(model, cfg, params, x, batch, **options)
    return 3 * total + told, told  # `told` has no gradient

  return jax.jit(jax.value_and_grad(minimised, (0, 1), has_aux=True))(params, x)


@pytest.mark.parametrize("head", HEADS)
def test_loss_and_gradients_in_chunks_are_those_of_all(head):
  arguments = some(head)
  found = [loss_and_gradients(*arguments, chunks) for chunks in (1, 4)]
  (_, told), (grads, _) = found[0]
  assert told != 0 and any(np.abs(g).max() > 0.1 for g in jax.tree.leaves(grads))
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  jax.tree.map(close, *found)


def test_a_head_that_does_not_learn_has_no_gradient_and_the_rest_the_same():
  arguments = some("of_its_own")
  _, (_, expected) = loss_and_gradients(*arguments, 1)
  _, (grads, grad_x) = loss_and_gradients(*arguments, 4, learns_head=False)
  np.testing.assert_allclose(grad_x, expected, rtol=1e-4, atol=1e-5)
  assert not any(np.any(g) for g in jax.tree.leaves(grads))


@pytest.mark.parametrize(("learns_head", "products"), [(True, 3), (False, 2)])
def test_the_heads_products_are_computed_once(learns_head, products):
  """One forward, one for each gradient that is wanted, all in one loop."""
  model, cfg, params, x, batch = some("tied")
  cfg = dataclasses.replace(cfg, loss_chunks=4)
  total = lambda *args: losses_of(model, cfg, *args, batch, learns_head)[0]
  text = str(jax.make_jaxpr(jax.grad(total, (0, 1)))(params, x))
  assert text.count("dot_general[") == products and text.count("scan[") == 1


def test_gradients_have_the_dtypes_of_what_they_are_of():
  model, cfg, params, x, batch = some("tied", "bfloat16")
  _, (grads, grad_x) = loss_and_gradients(model, cfg, params, x, batch, 4)
  assert grad_x.dtype == jnp.bfloat16
  dtypes = lambda tree: jax.tree.map(lambda x: x.dtype, tree)
  assert dtypes(grads) == dtypes(params)
