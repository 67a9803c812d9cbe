# SPDX-License-Identifier: Apache-2.0
"""Meshes of some of the simulated devices; `make_mesh` takes all of them."""

from jax.sharding import Mesh

from flaxlm.verify import case


def mesh_of(**sizes: int) -> Mesh:
  """A mesh over as many devices as the sizes of its axes say: one if none is named."""
  return case.mesh_of(sizes)
