# SPDX-License-Identifier: Apache-2.0
"""The 8B card on whole pods: the real compiler accepts it, it fits, nothing is replicated.

Takes minutes on two cores; needs `pip install 'flaxlm[tpu]'`, and no TPU.
"""

import importlib.util
import json

import pytest

from flaxlm.config import load_config, mesh_shape, override
from flaxlm.devices import find_device
from flaxlm.planning.compile import compile_step
from flaxlm.planning.memory import training_memory
from flaxlm.planning.planner import resolve
from flaxlm.planning.sharding_report import report_sharding

pytestmark = [
  pytest.mark.slow,
  pytest.mark.usefixtures("compiled_for_users"),
  pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu"),
]

# Chips as JAX counts them. Cloud counts the two cores of a v5p's: its v5p-128 has 64.
PODS = [("v5e", "fsdp=256"), ("v5p", "fsdp=128"), ("v5p", "fsdp=64")]
# A row of 8,192 tokens a chip on v5e; its logits, 4.2 GB at once, in eighths.
KNOBS = ["--data.batch_size=256", "--training.loss_chunks=8"]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("name", "mesh"), PODS)
def test_llama3_8b_compiles_for_a_pod_and_fits(name: str, mesh: str, record_property):
  cfg = override(resolve(load_config("llama3_8b")), [f"--mesh={mesh}", *KNOBS])
  device, sizes = find_device(name), mesh_shape(cfg.mesh)
  N = sizes["fsdp"]
  report = report_sharding(cfg, cfg.mesh, name, compiled=False)
  parameter_bytes = report.bytes_per_device["parameters"]
  share = parameter_bytes * N / report.whole_bytes
  compiled = compile_step(cfg, sizes, device)
  found = {
    "target": compiled.target,
    "seconds": compiled.seconds,
    "peak_bytes": compiled.peak_bytes,
    "analytic_bytes": training_memory(cfg, sizes, device.lanes).total,
    "argument_bytes": compiled.argument_bytes,
    "parameter_bytes": parameter_bytes,
    "share": share,
    "collectives": [[c.kind, c.axes, c.count, c.bytes] for c in compiled.collectives],
  }
  print(json.dumps(found))
  record_property("found", found)
  assert compiled.error is None
  assert compiled.peak_bytes is not None and compiled.argument_bytes is not None
  assert device.usable_bytes is not None
  assert compiled.peak_bytes < device.usable_bytes
  # Norms, 0.003 % of the bytes, are whole on every device; all else is there once.
  assert 1 <= share < 1.01
  # Parameters and Adam's two moments of each, and next to nothing: a row of ids or two.
  state = sum(report.bytes_per_device.values())
  assert compiled.argument_bytes == pytest.approx(state, rel=0.01)
  # Weights travel, twice at least: v5e gathers them, v5p has all-reduces alone.
  sent = sum(one.bytes for one in compiled.collectives if one.axes == "fsdp")
  assert sent > 2 * 2 * report.whole_bytes / 4 * (N - 1) / N
