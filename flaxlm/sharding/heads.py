# SPDX-License-Identifier: Apache-2.0
"""Key/value heads on a `tensor` axis that has more members than there are kv heads.

Every device then holds the one kv head that its query heads read, so each kv head is on
several devices. For them the mesh has the axis `tensor` as two: `tensor`, which cuts kv
heads as well, and `kv_copies`, which cuts all that `tensor` cuts, but not kv heads. A user
names `tensor` alone, the product of the two, and everything that a user reads does so too.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from flaxlm.config import ModelConfig, ResolvedModel
from flaxlm.errors import ConfigError

KV_COPIES = "kv_copies"
MOST_MEMBERS = 4096  # of an axis, that an error names as a size that would do


def kv_parts(model: ModelConfig | ResolvedModel, tensor: int) -> int:
  """Into how many parts a `tensor` axis of this size cuts the kv heads of a model: as many
  as it has members, or K of them, with copies of each on `tensor` / K devices.

  Raises `ConfigError`, which names the sizes that would do, unless whole query heads come
  to every device together with the kv heads that they read.
  """
  if model.family == "rnn":
    return tensor
  num_heads = model.num_heads
  num_kv_heads = model.num_kv_heads or num_heads
  fits = lambda n: num_heads % n == 0 and (num_kv_heads % n == 0 or n % num_kv_heads == 0)
  if not fits(tensor):
    heads = f"model.num_heads={num_heads}"
    if num_kv_heads != num_heads:
      heads += f" and model.num_kv_heads={num_kv_heads}"
    fitting = [n for n in range(1, min(num_heads, MOST_MEMBERS) + 1) if fits(n)]
    raise MeshError(
      f"{heads} cannot be split over mesh tensor={tensor}", "", {"tensor": fitting}
    )
  return min(tensor, num_kv_heads)


def describe_copies(model: ModelConfig | ResolvedModel, tensor: int) -> str:
  """A line about the copies of kv heads on a `tensor` axis; "" if there are none."""
  parts = kv_parts(model, tensor)
  if parts == tensor:
    return ""
  return (
    f"kv heads: {parts} on mesh tensor={tensor}, each on {tensor // parts} devices, which "
    "all hold its weights and cache"
  )


def split_sizes(
  sizes: Mapping[str, int], model: ModelConfig | ResolvedModel
) -> dict[str, int]:
  """The axes of a mesh for a model, `tensor` as two where it has to be; errors as in
  `kv_parts`."""
  split = dict[str, int]()
  for axis, size in whole_sizes(sizes).items():
    parts = kv_parts(model, size) if axis == "tensor" else size
    split[axis] = parts
    if parts != size:
      split[KV_COPIES] = size // parts
  return split


def whole_sizes(sizes: Mapping[str, int]) -> dict[str, int]:
  """The axes as a user names them: the opposite of `split_sizes`."""
  whole = {axis: size for axis, size in sizes.items() if axis != KV_COPIES}
  if KV_COPIES in sizes:
    whole["tensor"] = whole.get("tensor", 1) * sizes[KV_COPIES]
  return whole


def mesh_for(mesh: Mesh, model: ModelConfig | ResolvedModel) -> Mesh:
  """The same devices in the same order, as a mesh on which each has the kv heads that its
  query heads read; errors as in `kv_parts`."""
  sizes: Any = split_sizes(mesh.shape, model)
  if sizes == dict(mesh.shape):
    return mesh
  grid = mesh.devices.reshape(list(sizes.values()))
  return Mesh(grid, tuple(sizes), axis_types=(mesh.axis_types[0],) * len(sizes))


FAILS_AGAIN = ", but then another check fails"


class MeshError(ConfigError):
  """A dim that a mesh does not divide; `sizes` are those of its axes that would.

  The cure is `advice`, the sizes, introduced by `lead`, and `more`.
  """

  def __init__(
    self,
    cause: str,
    advice: str,
    sizes: Mapping[str, Sequence[int]],
    lead: str = "",
    more: str = "",
  ):
    offered = "; or ".join(one_of(axis, some) for axis, some in sizes.items() if some)
    super().__init__(cause, advice + (lead + offered if offered else "") + more)
    self.parts, self.sizes = (advice, lead, more), sizes

  def keeping(self, passes: Callable[[str, int], bool]) -> "MeshError":
    """The error that offers only what also `passes` everything else; if nothing does, what
    would divide here, with the word that it is not enough."""
    kept: dict[str, Sequence[int]] = {
      axis: [n for n in some if passes(axis, n)] for axis, some in self.sizes.items()
    }
    advice, lead, more = self.parts
    if not any(kept.values()) and any(self.sizes.values()):
      kept = dict(self.sizes)
      more = more if FAILS_AGAIN in more else FAILS_AGAIN + more
    return MeshError(self.cause, advice, kept, lead, more)


@contextlib.contextmanager
def offering(check: Callable[[str, int], object]) -> Iterator[None]:
  """Within it, errors offer those sizes of an axis alone for which `check` is silent."""

  def passes(axis: str, size: int) -> bool:
    try:
      check(axis, size)
    except ConfigError:
      return False
    return True

  try:
    yield
  except MeshError as e:
    raise e.keeping(passes) from e


def one_of(axis: str, sizes: Sequence[int]) -> str:
  """Which sizes an axis can have, in words."""
  *others, last = map(str, sizes)
  return f"{axis} can be {' or '.join([', '.join(others)] * bool(others) + [last])}"
