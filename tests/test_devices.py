# SPDX-License-Identifier: Apache-2.0
"""The device table: names, what JAX calls them, and peaks that are known or None."""

import pytest

from flaxlm.devices import DEVICES, device_of, find_device
from flaxlm.errors import ConfigError


@pytest.mark.parametrize(
  ("kind", "name"),
  [
    ("TPU v4", "v4"),
    ("TPU v5 lite", "v5e"),
    ("TPU v5", "v5p"),
    ("TPU v5p", "v5p"),
    ("TPU v6 lite", "v6e"),
    ("TPU7x", "7x"),
    ("NVIDIA A100-SXM4-40GB", "a100-40"),
    ("NVIDIA A100-SXM4-80GB", "a100-80"),
    ("NVIDIA H100 80GB HBM3", "h100"),
    ("NVIDIA H100 PCIe", "h100-pcie"),
    ("NVIDIA H200", "h200"),
    ("NVIDIA GB200", "gb200"),
    ("NVIDIA B200", "b200"),
    ("AMD Instinct MI300X", "mi300x"),
    ("NVIDIA L4", "l4"),
    ("Tesla T4", "t4"),
    ("NVIDIA GeForce RTX 4090", "rtx4090"),
    ("cpu", "cpu"),
  ],
)
def test_what_jax_calls_it(kind: str, name: str):
  found = device_of(kind)
  assert found is not None
  assert found.name == name


@pytest.mark.parametrize(
  "kind",
  ["NVIDIA L40S", "NVIDIA H200 NVL", "NVIDIA GeForce RTX 4090 D", "NVIDIA B300", "TPU v9"],
)
def test_a_relative_of_a_known_device_is_unknown(kind: str):
  assert device_of(kind) is None


def test_an_unknown_name_gets_the_nearest():
  with pytest.raises(ConfigError) as caught:
    find_device("h20")
  assert "h200" in caught.value.cure
  assert find_device("A100") is find_device("a100-80")
  assert find_device("TPU v5e") is find_device("v5e")


def test_unknown_peaks_are_none_and_known_ones_are_whole():
  assert find_device("t4").flops("bfloat16") is None  # Turing has none
  assert find_device("t4").flops("float16") == 65e12
  assert find_device("cpu").flops("float32") is None
  for device in DEVICES:
    assert all(1e12 < peak < 1e16 for peak in device.peak_flops.values())
    if device.kind == "cpu":
      continue
    assert device.source
    assert device.memory_bytes and device.usable_bytes and device.memory_bandwidth
    # A MiB of the driver is more than a MB of the data sheet; none has 10 % more.
    assert 0.93 < device.usable_bytes / device.memory_bytes < 1.08
    # FLOPs per byte at which a program stops waiting for memory: 80 to 700 for them all.
    ridge = max(device.peak_flops.values()) / device.memory_bandwidth
    assert 80 < ridge < 1300
  assert len({device.name for device in DEVICES}) == len(DEVICES)
