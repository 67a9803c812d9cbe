# SPDX-License-Identifier: Apache-2.0
"""Every legal mesh, remat policy and accumulation for some devices, ranked."""

import dataclasses
import itertools
import math
from collections.abc import Iterator

from flaxlm.config import (
  MESH_AXES,
  Remat,
  ResolvedConfig,
  mesh_shape,
  mesh_sizes,
  slow_axes,
)
from flaxlm.devices import Device
from flaxlm.errors import ConfigError
from flaxlm.planning.memory import Sizes, state_bytes
from flaxlm.planning.roofline import Plan, plan_training
from flaxlm.sharding import least_rows

REMATS: tuple[Remat, ...] = ("none", "dots", "full")
MOST_DEVICES = 4096  # the most that are tried for a plan that does not fit


def search(cfg: ResolvedConfig, device: Device, num_devices: int) -> list[Plan]:
  """Every mesh and remat policy that is possible on `num_devices`; the fastest that fits
  comes first.

  Each has the least accumulation that fits, because more is slower. The axes that
  `cfg.mesh` puts on the slow network keep their sizes.
  """
  given, slow = mesh_sizes(cfg.mesh), slow_axes(cfg.mesh)
  plans = [
    plan
    for sizes in meshes(cfg, num_devices)
    if all(given[axis] in (-1, sizes[axis]) for axis in slow)
    for remat in REMATS
    if (plan := _best_accumulation(cfg, device, sizes, remat)) is not None
  ]
  return sorted(plans, key=_rank)


def meshes(cfg: ResolvedConfig, num_devices: int) -> Iterator[dict[str, int]]:
  """Every way to write `num_devices` as a product over the mesh axes."""
  divisors = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
  experts = cfg.model.moe.num_experts
  for fsdp, tensor, expert in itertools.product(divisors, divisors, divisors):
    if num_devices % (fsdp * tensor * expert) == 0 and (expert == 1 or experts):
      data = num_devices // (fsdp * tensor * expert)
      used = {"data": data, "fsdp": fsdp, "tensor": tensor, "expert": expert}
      yield {axis: used.get(axis, 1) for axis in MESH_AXES}


def _best_accumulation(
  cfg: ResolvedConfig, device: Device, sizes: Sizes, remat: Remat
) -> Plan | None:
  """The plan with the least accumulation that fits; if none fits, with the most."""
  rows = cfg.data.batch_size // least_rows(cfg.training, sizes)
  steps = [n for n in range(1, rows + 1) if rows % n == 0]

  def choose(number: int) -> Plan:
    training = dataclasses.replace(cfg.training, remat=remat, accumulation_steps=number)
    model = cfg.model.padded(sizes["tensor"])
    changed = dataclasses.replace(cfg, training=training, model=model)
    return plan_training(changed, sizes, device)

  if not steps:
    return None
  try:
    most = choose(steps[-1])
  except ConfigError:  # this mesh does not divide some dim
    return None
  # The sums of gradients that accumulation needs may take more memory than fewer rows save.
  if most.fits is False and choose(1).fits is False:
    return most
  return next(plan for n in steps if (plan := choose(n)).fits is not False)


def _rank(plan: Plan) -> tuple:
  seconds = plan.times.seconds
  slow = float("inf") if seconds is None else seconds
  return plan.fits is False, slow, plan.memory.total


def cheapest_fit(cfg: ResolvedConfig, sizes: Sizes, device: Device) -> Plan | None:
  """The smallest change that makes a config fit: of remat and accumulation, else of the
  mesh, else with norms on shares of a row as well, else of the number of devices. None if
  nothing up to `MOST_DEVICES` fits.
  """
  same_mesh = [_best_accumulation(cfg, device, sizes, remat) for remat in REMATS]
  fitting = [plan for plan in same_mesh if plan and plan.fits]
  if fitting:
    return min(fitting, key=_rank)
  number = math.prod(sizes.values())
  least = state_bytes(cfg, mesh_shape({}))
  while number <= MOST_DEVICES:
    possible = (least.parameters + least.optimizer_state) / number < (
      device.usable_bytes or math.inf
    )
    for shared in (cfg, sharing_rows(cfg)) if possible else ():
      found = search(shared, device, number)
      if found and found[0].fits:
        return found[0]
    number *= 2
  return None


def nearest(cfg: ResolvedConfig, device: Device, number: int) -> Plan | None:
  """The best plan on the number of devices next to `number` that has any; fewer before
  more. None up to twice as many."""
  for apart in range(1, number + 1):
    for other in (number - apart, number + apart):
      found = search(cfg, device, other) if other else []
      if found:
        return found[0]
  return None


def sharing_rows(cfg: ResolvedConfig) -> ResolvedConfig:
  """The config with `sequence_parallel`, so that `tensor` also divides what is kept."""
  training = dataclasses.replace(cfg.training, sequence_parallel=True)
  return dataclasses.replace(cfg, training=training)
