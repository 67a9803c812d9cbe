# SPDX-License-Identifier: Apache-2.0
"""What the real compiler says of a step of training or decoding, for chips not at hand.

libtpu (extra `tpu`) compiles for whole TPU slices on any machine, and XLA's GPU compiler
(extra `cuda-compile`) for NVIDIA GPUs that are described by a text. Both are configured by
the environment and start only once in a process. So a child process does the work:
`python -m flaxlm.planning.compile` reads a request from stdin and writes a result to
stdout, both as JSON.
"""

import dataclasses
import functools
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh

from flaxlm.config import (
  MESH_AXES,
  NO_KERNEL,
  FusedKernel,
  ResolvedConfig,
  from_json,
  slow_axes,
  to_json,
)
from flaxlm.decoding.drawing import rules_in_use
from flaxlm.decoding.generate import DecodeState, StaticSampling, decode_block
from flaxlm.decoding.sampling import GREEDY, stack_settings
from flaxlm.decoding.weights import prepare_params
from flaxlm.devices import Device, find_device
from flaxlm.errors import ConfigError, FlaxLMError
from flaxlm.nn.base import LanguageModel
from flaxlm.nn.models import abstract_params, build_model, init_cache
from flaxlm.planning.collectives import Collective, find_collectives
from flaxlm.planning.decoding import Decoding, Stored
from flaxlm.planning.memory import Sizes
from flaxlm.platform import start_jax
from flaxlm.sharding import mesh_for, use_mesh
from flaxlm.sharding.mesh import consecutive_grid, hybrid_grid, networks
from flaxlm.training.optimizer import build_optimizer
from flaxlm.training.step import abstract_batch, abstract_state, jit_train_step

# Without messages, without asking a metadata server, and several compilers at a time.
TPU_ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-8",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

TPU_NAMES = {"7x": "tpu7x"}  # libtpu's names where they differ from ours

# The description of a Hopper GPU for XLA; other generations are not described yet.
HOPPER = """gpu_device_info {{ name: "{name}"
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  memory_bandwidth: {bandwidth:.0f} device_memory_size: {memory}
  l2_cache_size: 52428800 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448 threads_per_warp: 32 threads_per_block_limit: 1024
  threads_per_core_limit: 2048 registers_per_core_limit: 65536
  registers_per_block_limit: 65536 thread_dim_limit_x: 1024 thread_dim_limit_y: 1024
  thread_dim_limit_z: 64 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 device_address_bits: 64 driver_version: "12.9.0"
  runtime_version: "12.9.0" compile_time_toolkit_version: "12.9.0" }}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""
HOPPER_NAMES = {"h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledStep:
  """What the compiler says of one step; bytes are per device.

  `error` is why it refused, for example because memory does not suffice; then the bytes
  are None, but for a peak that it names.
  """

  target: str
  seconds: float = 0.0
  argument_bytes: int | None = None
  output_bytes: int | None = None
  temp_bytes: int | None = None
  peak_bytes: int | None = None
  alias_bytes: int | None = None  # of outputs that reuse the memory of arguments
  collectives: Sequence[Collective] = ()
  error: str | None = None

  def fits(self, usable_bytes: int) -> bool:
    """Whether the compiler accepted the step, and found memory enough for it."""
    assert self.error is not None or self.peak_bytes is not None
    return self.error is None and (self.peak_bytes or 0) <= usable_bytes

  def difference(self, analytic_bytes: int) -> float | None:
    """Analytic memory / the compiler's peak - 1."""
    return None if not self.peak_bytes else analytic_bytes / self.peak_bytes - 1


def compile_step(
  cfg: ResolvedConfig, sizes: Sizes, device: Device, decoding: Decoding | None = None
) -> CompiledStep:
  """Compiles the training step of a resolved config for a mesh of `device`, or its steps of
  `decoding`.

  Raises `ConfigError` when this machine has no compiler for that device.
  """
  if device.kind == "gpu" and device.name not in HOPPER_NAMES:
    known = [*HOPPER_NAMES, "v4, v5e, v5p, v6e, 7x (TPU)", "cpu (simulated)"]
    raise ConfigError(
      f"cannot compile for {device.name} on a machine without one",
      f"use --compile with {', '.join(known)}",
    )
  name = "cpu" if device.is_any else device.name
  request: dict[str, Any] = {"config": to_json(cfg), "sizes": dict(sizes), "device": name}
  request["decoding"] = decoding and dataclasses.asdict(decoding)
  package = str(Path(__file__).parents[2])
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
  environment["PYTHONPATH"] = os.pathsep.join(
    [package, *filter(None, [os.environ.get("PYTHONPATH")])]
  )
  if device.kind == "tpu":
    environment |= TPU_ENVIRONMENT
    # libtpu aborts on flags for the CPU, which it does not know.
    flags = os.environ.get("XLA_FLAGS", "").split()
    environment["XLA_FLAGS"] = " ".join(f for f in flags if not f.startswith("--xla_cpu_"))
  child = subprocess.run(
    [sys.executable, "-m", "flaxlm.planning.compile"],
    input=json.dumps(request),
    capture_output=True,
    text=True,
    env=environment,
    check=False,
  )
  lines = child.stdout.splitlines()
  if child.returncode or not lines:
    if child.returncode < 0:  # libtpu aborts on some meshes that fill a part of a slice
      raise FlaxLMError(
        f"the compiler for {device.name} crashed (signal {-child.returncode})",
        "a mesh that fills a whole slice is the safest: 4, 8, 16, 32, ... devices",
      )
    tail = child.stderr.strip().splitlines()[-1:] or [f"exit code {child.returncode}"]
    raise FlaxLMError(f"the compiler for {device.name} failed: {tail[0]}")
  result = json.loads(lines[-1])
  if "cure" in result:
    raise ConfigError(result["error"], result["cure"])
  result["collectives"] = [Collective(**one) for one in result["collectives"]]
  return CompiledStep(**result)


# -- In the child process -----------------------------------------------------------------


def main() -> None:
  """Reads one request, writes one result."""
  request = json.loads(sys.stdin.read())
  device = find_device(request["device"])
  cfg = from_json(request["config"], "the request").resolve()
  if (decoding := request["decoding"]) is not None:
    decoding = Decoding(**decoding | {"stored": Stored(**decoding["stored"])})
  try:
    result = dataclasses.asdict(compile_here(cfg, request["sizes"], device, decoding))
  except ConfigError as e:
    result = {"error": e.cause, "cure": e.cure}
  print(json.dumps(result, allow_nan=False))


def tpu_options() -> dict[str, Any]:
  """The least effort: compiles three to seven times faster, to programs that take up to 6 %
  more memory (measured)."""
  if jax.__version_info__ < (0, 11):
    return {"exec_time_optimization_effort": -1.0}
  return {"optimization_level": "O0"}


def compile_here(
  cfg: ResolvedConfig, sizes: Sizes, device: Device, decoding: Decoding | None = None
) -> CompiledStep:
  """`compile_step` in this process, whose environment must be right for the compiler."""
  target, mesh = make_target_mesh(sizes, device, slow_axes(cfg.mesh))
  mesh = mesh_for(mesh, cfg.model)
  model = build_model(cfg.model, cfg.training, compiled_kernel(device))
  started = time.perf_counter()
  try:
    if decoding is None:
      lowered = lowered_training(cfg, model, mesh)
    else:
      lowered = lowered_decoding(model, mesh, decoding)
    compiled: Any = lowered.compile(tpu_options() if device.kind == "tpu" else None)
  except jax.errors.JaxRuntimeError as e:
    return CompiledStep(target=target, error=explain(str(e)), peak_bytes=needed(str(e)))
  seconds = time.perf_counter() - started
  memory = compiled.memory_analysis()
  arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
  peak = memory.peak_memory_in_bytes
  if device.kind != "tpu":  # the peak of other backends does not include temporaries
    peak = max(peak, arguments + temporaries)
  return CompiledStep(
    target=target,
    seconds=seconds,
    argument_bytes=arguments,
    output_bytes=memory.output_size_in_bytes,
    temp_bytes=temporaries,
    peak_bytes=peak,
    alias_bytes=memory.alias_size_in_bytes,
    collectives=find_collectives(compiled.as_text(), sizes),
  )


def lowered_training(cfg: ResolvedConfig, model: LanguageModel, mesh: Mesh) -> Any:
  optimizer = build_optimizer(cfg.optimizer, cfg.training.num_steps)
  dpo = cfg.active_dpo
  state = abstract_state(model, optimizer, mesh, cfg.lora, dpo is not None)
  step = jit_train_step(model, optimizer, cfg.training, mesh, cfg.lora, dpo)
  return step.lower(state, abstract_batch(cfg.data, mesh))


def lowered_decoding(model: LanguageModel, mesh: Mesh, decoding: Decoding) -> Any:
  """A block of greedy steps, as `flaxlm infer` runs them: parameters laid out as decoding
  reads them, in the dtype of the computation, and a cache that has room for the rows."""
  narrow = decoding.stored.cache == "int8"
  execution = dataclasses.replace(
    model.execution, param_dtype=model.execution.dtype, narrow_cache=narrow
  )
  model = model.clone(execution=execution)
  laid_out = functools.partial(prepare_params, cfg=model.cfg, kind=decoding.stored.weights)
  sampling = stack_settings([GREEDY] * decoding.rows)
  static = StaticSampling(rules_in_use(sampling))
  stored = abstract_params(model, mesh)
  with use_mesh(mesh):
    params = as_computed(laid_out, stored)
    cache = as_computed(lambda: init_cache(model, decoding.rows, decoding.context))
    token_B: Any = jax.ShapeDtypeStruct((decoding.rows,), jnp.int32)
    state = DecodeState(cache, token_B, None)
    num_ids = np.int32(model.cfg.num_ids)
    return decode_block.lower(model, params, state, sampling, num_ids, static)


def as_computed(function: Callable, *args: Any) -> Any:
  """The shapes of what a function computes on a mesh, as the compiler shards it."""
  lowered = jax.jit(function).lower(*args)
  shardings = lowered.compile().output_shardings
  place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
  return jax.tree.map(place, lowered.out_info, shardings)


def compiled_kernel(device: Device) -> FusedKernel:
  """The attention kernel of a step compiled elsewhere: cuDNN's compiles on its GPU only."""
  return device.kernel if device.kind == "tpu" else NO_KERNEL


OUT_OF_MEMORY = re.compile(r"Used ([\d.]+\w) of ([\d.]+\w) hbm")


def needed(message: str) -> int | None:
  """The bytes that a step would take, by the error of a compiler that has too few."""
  used = OUT_OF_MEMORY.search(message)
  if used is None or used[1][-1] not in "KMG":
    return None
  return round(float(used[1][:-1]) * 1024 ** (1 + "KMG".index(used[1][-1])))


def explain(message: str) -> str:
  """A compiler's error in one line; when memory does not suffice, by how much."""
  used = OUT_OF_MEMORY.search(message)
  if used:
    return f"out of memory: {used[1]} needed, {used[2]} available"
  return message.splitlines()[0][:200]


def make_target_mesh(
  sizes: Sizes, device: Device, slow: Sequence[str] = ()
) -> tuple[str, Any]:
  """The target of the compilation in words, and the mesh of its devices."""
  sizes = {axis: sizes[axis] for axis in MESH_AXES}
  shape = tuple(sizes.values())
  outer, inner = networks(sizes, slow)
  target, devices = target_devices(device, math.prod(inner), math.prod(outer))
  try:
    if slow:
      grid = hybrid_grid(sizes, slow, devices)
    else:
      grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  except (NotImplementedError, ValueError, AssertionError):  # only a part of a slice
    grid = consecutive_grid(outer, inner, devices)
  assert isinstance(grid.flat[0], jax.Device)
  return target, Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


def target_devices(device: Device, number: int, slices: int = 1) -> tuple[str, list[Any]]:
  """The target in words, and its devices: `number` of each slice, slice by slice.

  Raises `ConfigError` when this machine has no compiler for them.
  """
  if device.kind == "cpu":
    start_jax(number * slices)
    return f"{number * slices} simulated CPU devices", jax.devices()
  if device.kind == "tpu":
    options: dict[str, Any] = {} if slices == 1 else {"num_slices": slices}
    if device.name == "v4":
      options["chip_config_name"] = "megacore"  # two cores are one device, as on Cloud
    name = TPU_NAMES.get(device.name, device.name)
    name += ":" + "x".join(map(str, slice_shape(device, number)))
    platform, package, extra = "tpu", "libtpu", "tpu"
  else:
    text = HOPPER.format(
      name=HOPPER_NAMES[device.name],
      bandwidth=device.memory_bandwidth,
      memory=device.usable_bytes,
    )
    hosts = -(-number // 8)
    options = {"target_config": text, "topology": f"{slices}x{hosts}x{min(number, 8)}"}
    name, platform = device.name, "cuda"
    package, extra = "jax-cuda12-plugin", "cuda-compile"
  try:
    topology = topologies.get_topology_desc(
      platform=platform, topology_name=name, **options
    )
  except (RuntimeError, ImportError, NotImplementedError) as e:
    raise ConfigError(
      f"this machine has no compiler for {name}: {str(e).splitlines()[0]}",
      f"{package} is needed: pip install 'flaxlm[{extra}]'",
    ) from e
  chosen: dict[int, list[Any]] = {}
  for one in topology.devices:
    chosen.setdefault(getattr(one, "slice_index", 0), []).append(one)
  name = name if slices == 1 else f"{slices} slices of {name}"
  return name, [one for part in chosen.values() for one in part[:number]]


def slice_shape(device: Device, number: int) -> tuple[int, ...]:
  """The most compact slice of at least `number` devices; a host has 2 x 2 chips."""
  chips, axes = -(-number // device.devices_per_chip), device.torus_axes
  if axes == 3 and chips <= 4:
    return 2, 2, 1
  while True:
    divisors = [n for n in range(1, chips + 1) if chips % n == 0]
    shapes = [
      shape
      for shape in itertools.combinations_with_replacement(divisors, axes)
      if math.prod(shape) == chips and not shape[0] % 2 and not shape[1] % 2
    ]
    if shapes:
      return min(shapes, key=sum)
    chips += 1


if __name__ == "__main__":
  main()
