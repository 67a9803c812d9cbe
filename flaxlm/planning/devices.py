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
  # What a program may use of it: what libtpu leaves, or what the driver shows.
  usable_bytes: int | None
  memory_bandwidth: float | None
  # TPU: both directions of one torus axis (a ring uses both). GPU: out of one device.
  link_bandwidth: float | None = None
  torus_axes: int = 0  # 0: a switch, every device at the same distance
  domain: int = 1  # devices that the links join: a slice, an NVLink domain, a PCIe host
  network_bandwidth: float | None = None  # out of one device, beyond its domain
  devices_per_chip: int = 1
  kernel_head_dim: int = 0  # the largest of cuDNN's attention when training; 0: has none
  # Best published measurement / peak: of a large bfloat16 product, of a copy.
  matmul_fraction: float | None = None
  bandwidth_fraction: float | None = None
  # What somebody measured here and now, at the shapes at hand (`benchmarks/predictions`):
  # FLOP/s of a `products.Product`; bytes per second by part of a step's traffic, which a
  # CPU's arithmetic limits; seconds of one operation that does next to nothing.
  product_rates: Mapping[Any, float] = dataclasses.field(default_factory=dict)
  attention_rate: float | None = None  # strict FLOP/s of a kernel, forward and backward
  pass_bandwidths: Mapping[str, float] = dataclasses.field(default_factory=dict)
  operation_seconds: float = 0.0
  source: str = ""

  @property
  def lanes(self) -> int:
    """Elements in a row of its memory's tiles."""
    return 128 if self.kind == "tpu" else 1

  def flops(self, dtype: str) -> float | None:
    """Peak of dense matrix products in `dtype`, None if unknown or not supported."""
    return self.peak_flops.get(dtype)


# TPU memory is what libtpu 0.0.41 offers; of v5e's 16 GiB it keeps 0.5 for itself, as we
# assume of the others.
# SB: scaling-book (jax-ml.github.io/scaling-book), chapters "TPUs" and "GPUs".
# ME: stas00/ml-engineering, compute/accelerator and network pages (measured GEMMs).
# GC: cloud.google.com/tpu/docs, one page per version. DS: the maker's data sheet.
def _tpu(
  name: str,
  flops: tuple[float, float | None, float | None],
  memory: tuple[float, float, float],
  link: tuple[float, int, int],
  network: float | None,
  **rest: Any,
) -> Device:
  """flops: bfloat16, int8, float8; memory: GiB, usable, GB/s; link: GB/s, axes, slice."""
  bf16, int8, fp8 = flops
  peaks = {"bfloat16": bf16, "float32": bf16, "int8": int8, "float8": fp8}
  return Device(
    name=name,
    kind="tpu",
    peak_flops={dtype: peak * TERA for dtype, peak in peaks.items() if peak},
    memory_bytes=int(memory[0] * GIB),
    usable_bytes=int(memory[1] * GIB),
    memory_bandwidth=memory[2] * GB,
    link_bandwidth=link[0] * GB,
    torus_axes=link[1],
    domain=link[2],
    network_bandwidth=network and network * GB,
    **rest,
  )


def _gpu(
  name: str,
  flops: Mapping[str, float],
  memory: tuple[float, float, float],
  link: tuple[float, int],
  network: float | None,
  head_dim: int = 256,
  **rest: Any,
) -> Device:
  """memory: GB, MiB that the driver shows (0: the GB), GB/s; link: GB/s, domain."""
  size = int(memory[0] * GB)
  return Device(
    name=name,
    kind="gpu",
    peak_flops={dtype: peak * TERA for dtype, peak in flops.items()},
    memory_bytes=size,
    usable_bytes=int(memory[1] * 2**20) or size,
    memory_bandwidth=memory[2] * GB,
    kernel_head_dim=head_dim,
    link_bandwidth=link[0] * GB,
    domain=link[1],
    network_bandwidth=network and network * GB,
    **rest,
  )


HOPPER = {"bfloat16": 989.4, "float8": 1978.9, "int8": 1978.9, "float32": 494.7}
# Measured by this package on an H100 (docs/benchmarks): packed rows of 1,024 and 2,048
# tokens through cuDNN at 111 and 153 TFLOP/s, and a kernel in a loop that does nothing.
HOPPER_MEASURED: dict[str, Any] = dict(attention_rate=130 * TERA, operation_seconds=1.45e-6)

DEVICES = (
  _tpu("v4", (275, 275, None), (32, 31.5, 1228), (90, 3, 4096), None, source="GC v4; SB"),
  _tpu("v5e", (197, 394, None), (16, 15.5, 819), (90, 2, 256), 3.125, source="GC v5e; SB"),
  _tpu("v5p", (459, 918, None), (96, 95.5, 2765), (180, 3, 8960), 6.25, source="GC v5p"),
  _tpu("v6e", (918, 1836, 918), (31.5, 31.0, 1640), (180, 2, 256), 12.5, source="GC v6e"),
  # JAX shows its two chiplets as two devices: half of 2,307, 4,614 and 192 each.
  _tpu(
    "7x",
    (1153.5, None, 2307),
    (95, 94.5, 3690),
    (100, 3, 18432),
    None,
    devices_per_chip=2,
    source="GC tpu7x, halved",
  ),
  _gpu(
    "a100-40",
    {"bfloat16": 312, "int8": 624, "float32": 156},
    (40, 40536, 1555),
    (300, 8),
    25,
    matmul_fraction=0.87,
    head_dim=128,
    source="DS A100; ME",
  ),
  _gpu(
    "a100-80",
    {"bfloat16": 312, "int8": 624, "float32": 156},
    (80, 81920, 2039),
    (300, 8),
    25,
    matmul_fraction=0.87,
    bandwidth_fraction=0.83,  # gpt-fast: 1.7 TB/s measured
    head_dim=128,
    source="DS A100; ME; gpt-fast",
  ),
  _gpu(
    "h100",
    HOPPER,
    (80, 81559, 3350),
    (450, 8),
    50,
    matmul_fraction=0.80,
    bandwidth_fraction=0.87,  # 2.9 TB/s measured
    **HOPPER_MEASURED,
    source="DS H100 SXM; ME",
  ),
  _gpu(
    "h100-pcie",
    {"bfloat16": 756, "float8": 1513, "int8": 1513, "float32": 378},
    (80, 81559, 2000),
    (64, 8),
    50,
    source="DS H100 PCIe",
  ),
  _gpu(
    "h200",
    HOPPER,
    (141, 143771, 4800),
    (450, 8),
    50,
    matmul_fraction=0.80,  # 788 TFLOP/s measured
    bandwidth_fraction=0.90,  # 4.3 TB/s measured
    **HOPPER_MEASURED,
    source="DS H200; ME",
  ),
  _gpu(
    "b200",
    {"bfloat16": 2250, "float8": 4500, "int8": 4500, "float32": 1100},
    (180, 0, 8000),
    (900, 8),
    50,
    matmul_fraction=0.78,
    source="DS HGX B200; ME",
  ),
  _gpu(
    "gb200",
    {"bfloat16": 2500, "float8": 5000, "int8": 5000, "float32": 1250},
    (186, 0, 8000),
    (900, 72),
    50,
    matmul_fraction=0.73,
    source="DS GB200 NVL72; ME",
  ),
  _gpu(
    "mi300x",
    {"bfloat16": 1307.4, "float8": 2614.9, "int8": 2614.9, "float32": 163.4},
    (192, 0, 5300),
    (448, 8),
    50,
    matmul_fraction=0.51,
    head_dim=0,
    source="DS MI300X; ME",
  ),
  _gpu(
    "l4",
    {"bfloat16": 121, "float8": 242.5, "int8": 242.5, "float32": 60},
    (24, 23034, 300),
    (32, 8),
    None,
    head_dim=128,
    source="DS L4, half of its sparse figures",
  ),
  # Turing multiplies no bfloat16 in its tensor cores.
  _gpu(
    "t4",
    {"float16": 65, "int8": 130, "float32": 8.1},
    (16, 15360, 320),
    (16, 4),
    None,
    head_dim=0,
    source="DS T4",
  ),
  _gpu(
    "rtx4090",
    {"bfloat16": 165.2, "float8": 330.3, "int8": 660.6, "float32": 82.6},
    (24, 24564, 1008),
    (32, 4),
    None,
    head_dim=128,
    source="NVIDIA Ada architecture paper, accumulating in float32",
  ),
  # A processor has no data sheet that says what JAX gets out of it: measure it.
  Device(
    name="cpu",
    kind="cpu",
    peak_flops={},
    memory_bytes=None,
    usable_bytes=None,
    memory_bandwidth=None,
  ),
)

# What a plan stands on when nobody named a device: bytes and FLOPs, but no times.
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
  """The row of a name such as `h200` or `v5e`; raises `ConfigError` with the nearest."""
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


# What `jax.Device.device_kind` says, most telling first.
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
  """The row of what JAX calls a device, or None: the next model's peaks are not known."""
  for pattern, name in _KINDS:
    if re.search(pattern, device_kind):
      return find_device(name)
  return None
