# SPDX-License-Identifier: Apache-2.0
"""A refactoring must not change results: losses to 1e-5, tokens exactly."""

import itertools
import json

import numpy as np
import pytest
from conftest import slow, slow_but
from golden_runs import FIGURES, MESHES, MODELS, decoded, held_out, trained

FAST = ("decoder",)  # the slow tests have the others
STORED = json.loads(FIGURES.read_text("utf-8"))


@pytest.mark.parametrize(
  ("name", "mesh"),
  [
    (name, mesh) if name in FAST else slow(name, mesh)
    for name, mesh in itertools.product(MODELS, MESHES)
  ],
)
def test_ten_steps_have_the_losses_that_they_had(name: str, mesh: str):
  stored = STORED[name]["losses"][mesh]
  np.testing.assert_allclose(trained(name, mesh)[2], stored, rtol=1e-5)
  assert stored[-1] < stored[0] - 0.3, (
    "it learnt something, so that there is something to lose"
  )


@pytest.mark.parametrize("name", slow_but(FAST, MODELS))
def test_held_out_text_has_the_loss_that_it_had(name: str):
  np.testing.assert_allclose(held_out(name), STORED[name]["held_out"], rtol=1e-5)


@pytest.mark.parametrize("kind", ["greedy", "drawn"])
@pytest.mark.parametrize("name", slow_but(FAST, MODELS))
def test_tokens_are_those_that_were_chosen(name: str, kind: str):
  tokens = decoded(name, {"greedy": 0.0, "drawn": 1.0}[kind])
  assert tokens == STORED[name][kind]
  assert len({token for row in tokens for token in row}) > 2, "not one token over and over"
