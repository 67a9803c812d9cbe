# SPDX-License-Identifier: Apache-2.0
"""Whether a step fits is the compiler's word where a compiler was asked."""

import dataclasses

import pytest

from flaxlm.config import load_config, mesh_shape
from flaxlm.devices import find_device
from flaxlm.planning.compile import CompiledStep, explain, needed
from flaxlm.planning.planner import find_cure, resolve
from flaxlm.planning.report import Report, to_json, verdict
from flaxlm.planning.roofline import Plan, plan_training

GIB = 2**30
REFUSAL = (
  "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 109.90G of 95.74G hbm. "
  "Exceeded hbm capacity by 14.16G."
)


def llama(remat: str, **mesh: int) -> Plan:
  cfg = resolve(load_config("llama3_8b"))
  training = dataclasses.replace(cfg.training, remat=remat)
  data = dataclasses.replace(cfg.data, batch_size=16, seq_len=2048)
  cfg = dataclasses.replace(cfg, training=training, data=data)
  return plan_training(cfg, mesh_shape(mesh), find_device("v5p"))


@pytest.fixture(scope="module")
def fitting() -> Plan:
  return llama("none", fsdp=16)


def test_a_refusal_for_want_of_memory_is_no_fit(fitting):
  compiled = CompiledStep(target="v5p", error=explain(REFUSAL), peak_bytes=needed(REFUSAL))
  assert compiled.error == "out of memory: 109.90G needed, 95.74G available"
  assert compiled.peak_bytes == round(109.9 * GIB)
  cure = find_cure(fitting, compiled)
  assert fitting.fits and cure is not None
  # As much more than planned is expected of the cure, too.
  share = fitting.memory.total / (109.9 * GIB)
  assert cure.memory.total <= share * 95.5 * GIB < fitting.memory.total
  report = Report(plan=fitting, compiled=compiled, cure=cure)
  text = verdict(report)
  assert text.startswith(
    "DOES NOT FIT: 109.90 GiB of 95.50 GiB per device (115%), says the"
  )
  assert cure.flags in text
  assert to_json(report)["fits"] is False
  assert find_cure(fitting, None) is None


def test_any_other_refusal_is_named(fitting):
  compiled = CompiledStep(target="v5p", error=explain("INTERNAL: Mosaic failed\nat ..."))
  assert needed("INTERNAL: Mosaic failed") is None
  report = Report(plan=fitting, compiled=compiled, cure=find_cure(fitting, compiled))
  assert verdict(report) == "DOES NOT COMPILE: INTERNAL: Mosaic failed"
  assert report.fits is False and report.cure is None


def test_what_the_compiler_accepts_fits():
  """Although more was planned than there is."""
  plan = llama("none", data=1)
  assert plan.fits is False
  compiled = CompiledStep(target="v5p", peak_bytes=90 * GIB)
  report = Report(plan=plan, compiled=compiled, cure=find_cure(plan, compiled))
  assert verdict(report).startswith("FITS: 90.00 GiB of 95.50 GiB per device (94%), says")
  assert report.cure is None and report.fits
  too_much = Report(plan=plan, compiled=dataclasses.replace(compiled, peak_bytes=96 * GIB))
  assert too_much.fits is False  # of a compiler that does not know the limit
