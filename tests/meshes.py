# SPDX-License-Identifier: Apache-2.0
"""Meshes of some of the simulated devices; `make_mesh` takes all of them."""

import math

import jax
from jax.sharding import AxisType, Mesh

from flaxlm.config import MESH_AXES


def mesh_of(**sizes: int) -> Mesh:
  """A mesh over as many devices as the sizes of its axes say: one if none is named."""
  shape = [sizes.get(axis, 1) for axis in MESH_AXES]
  types = (AxisType.Auto,) * len(shape)
  devices = jax.devices()[: math.prod(shape)]
  return jax.make_mesh(shape, MESH_AXES, axis_types=types, devices=devices)
