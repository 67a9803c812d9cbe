# SPDX-License-Identifier: Apache-2.0
"""The search finds every mesh, ranks those that fit first, and fixes those that do not."""

import dataclasses
import io
import math

import pytest

from flaxlm.config import (
  Config,
  DataConfig,
  ModelConfig,
  MoEConfig,
  TrainingConfig,
  mesh_shape,
)
from flaxlm.devices import find_device
from flaxlm.planning.report import MOST_CHOICES, Report, print_report
from flaxlm.planning.roofline import plan_training
from flaxlm.planning.search import cheapest_fit, meshes, nearest, search, sharing_rows

CFG = Config(
  model=ModelConfig(
    depth=4, width=256, num_heads=4, num_kv_heads=2, vocab_size=1024, context=256
  ).resolve(),
  data=DataConfig(seq_len=128, batch_size=16),
  training=TrainingConfig(dtype="bfloat16"),
)
H200 = find_device("h200")


def small(usable: float):
  """An H200 with less memory."""
  return dataclasses.replace(H200, usable_bytes=int(usable))


def test_every_mesh_is_there_once():
  found = list(meshes(CFG, 8))
  assert all(math.prod(sizes.values()) == 8 for sizes in found)
  assert len({tuple(sizes.values()) for sizes in found}) == len(found) == 10
  moe = MoEConfig(num_experts=4)
  cfg = dataclasses.replace(CFG, model=dataclasses.replace(CFG.model, moe=moe))
  assert len(list(meshes(cfg, 8))) == 20


def test_the_fastest_that_fits_comes_first():
  device = small(60e6)
  found = search(CFG, device, 8)
  fits = [choice.fits for choice in found]
  assert fits == sorted(fits, reverse=True)
  assert any(fits) and not all(fits)
  seconds = [choice.times.seconds for choice in found if choice.fits]
  assert seconds == sorted(seconds)
  # Four query heads: tensor=8 cannot be laid out.
  assert max(choice.sizes["tensor"] for choice in found) == 4
  for choice in found:
    if choice.fits and choice.cfg.training.accumulation_steps > 1:
      fewer = dataclasses.replace(choice.cfg.training, accumulation_steps=1)
      cfg = dataclasses.replace(CFG, training=fewer)
      assert not plan_training(cfg, choice.sizes, device).fits


def test_its_meshes_are_printed_whole():
  """They can be copied: no column is cut at the width of a terminal."""
  found = search(CFG, small(60e6), 8)
  out = io.StringIO()
  print_report(Report(plan=found[0], choices=found), out)
  lines = out.getvalue().splitlines()
  title = f"Best {MOST_CHOICES} of {len(found)} ways to run it"
  start = next(n for n, line in enumerate(lines) if line.startswith(title)) + 2
  shown = [line.split()[0] for line in lines[start : start + MOST_CHOICES]]
  assert shown == [choice.mesh for choice in found[:MOST_CHOICES]]
  assert "data=2,fsdp=2,tensor=2" in shown


def test_the_cheapest_change_keeps_what_it_can():
  sizes = mesh_shape(dict(data=8))
  totals = {
    remat: plan_training(
      dataclasses.replace(CFG, training=dataclasses.replace(CFG.training, remat=remat)),
      sizes,
      H200,
    ).memory.total
    for remat in ("none", "dots", "full")
  }
  less_kept = cheapest_fit(CFG, sizes, small(totals["dots"] + 1000))
  assert less_kept is not None and less_kept.sizes == sizes
  assert less_kept.cfg.training.remat != "none" or (
    less_kept.cfg.training.accumulation_steps > 1
  )
  assert f"--training.remat={less_kept.cfg.training.remat}" in less_kept.flags
  state = plan_training(CFG, sizes, H200).memory.moments["update"]
  sharded = cheapest_fit(CFG, sizes, small(0.8 * sum(state.values())))
  assert sharded is not None and sharded.num_devices == 8
  assert sharded.sizes["fsdp"] * sharded.sizes["tensor"] > 1
  one = mesh_shape({})
  more = cheapest_fit(CFG, one, small(0.8 * sum(state.values())))
  assert more is not None and more.num_devices == 2
  assert more.fits


def test_a_cure_may_share_the_rows_of_norms():
  """Each member of `tensor` then keeps a part of a block's input, on as many devices."""
  cfg = dataclasses.replace(CFG, data=DataConfig(seq_len=256, batch_size=8))
  none = small(1)  # every layout has its least memory
  whole, shared = (
    min(plan.memory.total for plan in search(one, none, 4))
    for one in (cfg, sharing_rows(cfg))
  )
  assert shared < whole
  found = cheapest_fit(cfg, mesh_shape(dict(fsdp=4)), small(whole - 1))
  assert found is not None and found.fits and found.num_devices == 4
  assert "--training.sequence-parallel=true" in found.flags


def test_nothing_may_fit():
  assert cheapest_fit(CFG, mesh_shape({}), small(1e5)) is None


@pytest.mark.parametrize("number", [3, 5])
def test_a_batch_that_no_mesh_divides_leaves_nothing(number: int):
  assert search(CFG, H200, number) == []
  near = nearest(CFG, H200, number)
  assert near is not None and near.num_devices == number - 1


def test_no_number_may_be_near():
  alone = dataclasses.replace(CFG, data=DataConfig(seq_len=128, batch_size=0))
  assert nearest(alone, H200, 2) is None
