# SPDX-License-Identifier: Apache-2.0
"""t-SNE is what its paper says: its widths, its gradient, and what near points become."""

import jax
import jax.numpy as jnp
import numpy as np

from flaxlm.look.tsne import affinities, gradient, tsne


def test_each_point_has_as_many_neighbours_as_asked():
  points = np.random.default_rng(0).normal(size=(40, 5)) * np.linspace(0.1, 9, 40)[:, None]
  shares = np.asarray(affinities(jnp.float32(points), 6.0), np.float64)
  np.testing.assert_allclose(shares, shares.T, atol=1e-9)
  np.testing.assert_allclose([shares.sum(), np.trace(shares)], [1, 0], atol=1e-5)
  # An independent search for the width at which the entropy is log(6), point by point.
  apart = ((points[:, None] - points[None]) ** 2).sum(-1)
  own = np.zeros((40, 40))
  for n in range(40):
    low, high = 1e-6, 1e6
    for _ in range(200):
      width = np.sqrt(low * high)
      weights = np.exp(-(apart[n] - np.delete(apart[n], n).min()) / width)
      weights[n] = 0
      weights /= weights.sum()
      entropy = -(weights[weights > 0] * np.log(weights[weights > 0])).sum()
      low, high = (low, width) if entropy > np.log(6) else (width, high)
    own[n] = weights
  np.testing.assert_allclose(shares, (own + own.T) / 80, atol=2e-6)


def test_the_gradient_is_that_of_the_divergence():
  rng = np.random.default_rng(1)
  shares = affinities(jnp.float32(rng.normal(size=(12, 3))), 3.0)
  layout = jnp.float32(rng.normal(size=(12, 2)))

  def divergence(y):
    near = 1 / (1 + ((y[:, None] - y[None]) ** 2).sum(-1)) * (1 - jnp.eye(12))
    q = near / near.sum()
    safe = jnp.where(q > 0, q, 1)
    return jnp.where(q > 0, shares * jnp.log(jnp.maximum(shares, 1e-30) / safe), 0).sum()

  expected = jax.grad(divergence)(layout)
  np.testing.assert_allclose(gradient(shares, layout), expected, atol=1e-6)


def test_groups_stay_groups_and_the_picture_is_the_same_each_time():
  rng = np.random.default_rng(2)
  centers = 6 * rng.normal(size=(3, 10))
  points = np.repeat(centers, 15, 0) + rng.normal(size=(45, 10))
  layout = tsne(points)
  np.testing.assert_array_equal(layout, tsne(points))
  np.testing.assert_allclose([layout.mean(), (layout**2).mean()], [0, 1], atol=1e-4)
  apart = np.linalg.norm(layout[:, None] - layout[None], axis=-1) + 99 * np.eye(45)
  group = np.repeat(np.arange(3), 15)
  assert (group[apart.argmin(1)] == group).mean() > 0.95


def test_few_points_and_equal_ones():
  assert np.isfinite(tsne(np.zeros((5, 3)))).all()
  assert tsne(np.arange(6.0).reshape(2, 3)).shape == (2, 2)
  assert tsne(np.arange(4.0)[:, None]).shape == (4, 2)
