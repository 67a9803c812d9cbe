# SPDX-License-Identifier: Apache-2.0
"""What accelerators can do at best, from their makers' data sheets.

A row is one JAX device: what a mesh counts. What is not published is None, never a guess.
"""

import dataclasses
import difflib
import re
from collections.abc import Mapping
from typing import Any, Literal

from flaxlm.errors import ConfigError

GB, GIB, TERA = 1e9, 2**30, 1e12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
  """Peaks of one device. Rates are per second, bandwidths in bytes, memory in bytes."""

  name: str
  kind: Literal["tpu", "gpu", "cpu"]
  # Dense matrix products by the dtype of the operands. `float32` is what JAX's default
  # precision makes of it: one bfloat16 pass on a TPU, TF32 on NVIDIA from Ampere on.
  peak_flops: Mapping[str, float]
  memory_bytes: int | None
  # The memory that a program may use: what libtpu leaves, or what the driver shows.
  usable_bytes: int | None
  memory_bandwidth: float | None
  # TPU: of one torus axis in both directions, which a ring uses. GPU: out of one device.
  link_bandwidth: float | None = None
  torus_axes: int = 0  # 0: a switch, with every device at the same distance
  domain: int = 1  # devices that the links join: a slice, an NVLink domain, a PCIe host
  network_bandwidth: float | None = None  # out of one device, beyond its domain
  devices_per_chip: int = 1
  kernel_head_dim: int = 0  # the largest in cuDNN's attention, in training; 0: has no cuDNN
  # Best published measurement / peak, of a large bfloat16 product and of a copy.
  matmul_fraction: float | None = None
  bandwidth_fraction: float | None = None
  # Measured on the device at hand, at the shapes at hand (`benchmarks/predictions`): FLOP/s
  # of each `products.Product`; bytes per second of each part of a step's traffic, which on
  # a CPU is limited by arithmetic; seconds of an operation that does almost nothing.
  product_rates: Mapping[Any, float] = dataclasses.field(default_factory=dict)
  attention_rate: float | None = None  # strict FLOP/s of a kernel, forward and backward
  pass_bandwidths: Mapping[str, float] = dataclasses.field(default_factory=dict)
  operation_seconds: float = 0.0
  source: str = ""

  @property
  def lanes(self) -> int:
    """Elements in a row of the tiles in which the memory stores arrays."""
    return 128 if self.kind == "tpu" else 1

  def flops(self, dtype: str) -> float | None:
    """Peak of dense matrix products in `dtype`, None if unknown or not supported."""
    return self.peak_flops.get(dtype)


# TPU memory is what libtpu 0.0.41 offers; of v5e's 16 GiB it keeps 0.5 for itself, and the
# same is assumed of the others.
# SB: scaling-book (jax-ml.github.io/scaling-book), chapters "TPUs" and "GPUs".
# ME: stas00/ml-engineering, compute/accelerator and network pages (measured GEMMs).
# GC: cloud.google.com/tpu/docs, one page per version. DS: the maker's data sheet.
def _tpu(
  name: str,
  *,
  bfloat16: float,
  int8: float | None = None,
  float8: float | None = None,
  gib: float,
  usable_gib: float,
  bandwidth: float,
  link: float,
  torus_axes: int,
  slice_size: int,
  network: float | None = None,
  devices_per_chip: int = 1,
  source: str,
) -> Device:
  """Peaks are in TFLOP/s, memory in GiB, and bandwidths in GB/s."""
  peaks = {"bfloat16": bfloat16, "float32": bfloat16, "int8": int8, "float8": float8}
  return Device(
    name=name,
    kind="tpu",
    peak_flops={dtype: peak * TERA for dtype, peak in peaks.items() if peak},
    memory_bytes=int(gib * GIB),
    usable_bytes=int(usable_gib * GIB),
    memory_bandwidth=bandwidth * GB,
    link_bandwidth=link * GB,
    torus_axes=torus_axes,
    domain=slice_size,
    network_bandwidth=network and network * GB,
    devices_per_chip=devices_per_chip,
    source=source,
  )


def _gpu(
  name: str,
  flops: Mapping[str, float],
  *,
  gb: float,
  usable_mib: float | None = None,
  bandwidth: float,
  link: float,
  domain: int,
  network: float | None = None,
  head_dim: int = 256,
  **rest: Any,
) -> Device:
  """Peaks are in TFLOP/s, memory in GB, and bandwidths in GB/s.

  `usable_mib` is the memory that the driver shows; None: all of it.
  """
  size = int(gb * GB)
  return Device(
    name=name,
    kind="gpu",
    peak_flops={dtype: peak * TERA for dtype, peak in flops.items()},
    memory_bytes=size,
    usable_bytes=size if usable_mib is None else int(usable_mib * 2**20),
    memory_bandwidth=bandwidth * GB,
    kernel_head_dim=head_dim,
    link_bandwidth=link * GB,
    domain=domain,
    network_bandwidth=network and network * GB,
    **rest,
  )


AMPERE = {"bfloat16": 312, "int8": 624, "float32": 156}
HOPPER = {"bfloat16": 989.4, "float8": 1978.9, "int8": 1978.9, "float32": 494.7}
# Measured by this package on an H100 (docs/benchmarks): packed rows of 1,024 and 2,048
# tokens through cuDNN at 111 and 153 TFLOP/s, and a kernel in a loop that does nothing.
HOPPER_MEASURED: dict[str, Any] = dict(attention_rate=130 * TERA, operation_seconds=1.45e-6)

DEVICES = (
  _tpu(
    "v4",
    bfloat16=275,
    int8=275,
    gib=32,
    usable_gib=31.5,
    bandwidth=1228,
    link=90,
    torus_axes=3,
    slice_size=4096,
    source="GC v4; SB",
  ),
  _tpu(
    "v5e",
    bfloat16=197,
    int8=394,
    gib=16,
    usable_gib=15.5,
    bandwidth=819,
    link=90,
    torus_axes=2,
    slice_size=256,
    network=3.125,
    source="GC v5e; SB",
  ),
  _tpu(
    "v5p",
    bfloat16=459,
    int8=918,
    gib=96,
    usable_gib=95.5,
    bandwidth=2765,
    link=180,
    torus_axes=3,
    slice_size=8960,
    network=6.25,
    source="GC v5p",
  ),
  _tpu(
    "v6e",
    bfloat16=918,
    int8=1836,
    float8=918,
    gib=31.5,
    usable_gib=31.0,
    bandwidth=1640,
    link=180,
    torus_axes=2,
    slice_size=256,
    network=12.5,
    source="GC v6e",
  ),
  # JAX shows its two chiplets as two devices: half of 2,307, 4,614 and 192 each.
  _tpu(
    "7x",
    bfloat16=1153.5,
    float8=2307,
    gib=95,
    usable_gib=94.5,
    bandwidth=3690,
    link=100,
    torus_axes=3,
    slice_size=18432,
    devices_per_chip=2,
    source="GC tpu7x, halved",
  ),
  _gpu(
    "a100-40",
    AMPERE,
    gb=40,
    usable_mib=40536,
    bandwidth=1555,
    link=300,
    domain=8,
    network=25,
    matmul_fraction=0.87,
    head_dim=128,
    source="DS A100; ME",
  ),
  _gpu(
    "a100-80",
    AMPERE,
    gb=80,
    usable_mib=81920,
    bandwidth=2039,
    link=300,
    domain=8,
    network=25,
    matmul_fraction=0.87,
    bandwidth_fraction=0.83,  # gpt-fast: 1.7 TB/s measured
    head_dim=128,
    source="DS A100; ME; gpt-fast",
  ),
  _gpu(
    "h100",
    HOPPER,
    gb=80,
    usable_mib=81559,
    bandwidth=3350,
    link=450,
    domain=8,
    network=50,
    matmul_fraction=0.80,
    bandwidth_fraction=0.87,  # 2.9 TB/s measured
    **HOPPER_MEASURED,
    source="DS H100 SXM; ME",
  ),
  _gpu(
    "h100-pcie",
    {"bfloat16": 756, "float8": 1513, "int8": 1513, "float32": 378},
    gb=80,
    usable_mib=81559,
    bandwidth=2000,
    link=64,
    domain=8,
    network=50,
    source="DS H100 PCIe",
  ),
  _gpu(
    "h200",
    HOPPER,
    gb=141,
    usable_mib=143771,
    bandwidth=4800,
    link=450,
    domain=8,
    network=50,
    matmul_fraction=0.80,  # 788 TFLOP/s measured
    bandwidth_fraction=0.90,  # 4.3 TB/s measured
    **HOPPER_MEASURED,
    source="DS H200; ME",
  ),
  _gpu(
    "b200",
    {"bfloat16": 2250, "float8": 4500, "int8": 4500, "float32": 1100},
    gb=180,
    bandwidth=8000,
    link=900,
    domain=8,
    network=50,
    matmul_fraction=0.78,
    source="DS HGX B200; ME",
  ),
  _gpu(
    "gb200",
    {"bfloat16": 2500, "float8": 5000, "int8": 5000, "float32": 1250},
    gb=186,
    bandwidth=8000,
    link=900,
    domain=72,
    network=50,
    matmul_fraction=0.73,
    source="DS GB200 NVL72; ME",
  ),
  _gpu(
    "mi300x",
    {"bfloat16": 1307.4, "float8": 2614.9, "int8": 2614.9, "float32": 163.4},
    gb=192,
    bandwidth=5300,
    link=448,
    domain=8,
    network=50,
    matmul_fraction=0.51,
    head_dim=0,
    source="DS MI300X; ME",
  ),
  _gpu(
    "l4",
    {"bfloat16": 121, "float8": 242.5, "int8": 242.5, "float32": 60},
    gb=24,
    usable_mib=23034,
    bandwidth=300,
    link=32,
    domain=8,
    head_dim=128,
    source="DS L4, half of its sparse figures",
  ),
  # Turing's tensor cores do not multiply bfloat16.
  _gpu(
    "t4",
    {"float16": 65, "int8": 130, "float32": 8.1},
    gb=16,
    usable_mib=15360,
    bandwidth=320,
    link=16,
    domain=4,
    head_dim=0,
    source="DS T4",
  ),
  _gpu(
    "rtx4090",
    {"bfloat16": 165.2, "float8": 330.3, "int8": 660.6, "float32": 82.6},
    gb=24,
    usable_mib=24564,
    bandwidth=1008,
    link=32,
    domain=4,
    head_dim=128,
    source="NVIDIA Ada architecture paper, accumulating in float32",
  ),
  # No data sheet says what JAX gets out of a CPU: measure it.
  Device(
    name="cpu",
    kind="cpu",
    peak_flops={},
    memory_bytes=None,
    usable_bytes=None,
    memory_bandwidth=None,
  ),
)

# The device of a plan for which none was named: it has bytes and FLOPs, but no times.
ANY = Device(
  name="any",
  kind="cpu",
  peak_flops={},
  memory_bytes=None,
  usable_bytes=None,
  memory_bandwidth=None,
)

ALIASES = {
  "tpuv4": "v4",
  "tpuv5e": "v5e",
  "v5litepod": "v5e",
  "tpuv5p": "v5p",
  "tpuv6e": "v6e",
  "trillium": "v6e",
  "tpu7x": "7x",
  "v7x": "7x",
  "ironwood": "7x",
  "a100": "a100-80",
  "h100-sxm": "h100",
  "4090": "rtx4090",
}


def find_device(name: str) -> Device:
  """The device of a name such as `h200` or `v5e`. Raises `ConfigError`, which suggests the
  nearest names."""
  table = {device.name: device for device in DEVICES}
  plain = name.lower().replace("_", "-").replace(" ", "")
  plain = ALIASES.get(plain, plain)
  if plain in table:
    return table[plain]
  names = [*table, *ALIASES]
  near = difflib.get_close_matches(plain, names, 3, 0.5)
  near = list(dict.fromkeys(ALIASES.get(n, n) for n in near))
  cure = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(table)}"
  raise ConfigError(f"unknown device {name!r}", cure)


# Patterns of `jax.Device.device_kind`; the most specific ones come first.
_KINDS = (
  (r"TPU ?v6", "v6e"),
  (r"TPU ?v5 ?(lite|e)", "v5e"),
  (r"TPU ?v5", "v5p"),
  (r"TPU ?v4$", "v4"),
  (r"TPU ?(v7x|7x)", "7x"),
  (r"A100.*40GB", "a100-40"),
  (r"A100.*80GB", "a100-80"),
  (r"H100 PCIe", "h100-pcie"),
  (r"H100 80GB HBM3", "h100"),
  (r"H200( |$)(?!NVL)", "h200"),
  (r"GB200", "gb200"),
  (r"B200", "b200"),
  (r"MI300X", "mi300x"),
  (r"L4$", "l4"),
  (r"T4$", "t4"),
  (r"RTX 4090$", "rtx4090"),
  (r"^cpu$", "cpu"),
)


def device_of(device_kind: str) -> Device | None:
  """The device that JAX calls by this kind; None for one whose peaks are not known."""
  for pattern, name in _KINDS:
    if re.search(pattern, device_kind):
      return find_device(name)
  return None
