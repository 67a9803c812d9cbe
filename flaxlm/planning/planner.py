# SPDX-License-Identifier: Apache-2.0
"""`flaxlm plan`: answers what the command line asks about a config on a mesh of devices."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import flax.linen as nn
import jax

from flaxlm.config import Config, MeshConfig, ResolvedConfig, ResolvedModel, mesh_shape
from flaxlm.decoding.weights import check_stored, prepare_params
from flaxlm.devices import ANY, Device, find_device
from flaxlm.errors import ConfigError
from flaxlm.nn.models import boxed_shapes, build_model
from flaxlm.planning.compile import CompiledStep, compile_step, compiled_kernel
from flaxlm.planning.decoding import (
  AS_COMPUTED,
  DecodePoint,
  Stored,
  most_rows,
  plan_decoding,
)
from flaxlm.planning.decoding_report import DecodingReport
from flaxlm.planning.learning import find_learning
from flaxlm.planning.memory import Sizes, check_layout
from flaxlm.planning.report import Report
from flaxlm.planning.roofline import Plan, plan_training
from flaxlm.planning.search import cheapest_fit, nearest, search
from flaxlm.sharding import batch_shards, offering
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
  latency: float | None = None  # seconds for a token, instead of batches to decode with
  contexts: Sequence[int] | None = None  # None: three, up to the model's
  stored: Stored = AS_COMPUTED  # while decoding
  tokens: float | None = None  # to train on
  data_rate: float | None = None  # tokens per second that are made ready to train on
  price: float | None = None  # per device and hour
  network: float | None = None  # bytes per second out of a device, beyond its domain
  power: float | None = None  # watts at which each device is held
  own_batch: bool = True  # False: that of a published model, which many devices shared


def plan(cfg: ResolvedConfig, asked: Questions) -> Report:
  """Answers the questions. Raises `ConfigError` for an impossible mesh or device."""
  device = device_asked(asked)
  if asked.compiled:
    device = dataclasses.replace(device, kernel=compiled_kernel(device))
  cfg = resolved = dataclasses.replace(resolve(cfg), mesh=dict(asked.mesh))
  number = asked.num_devices
  if number is None and dict(asked.mesh) == {"data": -1}:
    number = 1  # neither a mesh nor a number of devices was given
  choices = []
  if asked.searched:
    number = number or math.prod(mesh_shape(asked.mesh).values())
    choices = search(cfg, device, number)
    if not choices:
      raise nothing_found(cfg, device, number)
    found = choices[0]
  else:
    sizes = mesh_shape(asked.mesh, number)
    with offering(lambda axis, n: check_layout(cfg, {**sizes, axis: n})):
      padded = dataclasses.replace(cfg, model=cfg.model.padded(sizes["tensor"]))
      found = plan_training(padded, sizes, device)
    if found.fits is False and found.num_devices == 1 and not asked.own_batch:
      found = with_fitting_batch(found) or found
  cfg, context = found.cfg, cfg.model.context
  compiled = compile_step(cfg, found.sizes, device) if asked.compiled else None
  drawing = None
  if cfg.data.objective == "reward":
    rows, length = cfg.data.batch_size, cfg.data.seq_len
    drawing = plan_decoding(cfg, found.sizes, device, rows, length)
  published = resolved.data.batch_size
  return Report(
    plan=found,
    published_batch=None if published == cfg.data.batch_size else published,
    learning=find_learning(found),
    data_rate=asked.data_rate,
    tokens=asked.tokens,
    price=asked.price,
    cure=find_cure(found, compiled),
    choices=choices,
    drawing=drawing,
    decoding=points_asked(cfg, found.sizes, device, asked, context),
    latency=asked.latency,
    compiled=compiled,
  )


def with_fitting_batch(plan: Plan) -> Plan | None:
  """The plan with the largest share of its batch that fits; None if no row does."""
  batch = plan.cfg.data.batch_size
  for rows in sorted((n for n in range(1, batch) if batch % n == 0), reverse=True):
    data = dataclasses.replace(plan.cfg.data, batch_size=rows)
    training = dataclasses.replace(plan.cfg.training, accumulation_steps=1)
    cfg = dataclasses.replace(plan.cfg, data=data, training=training)
    found = plan_training(cfg, plan.sizes, plan.device)
    if found.fits:
      return found
  return None


def plan_serving(cfg: Config, asked: Questions) -> DecodingReport:
  """Answers what is asked about decoding alone: no batch of training has to fit or divide.
  Raises `ConfigError` for an impossible mesh or device."""
  device = device_asked(asked)
  resolved = dataclasses.replace(resolve(cfg), mesh=dict(asked.mesh))
  number = asked.num_devices
  if number is None and dict(asked.mesh) == {"data": -1}:
    number = 1
  sizes = mesh_shape(asked.mesh, number)
  padded = dataclasses.replace(resolved, model=resolved.model.padded(sizes["tensor"]))
  points = points_asked(padded, sizes, device, asked, resolved.model.context)
  return DecodingReport(
    cfg=padded, device=device, sizes=sizes, points=points, latency=asked.latency
  )


def device_asked(asked: Questions) -> Device:
  """The device of the questions, with their network and power."""
  device = ANY if asked.device is None else find_device(asked.device)
  if asked.network is not None:
    device = dataclasses.replace(device, network_bandwidth=asked.network)
  return device if asked.power is None else device.at_power(asked.power)


def points_asked(
  cfg: ResolvedConfig, sizes: Sizes, device: Device, asked: Questions, context: int
) -> list[DecodePoint]:
  """A point of decoding for each batch and each context; by default three, up to the
  model's. For a latency, a point of the most rows that keep to it, or else of one row for
  each device, which shows by how much it does not."""
  if asked.batches or asked.latency is not None:
    check_decoding(cfg.model, asked)
  three = {max(1, context // 16), max(1, context // 4), context}
  lengths = asked.contexts or sorted(three)
  at = functools.partial(plan_decoding, cfg, sizes, device, stored=asked.stored)
  if asked.latency is None:
    return [at(batch, length) for batch in asked.batches for length in lengths]
  most = functools.partial(most_rows, cfg, sizes, device, stored=asked.stored)
  return [most(n, latency=asked.latency) or at(batch_shards(sizes), n) for n in lengths]


def check_decoding(model: ResolvedModel, asked: Questions) -> None:
  """Raises `ConfigError` for what `flaxlm infer` refuses of a model, whatever the mesh."""
  stored = asked.stored
  if model.family == "encoder":
    raise ConfigError(
      "model.family=encoder decodes nothing", "leave --decode and --no-training out"
    )
  check_stored(model.family, stored.weights, stored.cache is not None)
  longest = max(asked.contexts or [1])
  if model.family != "rnn" and longest > model.context:
    raise ConfigError(
      f"context is {longest} > model.context={model.context}, and infer decodes no further",
      f"add --model.context={longest}",
    )
  if stored.weights == "int4":  # some matrices cannot be packed
    shapes = nn.unbox(boxed_shapes(build_model(model)))
    jax.eval_shape(functools.partial(prepare_params, cfg=model, kind="int4"), shapes)


def nothing_found(cfg: ResolvedConfig, device: Device, number: int) -> ConfigError:
  """The error of a search that has found no layout, with the nearest that there is."""
  cause = f"no mesh of {number} devices divides this config and its batch"
  near = nearest(cfg, device, number)
  if near is None:
    batch = cfg.data.batch_size
    return ConfigError(
      cause, f"data.batch_size={batch} has to be a multiple of the devices"
    )
  apart = near.num_devices - number
  far = f"{abs(apart)} {'more' if apart > 0 else 'fewer'}"
  return ConfigError(cause, f"the nearest has {near.num_devices}, {far}: {near.flags}")


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
