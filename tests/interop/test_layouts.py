# SPDX-License-Identifier: Apache-2.0
"""The layouts of imported weights: where each number of theirs lands in our parameters."""

import itertools

import numpy as np
import pytest

from flaxlm.interop.layouts import Dense, FromOne, Layout, Rows, array, transpose

D, N, K, H = 5, 4, 2, 6


def numbers(*shape: int) -> np.ndarray:
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def check(layout: Layout, theirs: np.ndarray, *ours: np.ndarray) -> None:
  """Importing `theirs` gives `ours`, and exporting `ours` gives `theirs`."""
  shapes = [x.shape for x in ours]
  assert layout.shape(shapes) == theirs.shape
  for found, wanted in zip(layout.to_ours(theirs, shapes), ours, strict=True):
    np.testing.assert_array_equal(found, wanted)
  np.testing.assert_array_equal(layout.to_theirs(ours), theirs)


def test_a_matrix_has_outputs_before_inputs():
  theirs = numbers(N * H, D)
  ours = np.empty((D, N, H), np.float32)
  for d, n, h in np.ndindex(ours.shape):
    ours[d, n, h] = theirs[n * H + h, d]
  check(Dense(), theirs, ours)
  check(Dense(transposed=False), theirs.T, ours)
  check(Dense(0, transposed=False), theirs[:, 0], ours[0])


def test_the_inputs_of_attentions_output_are_its_heads():
  theirs = numbers(D, N * H)
  ours = np.empty((N, H, D), np.float32)
  for n, h, d in np.ndindex(ours.shape):
    ours[n, h, d] = theirs[d, n * H + h]
  check(Dense(2), theirs, ours)


def test_fused_projections_follow_one_another():
  q, k, v = numbers(D, N, H), numbers(D, K, H) + 1, numbers(D, K, H) + 2
  theirs = np.concatenate([x.reshape(D, -1).T for x in (q, k, v)])
  check(Dense(), theirs, q, k, v)
  bias = np.concatenate([x[0].reshape(-1) for x in (q, k, v)])
  check(Dense(0, transposed=False), bias, q[0], k[0], v[0])


def test_interleaved_projections_alternate_from_head_to_head():
  qkv = [numbers(D, N, H) + part for part in range(3)]
  theirs = np.empty((N * 3 * H, D), np.float32)
  for part, n, h, d in itertools.product(range(3), range(N), range(H), range(D)):
    theirs[n * 3 * H + part * H + h, d] = qkv[part][d, n, h]
  check(Dense(interleaved=True), theirs, *qkv)
  biases = [x[0] for x in qkv]
  check(Dense(0, transposed=False, interleaved=True), theirs[:, 0], *biases)


@pytest.mark.parametrize("turning", [2, 4, 6])
def test_neighbouring_pairs_become_halves(turning: int):
  theirs = numbers(N * H, D)
  ours = theirs.T.reshape(D, N, H).copy()
  for pair in range(turning // 2):
    for n in range(N):
      ours[:, n, pair] = theirs[n * H + 2 * pair]
      ours[:, n, turning // 2 + pair] = theirs[n * H + 2 * pair + 1]
  check(Dense(pairs=turning), theirs, ours)


def test_the_others():
  check(Dense(0), np.arange(12.0), np.arange(12.0).reshape(3, 4))
  check(FromOne(), np.float32([0, -1, 0.5]), np.float32([1, 0, 1.5]))
  table = numbers(7, D)
  assert Rows(2).shape([(5, D)]) == (7, D)
  np.testing.assert_array_equal(Rows(2).to_ours(table, [(5, D)])[0], table[2:])
  back = Rows(2).to_theirs([table[2:]])
  assert not back[:2].any() and (back[2:] == table[2:]).all()


@pytest.mark.parametrize("shape", [(1, 1), (3, 700), (128, 2), (129, 257), (0, 4)])
def test_a_transposition_in_stripes_is_one(shape: tuple[int, int]):
  matrix = numbers(*shape)
  np.testing.assert_array_equal(transpose(matrix), matrix.T)


def test_a_row_names_every_layer_and_expert():
  row = array("h.{l}.experts.{e}.w", "blocks/w")
  found = {name: (shape, at) for name, shape, at in row.tensors({"blocks/w": (2, 3, 4)})}
  assert list(found) == [f"h.{n}.experts.{e}.w" for n in range(2) for e in range(3)]
  assert found["h.1.experts.2.w"] == ((4,), (1, 2))
  assert row.applies({"blocks/w": (2, 3, 4)}) and not row.applies({"blocks/v": (2, 3, 4)})
