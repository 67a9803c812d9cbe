# SPDX-License-Identifier: Apache-2.0
"""A model that the machine cannot hold is refused before it takes what there is."""

import types

import jax
import pytest
from meshes import mesh_of

from flaxlm.config import Config, ModelConfig, OptimizerConfig
from flaxlm.errors import OutOfMemoryError
from flaxlm.nn.models import build_model
from flaxlm.platform import free_memory, host_memory
from flaxlm.training.optimizer import build_optimizer
from flaxlm.training.program import build_program, check_memory
from flaxlm.training.step import abstract_state

WIDE_AND_DEEP = ModelConfig(width=2**14, depth=1024, vocab_size=64, num_heads=16)


def test_width_times_depth_is_bounded_by_the_memory():
  """Each is within its own bounds."""
  cfg = Config(name="x", model=WIDE_AND_DEEP).resolve(64)
  with pytest.raises(OutOfMemoryError, match=r"take 52,845\.8 GB of"):
    build_program(cfg.model, cfg, mesh_of(), fresh=True)


@pytest.mark.parametrize("axes", [{}, {"data": 2}, {"fsdp": 2}])
def test_the_state_and_the_gradient_count_on_every_device(axes: dict[str, int]):
  """Adam has two moments: four numbers of four bytes for each parameter."""
  cfg = Config(name="x", model=ModelConfig(width=64, depth=2, vocab_size=64)).resolve(64)
  model, optimizer = build_model(cfg.model), build_optimizer(OptimizerConfig(), 10)
  state = abstract_state(model, optimizer, mesh_of(**axes))
  least = 16 * sum(x.size for x in jax.tree.leaves(state.params)) * axes.get("data", 1)
  assert least > 1e6
  with pytest.raises(OutOfMemoryError):
    check_memory(state, least)  # counters and what is replicated come on top
  check_memory(state, int(1.01 * least))


def test_the_memory_is_that_of_the_container(tmp_path):
  whole, limit = host_memory(tmp_path / "none"), tmp_path / "memory.max"
  assert whole > 2**28
  for text, size in (("max\n", whole), ("1000000\n", 10**6), (f"{2**62}\n", whole)):
    limit.write_text(text)
    assert host_memory(limit) == size


def test_free_memory_is_what_devices_tell():
  tells = types.SimpleNamespace(memory_stats=lambda: dict(bytes_limit=90, bytes_in_use=20))
  silent = types.SimpleNamespace(memory_stats=lambda: None)
  assert free_memory([tells, tells]) == 140
  assert free_memory([silent, silent]) == host_memory()
