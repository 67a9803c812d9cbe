# SPDX-License-Identifier: Apache-2.0
"""A device mesh as a config writes it, `data=2@dcn,fsdp=4`, and its sizes."""

import math
import re
from collections.abc import Iterator, Mapping

from flaxlm.errors import ConfigError

MESH_AXES = ("stage", "data", "fsdp", "context", "tensor", "expert")

SLOW = "@dcn"  # after a size: the axis joins slices or hosts, over the data-centre network

MeshConfig = Mapping[str, int | str]


def parse_mesh(text: str) -> dict[str, int | str]:
  """`data=2@dcn,fsdp=4` -> {"data": "2@dcn", "fsdp": 4}."""
  mesh: dict[str, int | str] = {}
  if not isinstance(text, str):
    raise ConfigError(f"mesh is {text!r}, not a text", "as in data=2,fsdp=4")
  for part in text.split(","):
    axis, _, size = part.partition("=")
    try:
      number = int(size.removesuffix(SLOW))
    except ValueError:
      raise ConfigError(
        f"mesh {text!r}: {part!r} is not AXIS=SIZE", "as in data=2,fsdp=4, or data=2@dcn"
      ) from None
    if axis in mesh:
      raise ConfigError(f"mesh {text!r} names {axis} twice")
    mesh[axis] = f"{number}{SLOW}" if size.endswith(SLOW) else number
  mistakes = list(mesh_mistakes(mesh))
  if mistakes:
    raise ConfigError(*mistakes[0])
  return mesh


def mesh_mistakes(mesh: MeshConfig) -> Iterator[tuple[str, str]]:
  """(cause, cure) of every unusable entry of a mesh."""
  sizes = []
  for axis, entry in mesh.items():
    text = str(entry).removesuffix(SLOW)
    if axis not in MESH_AXES:
      yield f"unknown mesh axis {axis!r}", f"mesh axes are {', '.join(MESH_AXES)}"
    elif not re.fullmatch(r"-?\d+", text):
      yield f"mesh axis {axis}={entry}", "a size is a whole number, as in 2 or 2@dcn"
    elif int(text) < 1 and int(text) != -1:
      yield f"mesh axis {axis}={entry}", "a size is at least 1, or -1 for the rest"
    sizes.append(text)
  if sizes.count("-1") > 1:
    yield "more than one mesh axis is -1", "only one axis can take the rest"


def mesh_sizes(mesh: MeshConfig) -> dict[str, int]:
  """The number of devices along each axis that a mesh names, on either network."""
  return {axis: int(str(size).removesuffix(SLOW)) for axis, size in mesh.items()}


def mesh_shape(mesh: MeshConfig, num_devices: int | None = None) -> dict[str, int]:
  """Every mesh axis with its size, 1 where `mesh` does not name it, and -1 resolved.

  Raises `ConfigError` when the mesh does not use exactly `num_devices` devices, or leaves a
  size open although their number is not known (None).
  """
  shape = dict.fromkeys(MESH_AXES, 1) | mesh_sizes(mesh)
  open_axes = [axis for axis, size in shape.items() if size == -1]
  known = math.prod(size for size in shape.values() if size != -1)
  text = ",".join(f"{axis}={size}" for axis, size in mesh.items())
  if open_axes and num_devices is None:
    raise ConfigError(f"mesh {text} leaves a size open", "give --devices N, or the size")
  for axis in open_axes:
    assert num_devices is not None
    shape[axis] = num_devices // known
  total = math.prod(shape.values())
  if num_devices is not None and total != num_devices:
    needed = f"a multiple of {known}" if open_axes else str(total)
    cure = "" if open_axes else ", or let one axis be -1"
    raise ConfigError(
      f"mesh {text} needs {needed} devices, {num_devices} present",
      f"use --mesh data={num_devices}{cure}",
    )
  return shape


def slow_axes(mesh: MeshConfig) -> tuple[str, ...]:
  """The axes that a mesh puts on the network between slices or hosts, in mesh order."""
  return tuple(axis for axis in MESH_AXES if str(mesh.get(axis, 1)).endswith(SLOW))
