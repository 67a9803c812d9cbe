# SPDX-License-Identifier: Apache-2.0
"""The analytic memory against libtpu's, for chips that are not present: within 10 %.

Takes a quarter of an hour on two cores; needs `pip install 'flaxlm[tpu]'`, and no TPU.
"""

import dataclasses
import importlib.util
import json

import jax
import pytest

from flaxlm.config import (
  Config,
  DataConfig,
  ModelConfig,
  OptimizerConfig,
  TrainingConfig,
  mesh_shape,
)
from flaxlm.devices import find_device
from flaxlm.planning.compile import compile_step
from flaxlm.planning.memory import training_memory
from flaxlm.planning.network import network_bytes
from flaxlm.planning.roofline import with_path

pytestmark = [
  pytest.mark.slow,
  pytest.mark.usefixtures("compiled_for_users"),
  pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu"),
]

GPT2 = dict(positions="learned", norm="layernorm", gated=False, activation="gelu_tanh")
GPT2 |= dict(biased=True, vocab_size=50_304, context=1024)
LLAMA = dict(tied_embeddings=False, context=32_768)
MODELS = {
  "gpt2_124m": GPT2 | dict(depth=12, width=768, num_heads=12),
  "gpt2_1558m": GPT2 | dict(depth=48, width=1600, num_heads=25),
  "llama_1b": LLAMA
  | dict(depth=16, width=2048, num_heads=16, num_kv_heads=8, ffn_width=8192)
  | dict(vocab_size=65_536),
  "llama_7b": LLAMA
  | dict(depth=32, width=4096, num_heads=32, ffn_width=11_008, vocab_size=32_000),
  "llama3_8b": LLAMA
  | dict(depth=32, width=4096, num_heads=32, num_kv_heads=8, ffn_width=14_336)
  | dict(vocab_size=128_256),
}


@dataclasses.dataclass(frozen=True)
class Point:
  model: str
  device: str
  mesh: tuple[tuple[str, int], ...]
  remat: str
  batch_size: int
  seq_len: int
  accumulation_steps: int = 1
  optimizer: str = "adamw"

  def __str__(self) -> str:
    mesh = ",".join(f"{axis}={size}" for axis, size in self.mesh)
    text = f"{self.model}-{self.device}-{mesh}-{self.remat}"
    if self.seq_len > 4096:
      text += f"-{self.seq_len}"
    return f"{text}-{self.accumulation_steps}-{self.optimizer}"

  @property
  def cfg(self) -> Config:
    return Config(
      model=ModelConfig(**MODELS[self.model]).resolve(),
      data=DataConfig(seq_len=self.seq_len, batch_size=self.batch_size),
      optimizer=OptimizerConfig(kind=self.optimizer),
      training=TrainingConfig(
        dtype="bfloat16",
        scanned=True,
        remat=self.remat,
        accumulation_steps=self.accumulation_steps,
      ),
    )


def points(model, device, mesh, batch_size, seq_len, remats="none dots full", **rest):
  axes = tuple(mesh.items())
  return [
    Point(model, device, axes, remat, batch_size, seq_len, **rest)
    for remat in remats.split()
  ]


# Not here, with what was seen of GPT-2 124M: without a loop over layers (`scanned=False`)
# the compiler computes elementwise results again by itself, so that with remat=none it
# needs 24 % less, and 11 % more with full. Nor two tensor members with remat=none: the
# compiler keeps 19 % more of llama_1b, since merging batch and heads in
# `nn.attention.mix` makes both members attend to all heads.
GRID = [
  *points("gpt2_124m", "v5e", dict(data=8), 32, 1024),
  *points("gpt2_124m", "v6e", dict(fsdp=8), 32, 1024),
  *points("gpt2_124m", "v5e", dict(data=1), 4, 1024, "dots"),
  *points("gpt2_124m", "v5e", dict(data=8), 64, 1024, "dots", accumulation_steps=4),
  *points("gpt2_1558m", "v6e", dict(fsdp=8), 16, 1024),
  *points("llama_1b", "v5p", dict(fsdp=8), 16, 2048),
  *points("llama_1b", "v6e", dict(data=2, fsdp=4), 16, 2048),
  *points("llama_1b", "v5p", dict(fsdp=4, tensor=2), 16, 2048, "dots full"),
  *points("llama_1b", "v5e", dict(fsdp=8), 8, 1024, "full", optimizer="muon"),
  *points("llama_1b", "v5e", dict(fsdp=8), 8, 1024, "full", optimizer="adafactor"),
  *points("llama_7b", "v5p", dict(fsdp=8), 8, 1024),
  *points("llama3_8b", "v5p", dict(fsdp=16), 16, 2048),
  *points("llama3_8b", "v5p", dict(fsdp=16), 64, 2048, "full", accumulation_steps=4),
  *points("llama3_8b", "v5p", dict(fsdp=16), 16, 8192, "full"),
  *points("llama3_8b", "v5p", dict(fsdp=16), 16, 16_384, "full"),
  *points("llama3_8b", "v5p", dict(fsdp=16), 16, 32_768, "full"),
  *points("llama3_8b", "v5p", dict(fsdp=8, context=2), 8, 32_768, "full"),
]


# Where the compiler of a version of jax is further off than 10 %, and why. Everywhere: 3.09
# GB for 3.50, 2.49 for 2.89. What lacks is the logits' gradient in bfloat16, 0.41 GB, which
# the compiler here makes anew in each product that reads it; with remat=none, on a mesh of
# one, and with fsdp it keeps it.
UNKEPT = {"gpt2_124m-v5e-data=8-dots-1-adamw", "gpt2_124m-v5e-data=8-full-1-adamw"}
OUTSIDE = {
  (0, 10): UNKEPT
  | {
    # 3.98 GB for 4.79, 4.30 with its default effort: less than is counted at each of the
    # four moments. What it saves is not known; remat=dots agrees to 1 %.
    "llama_1b-v5p-fsdp=4,tensor=2-full-1-adamw",
  },
  (0, 11): UNKEPT
  | {
    # 4.03 GB for 3.36, 6.02 with its default effort: it overlaps the products of several
    # kernels' updates, whose temporaries are then there together.
    "llama_1b-v5e-fsdp=8-full-1-muon",
  },
}


def test_the_grid_is_large_enough():
  assert len(set(GRID)) == len(GRID)
  names = set(map(str, GRID))
  assert all(
    names >= outside and len(names - outside) >= 24 for outside in OUTSIDE.values()
  )


@pytest.mark.timeout(900)
@pytest.mark.parametrize("point", GRID, ids=str)
def test_memory_is_within_ten_percent(point: Point, record_property):
  sizes, device = mesh_shape(dict(point.mesh)), find_device(point.device)
  cfg, path = with_path(point.cfg, sizes, device)
  assert path is not None and path.name == "splash"
  compiled = compile_step(cfg, sizes, device)
  memory = training_memory(cfg, sizes, device.lanes)
  difference = compiled.difference(memory.total)
  record_property("difference", difference)
  print(json.dumps({"point": str(point), "difference": difference, "at": memory.peak}))
  assert compiled.error is None
  outside = OUTSIDE.get(jax.__version_info__[:2], set())
  assert difference is not None
  assert abs(difference) < (0.25 if str(point) in outside else 0.1)


@pytest.mark.timeout(900)
def test_traffic_of_fsdp_is_as_in_the_roofline():
  """Weights gathered twice, gradients reduced once. Measured: 13.6 % more, for shards go
  round 16 times on a ring of 16, and the embedding's gradient travels in float32.
  """
  (point,) = points("llama3_8b", "v5p", dict(fsdp=16), 16, 512, "full")
  cfg, sizes = point.cfg, mesh_shape(dict(point.mesh))
  compiled = compile_step(cfg, sizes, find_device("v5p"))
  sent = sum(one.bytes for one in compiled.collectives if one.axes == "fsdp")
  assert sent == pytest.approx(network_bytes(cfg, sizes)["fsdp"], rel=0.15)


def test_too_large_a_step_is_a_clean_result(monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_max_isa=AVX2")  # which libtpu does not know
  (point,) = points("llama_1b", "v5e", dict(fsdp=8), 64, 2048, "dots")
  cfg, sizes = point.cfg, mesh_shape(dict(point.mesh))
  compiled = compile_step(cfg, sizes, find_device("v5e"))
  assert compiled.error is not None and "out of memory" in compiled.error
  usable = find_device("v5e").usable_bytes
  assert usable is not None and training_memory(cfg, sizes).total > usable
