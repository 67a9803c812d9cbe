# SPDX-License-Identifier: Apache-2.0
"""A padded vocabulary acts like the unpadded one: padding ids change nothing."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from meshes import mesh_of
from parameters import random_params
from test_training_laws import FAST, packed_batch

from flaxlm.config import ModelConfig
from flaxlm.nn.models import abstract_params, build_model, init_params
from flaxlm.sharding import make_mesh, use_mesh
from flaxlm.training.logprobs import forward
from flaxlm.training.step import eval_step, loss_and_gradient, put_batch

REAL = ModelConfig(
  depth=1, width=32, num_heads=4, vocab_size=61, context=16, tied_embeddings=False
)
ENDS = {
  "untied": dict(),
  "tied": dict(tied_embeddings=True),
  "biased": dict(head_biased=True, logit_softcap=5.0),
}
LOSSES = {
  "plain": dict(),
  "smoothed": dict(label_smoothing=0.1),
  "in_chunks": dict(label_smoothing=0.1, loss_chunks=4),
}


def batch_of():
  batch = packed_batch()
  fold = lambda ids_BT: ids_BT % REAL.vocab_size
  return batch._replace(tokens_BT=fold(batch.tokens_BT), targets_BT=fold(batch.targets_BT))


def both(cfg: ModelConfig) -> tuple[dict, dict, ModelConfig]:
  """Parameters by path, the same with padding full of garbage, and the padded config."""
  padded = cfg.resolve().padded(2)
  assert (padded.vocab_size, padded.num_ids) == (64, 61)

  def init(cfg):
    params = random_params(build_model(cfg))
    return flatten_dict(jax.tree.map(np.array, params), sep="/")

  real, garbage = init(cfg), init(padded)
  for path, array in real.items():
    garbage[path] = 10 + 0 * garbage[path]
    garbage[path][tuple(map(slice, array.shape))] = array
  return real, garbage, padded


def learn(cfg: ModelConfig, flat: dict, mesh: Any = None, **loss: Any) -> tuple:
  run, mesh = dataclasses.replace(FAST, **loss), mesh or mesh_of()
  model = build_model(cfg, run)
  shardings = jax.tree.map(lambda x: x.sharding, abstract_params(model, mesh))
  params = jax.device_put(unflatten_dict(flat, sep="/"), shardings)
  step = use_mesh(mesh)(jax.jit(functools.partial(loss_and_gradient, model, run)))
  found = step(params, put_batch(batch_of(), mesh), jax.random.key(0))
  loss_sum, gradient = jax.device_get(found)
  return loss_sum, flatten_dict(gradient, sep="/")


@pytest.mark.parametrize(
  ("ends", "loss"),
  [
    pytest.param("untied", "plain", marks=pytest.mark.slow),
    pytest.param("tied", "smoothed", marks=pytest.mark.slow),
    pytest.param("biased", "in_chunks", marks=pytest.mark.slow),
  ],
)
def test_padding_changes_no_loss_and_no_gradient(ends: str, loss: str):
  cfg = dataclasses.replace(REAL, **ENDS[ends])
  real, garbage, padded = both(cfg)
  expected_loss, expected = learn(cfg, real, **LOSSES[loss])
  for mesh in (mesh_of(), make_mesh({"fsdp": 4, "tensor": 2})):
    found_loss, found = learn(padded, garbage, mesh, **LOSSES[loss])
    np.testing.assert_allclose(found_loss, expected_loss, rtol=1e-6)
    scale = max(np.abs(g).max() for g in expected.values())
    for path, gradient in expected.items():
      place = tuple(map(slice, gradient.shape))
      np.testing.assert_allclose(found[path][place], gradient, atol=1e-6 * scale)
      rest = found[path].copy()
      rest[place] = 0
      assert not rest.any(), f"{path}: padding learns"


def test_padding_is_never_the_likeliest_and_has_no_share():
  """For an encoder, which also counts correct predictions; the garbage would win all."""
  cfg = dataclasses.replace(REAL, family="encoder", positions="learned", head_biased=True)
  real, garbage, padded = both(cfg)
  batch = jax.tree.map(jnp.asarray, batch_of())
  sums, hits = [], []
  for model_cfg, flat in ((cfg, real), (padded, garbage)):
    model, params = build_model(model_cfg, FAST), unflatten_dict(flat, sep="/")
    step = jax.jit(functools.partial(eval_step, model))
    sums.append({k: float(v) for k, v in step(params, batch).items()})
    logits_BTV = jax.jit(lambda p, b, m=model: forward(m, p, b).value)(params, batch)
    hits.append(np.asarray(logits_BTV.argmax(-1)))
    probs_BTV = jax.nn.softmax(logits_BTV, -1)
    assert not np.asarray(probs_BTV)[..., 61:].any()
  assert sums[0] == pytest.approx(sums[1], rel=1e-6)
  np.testing.assert_array_equal(*hits)


def test_without_padding_nothing_is_masked():
  """The step of a vocabulary that divides is what it was: it selects from no logits."""
  whole = dataclasses.replace(REAL, vocab_size=64)
  assert whole.resolve().padded(2) == whole.resolve()
  assert not whole.resolve().is_padded

  def text_of(cfg: ModelConfig) -> str:
    model = build_model(cfg, FAST)
    params = jax.eval_shape(functools.partial(init_params, model), jnp.uint32(0))
    x_BTD = jax.ShapeDtypeStruct((2, 3, 32), jnp.float32)
    logits = lambda params, x: model.apply({"params": params}, x, method="logits")
    return str(jax.make_jaxpr(logits)(params, x_BTD))

  assert "select_n" in text_of(REAL.resolve().padded(2))
  assert "select_n" not in text_of(whole)
