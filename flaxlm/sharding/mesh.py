# SPDX-License-Identifier: Apache-2.0
"""The device mesh: made from a config, on one network or two."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from flaxlm.config import SLOW, MeshConfig, mesh_shape, slow_axes
from flaxlm.errors import ConfigError, first_line


def make_mesh(mesh: MeshConfig) -> Mesh:
  """The mesh of all devices; axes not named have size 1, one size may be -1 (the rest).

  Axes on the slow network join slices or hosts; all others stay within one of them. Raises
  `ConfigError` when the sizes do not use every device, or do not match slices or hosts.
  """
  shape = mesh_shape(mesh, num_devices())
  # Linen's logical names and GSPMD's propagation need Auto axes; make_mesh's default
  # has been Explicit since jax 0.9.
  types = (AxisType.Auto,) * len(shape)
  if slow := slow_axes(mesh):
    grid = hybrid_grid(shape, slow, jax.devices())
    return Mesh(grid, tuple(shape), axis_types=types)
  return jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=types)


def num_devices() -> int:
  """How many devices there are. Raises `ConfigError` if JAX's platform cannot be had."""
  try:
    return jax.device_count()
  except (RuntimeError, AssertionError) as e:  # by an assertion of JAX where CUDA is absent
    asked = jax.config.values["jax_platforms"]
    raise ConfigError(
      f"JAX does not start with JAX_PLATFORMS={asked or ''}: {first_line(e)}",
      "install the plugin of that platform, or set JAX_PLATFORMS=cpu",
    ) from e


@contextlib.contextmanager
def use_mesh(mesh: Mesh | None) -> Iterator[None]:
  """Sets the mesh over which code that is traced meanwhile is sharded.

  Use it in a `with` block, or to wrap a function: `use_mesh(mesh)(jax.jit(step))` finds its
  mesh on any thread. Do not yield inside the block: the caller would run under the mesh
  too. None sets no mesh, and nothing is sharded.
  """
  if mesh is None:
    yield
  else:
    with jax.set_mesh(mesh):
      yield


def describe_mesh(sizes: Mapping[str, int], slow: Sequence[str] = ()) -> str:
  """The axes in use, as `--mesh` takes them."""
  used = {axis: size for axis, size in sizes.items() if size > 1}
  texts = (f"{axis}={n}{SLOW if axis in slow else ''}" for axis, n in used.items())
  return ",".join(texts) or "data=1"


def hybrid_grid(
  sizes: Mapping[str, int], slow: Sequence[str], devices: Sequence[Any]
) -> np.ndarray:
  """The devices of a mesh whose `slow` axes go from one slice or host to the next.

  Devices may say which slice they belong to (TPUs, and GPUs by host); otherwise every
  process counts as a host. The simulated devices of one process have neither, so equal runs
  of them serve as slices. Raises `ConfigError` when the product of the slow sizes is not
  the number of slices or hosts.
  """
  outer, inner = networks(sizes, slow)
  count = lambda name: len({getattr(device, name, 0) for device in devices})
  slices, hosts = count("slice_index"), count("process_index")
  if slices == hosts == 1 and devices[0].platform == "cpu":
    return consecutive_grid(outer, inner, devices)
  by_process = slices == 1 and devices[0].platform != "tpu"
  found, kind = (hosts, "hosts") if by_process else (slices, "slices")
  if math.prod(outer) != found:
    text = " x ".join(f"{axis}={sizes[axis]}" for axis in slow)
    raise ConfigError(
      f"mesh {text} on the slow network needs {math.prod(outer)} {kind}, {found} present",
      "leave @dcn out" if found == 1 else f"sizes with @dcn have to multiply to {found}",
    )
  options = dict(process_is_granule=by_process, allow_split_physical_axes=True)
  return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, **options)


def networks(sizes: Mapping[str, int], slow: Sequence[str]) -> tuple[list[int], list[int]]:
  """The sizes of all axes on the network between slices or hosts, and inside them."""
  outer = [size if axis in slow else 1 for axis, size in sizes.items()]
  return outer, [size // n for size, n in zip(sizes.values(), outer, strict=True)]


def consecutive_grid(
  outer: Sequence[int], inner: Sequence[int], devices: Sequence[Any]
) -> np.ndarray:
  """`devices` in order; each place in `outer` has consecutive ones, arranged as `inner`."""
  grid = np.array(devices, object).reshape(*outer, *inner)
  axes = [axis for n in range(len(outer)) for axis in (n, n + len(outer))]
  return grid.transpose(axes).reshape([a * b for a, b in zip(outer, inner, strict=True)])
