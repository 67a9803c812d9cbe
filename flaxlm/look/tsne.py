# SPDX-License-Identifier: Apache-2.0
"""t-SNE, which lays out points on a plane so that near ones stay near (van der Maaten and
Hinton, 2008): exact, that is with all pairs of points, and the same each time."""

import jax
import jax.numpy as jnp
import numpy as np

PERPLEXITY = 20.0  # about how many neighbours a point tries to keep
NUM_STEPS, NUM_EARLY = 400, 100
EXAGGERATION = 12.0  # of attraction, in the early steps
HALVINGS = 30  # of the range in which each point's width is sought


def tsne(points_ND: np.ndarray, perplexity: float = PERPLEXITY) -> np.ndarray:
  """A layout (N, 2) of points by their Euclidean distances, centred, of mean square 1.

  It starts from the two directions of the largest variance (Kobak and Berens, 2019), so
  it has no seed. Costs N^2 per step in time, and twice N^2 numbers of memory.
  """
  N = len(points_ND)
  centred_ND = points_ND - points_ND.mean(0)
  _, _, directions_DD = np.linalg.svd(centred_ND.T @ centred_ND, hermitian=True)
  start_N2 = centred_ND @ directions_DD[:2].T
  start_N2 = np.pad(start_N2, ((0, 0), (0, 2 - start_N2.shape[1])))
  start_N2 = 1e-4 * start_N2 / max(start_N2[:, 0].std(), 1e-30)
  perplexity = min(perplexity, max((N - 1) / 3, 1.0))  # a few points have few neighbours
  layout_N2 = np.asarray(lay_out(np.float32(centred_ND), np.float32(start_N2), perplexity))
  return layout_N2 / max(float(np.sqrt((layout_N2**2).mean())), 1e-30)


@jax.jit
def lay_out(points_ND: jax.Array, start_N2: jax.Array, perplexity: float) -> jax.Array:
  N = len(points_ND)
  shares_NN = affinities(points_ND, perplexity)
  rate = jnp.maximum(N / EXAGGERATION / 4, 50.0)  # Belkina et al., 2019

  def step(number: jax.Array, state: tuple) -> tuple:
    y_N2, speed_N2, gains_N2 = state
    early = number < NUM_EARLY
    gradient_N2 = gradient(shares_NN * jnp.where(early, EXAGGERATION, 1.0), y_N2)
    turned = jnp.sign(gradient_N2) != jnp.sign(speed_N2)
    gains_N2 = jnp.maximum(jnp.where(turned, gains_N2 + 0.2, gains_N2 * 0.8), 0.01)
    momentum = jnp.where(early, 0.5, 0.8)
    speed_N2 = momentum * speed_N2 - rate * gains_N2 * gradient_N2
    y_N2 = y_N2 + speed_N2
    return y_N2 - y_N2.mean(0), speed_N2, gains_N2

  state = (start_N2, jnp.zeros_like(start_N2), jnp.ones_like(start_N2))
  return jax.lax.fori_loop(0, NUM_STEPS, step, state)[0]


def gradient(shares_NN: jax.Array, y_N2: jax.Array) -> jax.Array:
  """Of KL(P || Q): 4 sum_j (p_ij - q_ij) (y_i - y_j) / (1 + |y_i - y_j|^2)."""
  # On a GPU, a product of matrices would round these to ten bits.
  near_NN = 1 / (1 + ((y_N2[:, None] - y_N2) ** 2).sum(-1))
  near_NN = near_NN * (1 - jnp.eye(len(y_N2), dtype=near_NN.dtype))
  pull_NN = (shares_NN - near_NN / near_NN.sum()) * near_NN
  return 4 * (
    pull_NN.sum(1, keepdims=True) * y_N2 - jnp.matmul(pull_NN, y_N2, precision="highest")
  )


def squares(x_ND: jax.Array) -> jax.Array:
  """The squared distance of each two points."""
  of_N = (x_ND**2).sum(1)
  products_NN = jnp.matmul(x_ND, x_ND.T, precision="highest")
  return jnp.maximum(of_N[:, None] + of_N - 2 * products_NN, 0)


def affinities(points_ND: jax.Array, perplexity: float) -> jax.Array:
  """P: how near each two points are, all together 1. Each point's Gaussian has the width
  at which the entropy of its neighbours is that of `perplexity` even ones."""
  N = len(points_ND)
  apart_NN = squares(points_ND)
  itself_NN = jnp.eye(N, dtype=bool)

  def shares_of(log_sharpness_N: jax.Array) -> jax.Array:
    scores_NN = -apart_NN * jnp.exp(log_sharpness_N)[:, None]
    return jax.nn.softmax(jnp.where(itself_NN, -jnp.inf, scores_NN), -1)

  def halve(_: int, ends: tuple) -> tuple:
    low_N, high_N = ends
    middle_N = (low_N + high_N) / 2
    shares_NN = shares_of(middle_N)
    wide_N = jax.scipy.special.entr(shares_NN).sum(-1) > jnp.log(perplexity)
    return jnp.where(wide_N, middle_N, low_N), jnp.where(wide_N, high_N, middle_N)

  scale = jnp.log(jnp.maximum(apart_NN.mean(), 1e-30))
  ends = jnp.full(N, -15.0) - scale, jnp.full(N, 15.0) - scale
  low_N, high_N = jax.lax.fori_loop(0, HALVINGS, halve, ends)
  shares_NN = shares_of((low_N + high_N) / 2)
  return (shares_NN + shares_NN.T) / (2 * N)
