# SPDX-License-Identifier: Apache-2.0
"""What accelerators can do at best, from their makers' data sheets.

A row is one JAX device: what a mesh counts. What is not published is None, never a guess.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from flaxlm.config import NO_KERNEL, SPLASH, TILED, FusedKernel, cudnn
from flaxlm.errors import ConfigError

GB, TERA = 1e9, 1e12
UNITS = {"GB": GB, "MiB": 2**20, "GiB": 2**30}
DTYPES = ("bfloat16", "float16", "float32", "int8", "float8")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
  """Peaks of one device. Rates are per second, bandwidths in bytes, memory in bytes."""

  name: str
  kind: Literal["tpu", "gpu", "cpu"]
  # Dense matrix products by the dtype of the operands. `float32` is what JAX's default
  # precision makes of it: one bfloat16 pass on a TPU, TF32 on NVIDIA from Ampere on.
  peak_flops: Mapping[str, float] = dataclasses.field(default_factory=dict)
  memory_bytes: int | None = None
  # The memory that a program may use: what libtpu leaves, or what the driver shows.
  usable_bytes: int | None = None
  memory_bandwidth: float | None = None
  # TPU: of one torus axis in both directions, which a ring uses. GPU: out of one device.
  link_bandwidth: float | None = None
  torus_axes: int = 0  # 0: a switch, with every device at the same distance
  domain: int = 1  # devices that the links join: a slice, an NVLink domain, a PCIe host
  network_bandwidth: float | None = None  # out of one device, beyond its domain
  devices_per_chip: int = 1
  kernel: FusedKernel = NO_KERNEL
  # Attainable / peak: of large bfloat16 products, of a copy, and of the links and network.
  matmul_fraction: float | None = None
  bandwidth_fraction: float | None = None
  link_fraction: float = 1.0
  narrow_fraction: float = (
    1.0  # bandwidth of int8 weights / of bfloat16's: they are widened
  )
  # The share of its products' rate that a device loses while an exchange runs beside them.
  contention: float = 0.0
  collective_seconds: float = 0.0  # no exchange is faster, however small
  watts: float | None = None  # at which the peaks hold
  # Measured on the device at hand, at the shapes at hand (`benchmarks/predictions`): FLOP/s
  # of each `products.Product`; bytes per second of each part of a step's traffic, which on
  # a CPU is limited by arithmetic; seconds of an operation that does almost nothing.
  product_rates: Mapping[Any, float] = dataclasses.field(default_factory=dict)
  attention_rate: float | None = None  # of a kernel for very long rows, in FLOP/s
  attention_ramp: float = 0.0  # tokens in a row at which it reaches half of that
  pass_bandwidths: Mapping[str, float] = dataclasses.field(default_factory=dict)
  operation_seconds: float = 0.0
  source: str = ""

  @property
  def is_any(self) -> bool:
    """Whether none was named; a copy of `ANY` with other fields is none either."""
    return self.name == ANY.name

  @property
  def lanes(self) -> int:
    """Elements in a row of the tiles in which the memory stores arrays."""
    return 128 if self.kind == "tpu" else 1

  def flops(self, dtype: str) -> float | None:
    """Peak of dense matrix products in `dtype`, None if unknown or not supported."""
    return self.peak_flops.get(dtype)

  def attainable_flops(self, dtype: str) -> float | None:
    """The best rate that was measured on such a device, else the published peak."""
    peak = self.flops(dtype)
    return peak and peak * (self.matmul_fraction or 1.0)

  @property
  def attainable_bandwidth(self) -> float | None:
    """The best bandwidth that was measured on such a device, else the published one."""
    rate = self.memory_bandwidth
    return rate and rate * (self.bandwidth_fraction or 1.0)

  def attention_flops(self, seq_len: int) -> float | None:
    """FLOP/s of a fused kernel on rows of `seq_len` tokens, forward and backward, where it
    was measured: the blocks that a causal mask cuts, and the start, weigh more in short
    ones."""
    rate = self.attention_rate
    return rate and rate / (1 + self.attention_ramp / seq_len)

  def at_power(self, watts: float) -> "Device":
    """The device held at fewer watts. A product costs the same energy at any clock, so its
    rate falls with the power; the memory's does not. Raises `ConfigError`."""
    if self.watts is None:
      raise ConfigError(f"the power of {self.name} is not known", "leave --power out")
    if watts > self.watts:
      cure = f"its peaks are those at {self.watts:g} W"
      raise ConfigError(f"{self.name} has no {watts:g} W", cure)
    share = watts / self.watts
    return dataclasses.replace(
      self,
      matmul_fraction=(self.matmul_fraction or 1.0) * share,
      attention_rate=self.attention_rate and self.attention_rate * share,
      watts=watts,
    )


# Where the figures are from. SB: scaling-book (jax-ml.github.io/scaling-book), chapters
# "TPUs" and "GPUs". ME: stas00/ml-engineering, compute/accelerator and network pages
# (measured GEMMs). GC: cloud.google.com/tpu/docs, one page per version. DS: the maker's
# data sheet. In the tables "-" is not published, or not there.

# TFLOP/s of products by dtype, and the best measured share of bfloat16's (788 TFLOP/s on an
# H200); of TPUs, where nobody publishes it, a fit: the median of a TPU's published training
# runs comes out right (benchmarks/published.toml; held-out rows are not among them).
# Turing's tensor cores (T4) do not multiply bfloat16. JAX shows the two chiplets of a 7x as
# two devices: half of 2,307 and 4,614 here, half of 192 GiB below. The L4's peaks are half
# of its sparse figures; the RTX 4090's accumulate in float32. The H100 with HBM2e is an
# H100 otherwise (torchtitan, benchmarks/llama3_h100_202412_torchtitan.md).
PEAKS = """
name      kind bfloat16 float16 float32 int8   float8 matmul source
v4        tpu  275      -       275     275    -      0.70   GC v4; SB
v5e       tpu  197      -       197     394    -      0.81   GC v5e; SB
v5p       tpu  459      -       459     918    -      0.86   GC v5p
v6e       tpu  918      -       918     1836   918    0.63   GC v6e
7x        tpu  1153.5   -       1153.5  -      2307   -      GC tpu7x, halved
a100-40   gpu  312      -       156     624    -      0.87   DS A100; ME
a100-80   gpu  312      -       156     624    -      0.87   DS A100; ME; gpt-fast
h100      gpu  989.4    -       494.7   1978.9 1978.9 0.80   DS H100 SXM; ME
h100-96   gpu  989.4    -       494.7   1978.9 1978.9 0.80   DS H100 SXM; ME; torchtitan
h100-pcie gpu  756      -       378     1513   1513   -      DS H100 PCIe
h200      gpu  989.4    -       494.7   1978.9 1978.9 0.80   DS H200; ME
b200      gpu  2250     -       1100    4500   4500   0.78   DS HGX B200; ME
gb200     gpu  2500     -       1250    5000   5000   0.73   DS GB200 NVL72; ME
mi300x    gpu  1307.4   -       163.4   2614.9 2614.9 0.51   DS MI300X; ME
l4        gpu  121      -       60      242.5  242.5  -      DS L4
t4        gpu  -        65      8.1     130    -      -      DS T4
rtx4090   gpu  165.2    -       82.6    660.6  330.3  -      NVIDIA Ada architecture paper
"""

# Bandwidths in GB/s: of the memory, and the best measured share of it (1.7 TB/s by gpt-fast
# on an A100, 2.9 on an H100, 4.3 on an H200); of the links; of the network. `usable` is
# what libtpu 0.0.41 offers (of v5e's 16 GiB it keeps 0.5 for itself, and the same is
# assumed of the other TPUs), or what a GPU's driver shows, where that is known. The last
# columns are `Device.torus_axes`, `devices_per_chip`, the largest head dim of cuDNN's
# attention and `watts`.
MEMORY = """
name      memory  usable    bandwidth copy link domain network axes chip head_dim watts
v4        32GiB   31.5GiB   1228      -    90   4096   -       3    1    0        -
v5e       16GiB   15.5GiB   819       -    90   256    3.125   2    1    0        -
v5p       96GiB   95.5GiB   2765      -    180  8960   6.25    3    1    0        -
v6e       31.5GiB 31GiB     1640      -    180  256    12.5    2    1    0        -
7x        95GiB   94.5GiB   3690      -    100  18432  -       3    2    0        -
a100-40   40GB    40536MiB  1555      -    300  8      25      0    1    128      400
a100-80   80GB    81920MiB  2039      0.83 300  8      25      0    1    128      400
h100      80GB    81559MiB  3350      0.87 450  8      50      0    1    256      700
h100-96   96GB    95830MiB  2400      0.87 450  8      50      0    1    256      700
h100-pcie 80GB    81559MiB  2000      -    64   8      50      0    1    256      350
h200      141GB   143771MiB 4800      0.90 450  8      50      0    1    256      700
b200      180GB   180GB     8000      -    900  8      50      0    1    256      1000
gb200     186GB   186GB     8000      -    900  72     50      0    1    256      -
mi300x    192GB   192GB     5300      -    448  8      50      0    1    0        750
l4        24GB    23034MiB  300       -    32   8      -       0    1    128      72
t4        16GB    15360MiB  320       -    16   4      -       0    1    0        70
rtx4090   24GB    24564MiB  1008      -    32   4      -       0    1    128      450
"""

# What all devices of a kind have in common. A TPU's links are listed at what they reach,
# engines of their own copy, and no exchange takes less than 1 us (SB). Of a GPU's links 366
# of 450 GB/s are reached (all-reduce on 4 H100,
# waynehacking8.github.io/blog/nccl-nvlink-bandwidth, 2026-05); a kernel on 20 of 132
# processors copies (DeepSeek-V3's report, section 3.2.2); the least time of an exchange is
# a fit: of 2, 4 and 8 A100 that decode (benchmarks/published.toml).
KINDS: Mapping[str, dict[str, Any]] = {
  "tpu": dict(collective_seconds=1e-6),
  "gpu": dict(link_fraction=366 / 450, contention=20 / 132, collective_seconds=21e-6),
}

# Measured by this package on an H100 (docs/LOG.md), and expected of all NVIDIA GPUs: the
# time of a kernel in a loop that does nothing, and one row's products with int8 weights at
# 1.57 TB/s, with bfloat16 ones at 2.44.
NVIDIA: dict[str, Any] = dict(operation_seconds=1.45e-6, narrow_fraction=1.57 / 2.44)

# Attention in cuDNN's kernel, on packed rows of 1,024 and 2,048 tokens: 130 and 179 TFLOP/s
# on an H100 (measured, docs/LOG.md), with five products backward for two forward. The rate
# of long rows and the ramp follow. The A100's rate is FlashAttention-2's (Dao, 2023, in the
# abstract: up to 73 % of the peak), with the same ramp.
HOPPER: dict[str, Any] = dict(attention_rate=287 * TERA, attention_ramp=1246)
AMPERE: dict[str, Any] = dict(attention_rate=228 * TERA, attention_ramp=1246)
MEASURED = {
  "a100-40": AMPERE,
  "a100-80": AMPERE,
  "h100": HOPPER,
  "h100-96": HOPPER,
  "h200": HOPPER,
}


def _read(table: str) -> Iterator[dict[str, str]]:
  """The rows of a table, by column, without their empty cells."""
  header, *lines = table.strip().splitlines()
  names = header.split()
  for line in lines:
    cells = line.split(maxsplit=len(names) - 1)  # the source may have spaces
    yield {name: cell for name, cell in zip(names, cells, strict=True) if cell != "-"}


def _bytes(text: str) -> int:
  """`31.5GiB` in bytes."""
  unit = text.lstrip("0123456789.")
  return int(float(text.removesuffix(unit)) * UNITS[unit])


def _device(row: Mapping[str, str]) -> Device:
  known = lambda column, unit=1.0: float(row[column]) * unit if column in row else None
  return Device(
    name=row["name"],
    kind="tpu" if row["kind"] == "tpu" else "gpu",
    peak_flops={dtype: float(row[dtype]) * TERA for dtype in DTYPES if dtype in row},
    memory_bytes=_bytes(row["memory"]),
    usable_bytes=_bytes(row["usable"]),
    memory_bandwidth=known("bandwidth", GB),
    link_bandwidth=known("link", GB),
    torus_axes=int(row["axes"]),
    domain=int(row["domain"]),
    network_bandwidth=known("network", GB),
    devices_per_chip=int(row["chip"]),
    watts=known("watts"),
    kernel=SPLASH if row["kind"] == "tpu" else cudnn(int(row["head_dim"])),
    matmul_fraction=known("matmul"),
    bandwidth_fraction=known("copy"),
    source=row["source"],
    **KINDS[row["kind"]],
    **(NVIDIA if int(row["head_dim"]) else {}),
    **MEASURED.get(row["name"], {}),
  )


_MEMORY = {row["name"]: row for row in _read(MEMORY)}

DEVICES = (
  *(_device(row | _MEMORY[row["name"]]) for row in _read(PEAKS)),
  Device(
    name="cpu", kind="cpu", kernel=TILED
  ),  # no data sheet says what JAX gets out of one: measure it
)

# The device of a plan for which none was named: it has bytes and FLOPs, but no times.
ANY = Device(name="any", kind="cpu")

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
