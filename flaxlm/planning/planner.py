# SPDX-License-Identifier: Apache-2.0
"""`flaxlm plan`: answers what the command line asks about a config on a mesh of devices."""

import dataclasses
import math
from collections.abc import Sequence

from flaxlm.config import Config, MeshConfig, ResolvedConfig, mesh_shape
from flaxlm.devices import ANY, find_device
from flaxlm.errors import ConfigError
from flaxlm.planning.compile import CompiledStep, compile_step, compiled_kernel
from flaxlm.planning.decoding import AS_COMPUTED, Stored, plan_decoding
from flaxlm.planning.report import Report
from flaxlm.planning.roofline import Plan, plan_training
from flaxlm.planning.search import cheapest_fit, search
from flaxlm.tokenizers import expected_vocab_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Questions:
  """What the command line asks."""

  mesh: MeshConfig
  device: str | None = None
  num_devices: int | None = None
  compiled: bool = False
  searched: bool = False
  batches: Sequence[int] = ()  # to decode with
  contexts: Sequence[int] | None = None  # None: three, up to the model's
  stored: Stored = AS_COMPUTED  # while decoding
  tokens: float | None = None  # to train on
  price: float | None = None  # per device and hour
  network: float | None = None  # bytes per second out of a device, beyond its domain
  power: float | None = None  # watts at which each device is held


def plan(cfg: ResolvedConfig, asked: Questions) -> Report:
  """Answers the questions. Raises `ConfigError` for an impossible mesh or device."""
  device = ANY if asked.device is None else find_device(asked.device)
  if asked.network is not None:
    device = dataclasses.replace(device, network_bandwidth=asked.network)
  if asked.power is not None:
    device = device.at_power(asked.power)
  if asked.compiled:
    device = dataclasses.replace(device, kernel=compiled_kernel(device))
  cfg = dataclasses.replace(resolve(cfg), mesh=dict(asked.mesh))
  number = asked.num_devices
  if number is None and dict(asked.mesh) == {"data": -1}:
    number = 1  # neither a mesh nor a number of devices was given
  choices = []
  if asked.searched:
    choices = search(cfg, device, number or math.prod(mesh_shape(asked.mesh).values()))
    if not choices:
      raise ConfigError(
        f"no mesh of {number} devices divides this config and its batch",
        f"data.batch_size={cfg.data.batch_size} has to be a multiple of the devices",
      )
    found = choices[0]
  else:
    sizes = mesh_shape(asked.mesh, number)
    padded = dataclasses.replace(cfg, model=cfg.model.padded(sizes["tensor"]))
    found = plan_training(padded, sizes, device)
  cfg, context = found.cfg, cfg.model.context
  compiled = compile_step(cfg, found.sizes, device) if asked.compiled else None
  drawing = None
  if cfg.data.objective == "reward":
    rows, length = cfg.data.batch_size, cfg.data.seq_len
    drawing = plan_decoding(cfg, found.sizes, device, rows, length)
  three = {max(1, context // 16), max(1, context // 4), context}
  return Report(
    plan=found,
    tokens=asked.tokens,
    price=asked.price,
    cure=find_cure(found, compiled),
    choices=choices,
    drawing=drawing,
    decoding=[
      plan_decoding(cfg, found.sizes, device, batch, length, asked.stored)
      for batch in asked.batches
      for length in asked.contexts or sorted(three)
    ],
    compiled=compiled,
  )


def find_cure(found: Plan, compiled: CompiledStep | None) -> Plan | None:
  """The cheapest change that fits; None if none is needed, or none helps.

  Where a compiler found more memory needed than was planned, the same share more is
  expected of every change.
  """
  device, usable = found.device, found.device.usable_bytes
  if compiled is None or usable is None:
    fits = found.fits
  else:
    fits = compiled.fits(usable)
    if compiled.peak_bytes is None:  # it refused for another reason
      return None
    share = min(1.0, found.memory.total / compiled.peak_bytes)
    device = dataclasses.replace(device, usable_bytes=int(usable * share))
  return cheapest_fit(found.cfg, found.sizes, device) if fits is False else None


def resolve(cfg: Config) -> ResolvedConfig:
  """`cfg` with every number of the model known.

  A tokenizer that is not trained yet counts with the vocabulary that it is to have.
  """
  return cfg.resolve(cfg.model.vocab_size or expected_vocab_size(cfg.tokenizer))
