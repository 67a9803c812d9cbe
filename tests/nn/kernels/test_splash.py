# SPDX-License-Identifier: Apache-2.0
"""Splash attention is attention, by Pallas's interpreter: values and gradients for every
mask and every layout of heads, on a mesh too; what it cannot do is refused by name."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import slow
from jax.experimental.pallas.ops.tpu import splash_attention as library
from jax.sharding import NamedSharding, PartitionSpec
from meshes import mesh_of
from parameters import random_params

from flaxlm.config import (
  SPLASH,
  FusedKernel,
  ModelConfig,
  TrainingConfig,
)
from flaxlm.decoding.prefill import Request, prefill_prompts
from flaxlm.errors import ConfigError
from flaxlm.nn.attention import attend
from flaxlm.nn.base import Source
from flaxlm.nn.execution import Execution
from flaxlm.nn.kernels.paths import choose_path, rows_path, training_path
from flaxlm.nn.kernels.splash import (
  Band,
  attend_masked,
  attend_splash,
  band_kernel,
  dealt_places,
)
from flaxlm.nn.masks import Pattern, Placement, Scoring, Sight, visible
from flaxlm.nn.models import build_model
from flaxlm.planning.compile import TPU_ENVIRONMENT
from flaxlm.sharding import mesh_for

INTERPRETED = dataclasses.replace(SPLASH, shortest=0, interpreted=True)
WAYS = {
  "causal": dict(),
  "window": dict(window=140),
  "bidirectional": dict(causal=False),
  "bidirectional_window": dict(causal=False, window=140),
  "softcap": dict(softcap=2.0),
  "learned_sinks": dict(sinks=True),
  "all": dict(window=140, softcap=2.0, sinks=True),
}
ONCE = ("all", True, 2)  # the others are for the slow tests


@dataclasses.dataclass(frozen=True)
class Case:
  """One call of attention, and what the reference makes of it."""

  causal: bool = True
  window: int | None = None
  softcap: float | None = None
  sinks: bool = False
  packed: bool = True
  kv_heads: int = 2
  num_queries: int = 384  # in blocks of 128
  num_keys: int = 384
  rows: int = 1

  @property
  def arguments(self) -> tuple:
    """q, k, v, sinks, the cotangent, and the segments of queries and of keys."""
    random = np.random.default_rng(0)
    draw = lambda *shape: random.standard_normal(shape, np.float32)
    B, T, S, N, H = self.rows, self.num_queries, self.num_keys, 4, 32
    segments = lambda n: np.tile(
      1 + (np.arange(n) > n // 3) + (np.arange(n) > n // 2), (B, 1)
    )
    qkv = draw(B, T, N, H), draw(B, S, self.kv_heads, H), draw(B, S, self.kv_heads, H)
    pair = (segments(T), segments(S)) if self.packed else (None, None)
    return *qkv, draw(N) if self.sinks else None, draw(B, T, N, H), *pair

  def mask(self, queries: jax.Array, keys: jax.Array) -> jax.Array | None:
    slots = jnp.broadcast_to(jnp.arange(self.num_queries), (self.rows, self.num_queries))
    where = Placement(slots, queries, keys)
    return visible(where, self.num_keys, self.causal, self.window)

  def reference(self, q, k, v, sinks, cotangent, *segments):
    """The output of `attend`, and its gradients."""
    sight = Sight(self.mask(*segments))
    run = lambda q, k, v, sinks: attend(q, k, v, sight, Scoring(0.2, self.softcap), sinks)[
      0
    ]
    out, vjp = jax.vjp(run, q, k, v, sinks)
    return out, vjp(cotangent)

  def splash(self, q, k, v, sinks, cotangent, *segments):
    """The same by the kernel."""
    pair = segments if self.packed else None
    sight = Sight(None, pattern=Pattern(self.causal, self.window, pair))
    scoring = Scoring(0.2, self.softcap)
    run = lambda q, k, v, sinks: attend_splash(q, k, v, sight, scoring, sinks, True)
    out, vjp = jax.vjp(run, q, k, v, sinks)
    return out, vjp(cotangent)


def compare(actual, expected) -> None:
  close = lambda a, e: np.testing.assert_allclose(a, e, atol=3e-5)
  jax.tree.map(close, actual, expected)


def marked(*values):
  return values if values == ONCE else slow(*values)


@pytest.mark.parametrize(
  ("way", "packed", "kv_heads"),
  [marked(way, packed, K) for way in WAYS for packed in (True, False) for K in (1, 2, 4)],
)
def test_splash_equals_reference_with_gradients(way, packed, kv_heads):
  case = Case(**WAYS[way], packed=packed, kv_heads=kv_heads)
  compare(jax.jit(case.splash)(*case.arguments), jax.jit(case.reference)(*case.arguments))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(128, 384), (384, 128)])
def test_queries_read_another_sequence(sizes):
  """An encoder's output, of which each document sees its own part."""
  case = Case(causal=False, num_queries=sizes[0], num_keys=sizes[1])
  compare(jax.jit(case.splash)(*case.arguments), jax.jit(case.reference)(*case.arguments))


@pytest.mark.parametrize("way", [slow(way) if way != "all" else way for way in WAYS])
def test_members_of_a_mesh_share_rows_heads_and_queries(way):
  case = Case(**WAYS[way], rows=2, num_queries=512, num_keys=512)
  mesh = mesh_of(data=2, context=2, tensor=2)
  put = lambda x, *spec: (
    x if x is None else jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
  )
  q, k, v, sinks, cotangent, *segments = case.arguments
  rows = [put(x, "data", "context", "tensor") for x in (q, k, v)]
  segments = [put(x, "data", "context") for x in segments]
  with jax.set_mesh(mesh):
    actual = jax.jit(case.splash)(*rows, sinks, cotangent, *segments)
  compare(jax.device_get(actual), jax.jit(case.reference)(*case.arguments))


def test_a_member_of_data_has_the_gradients_of_its_own_rows():
  """As in training/accumulation.py, where `data` is no axis of the kernel's mesh."""
  case = Case(rows=2, num_queries=256, num_keys=256)
  q, k, v, _, cotangent, *segments = case.arguments
  rows = PartitionSpec("data")
  attend_rows = lambda q, k, v, cotangent, *segments: case.splash(
    q, k, v, None, cotangent, *segments
  )
  with jax.set_mesh(mesh_of(data=2, tensor=2)):
    on_mesh = jax.shard_map(
      attend_rows, in_specs=rows, out_specs=rows, axis_names={"data"}, check_vma=False
    )
    actual = jax.jit(on_mesh)(q, k, v, cotangent, *segments)
  compare(jax.device_get(actual), jax.jit(case.reference)(*case.arguments))


@pytest.mark.slow
def test_kv_heads_are_on_the_devices_of_their_query_heads():
  case = Case(**WAYS["all"], rows=2, kv_heads=2)
  mesh = mesh_for(mesh_of(data=2, tensor=4), ModelConfig(num_heads=4, num_kv_heads=2))
  with jax.set_mesh(mesh):
    actual = jax.jit(case.splash)(*case.arguments)
  compare(jax.device_get(actual), jax.jit(case.reference)(*case.arguments))


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("parts", [2, 3, 4])
def test_members_of_context_have_the_same_work(window, parts):
  """The blocks that each computes, in every kernel; with a window one more or less."""
  length = 2 * parts * 1024
  kernel = band_kernel(Pattern(True, window), length, length, parts)
  places = dealt_places(length, parts)
  assert sorted(places) == list(range(length))
  for tables in (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info):
    shares = np.split(np.asarray(tables.block_mask), parts, axis=1)
    work = [np.count_nonzero(share) for share in shares]
    assert max(work) - min(work) <= (0 if window is None else 2)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(
  "pattern", [Pattern(True), Pattern(True, 200), Pattern(False, 200), Pattern(False, 1)]
)
def test_blocks_are_those_of_the_mask(pattern, parts):
  """The tables that the library makes of answers are those that it makes of the mask."""
  T = 1024
  places = dealt_places(T, parts) if parts > 1 and pattern.causal else np.arange(T)
  slots = jnp.asarray(places)[None]
  dense = visible(Placement(slots), T, pattern.causal, pattern.window)
  kernel = band_kernel(pattern, T, T, parts)
  expected = library.make_splash_mha(
    library.MultiHeadMask([library.NumpyMask(np.asarray(dense[0]))]),
    block_sizes=kernel.kwargs["block_sizes"],
    head_shards=1,
    q_seq_shards=parts,
  )
  for name in ("fwd_mask_info", "dq_mask_info", "dkv_mask_info"):
    for table in ("data_next", "block_mask"):
      actual = getattr(getattr(kernel, name), table)
      np.testing.assert_array_equal(actual, getattr(getattr(expected, name), table))
  seen = Band.of(pattern)(places[:, None], np.arange(T)[None])
  np.testing.assert_array_equal(seen, dense[0])


# -- In models ---------------------------------------------------------------------------


def model_pair(cfg: ModelConfig, **training):
  """The same model with XLA's operations, and with the interpreted kernel."""
  runs = (TrainingConfig(attention=path, **training) for path in ("blocked", "splash"))
  return [build_model(cfg, run, INTERPRETED) for run in runs]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["decoder", "encoder", "encoder_decoder"])
@pytest.mark.parametrize("remat", ["none", "attention"])
def test_models_compute_the_same_with_gradients(family, remat):
  """Windows in a pattern, packed documents, padding at the end, layers in a loop."""
  cfg = ModelConfig(
    family=family,
    depth=2,
    width=32,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=64,
    context=256,
    **(dict(window=48, layer_pattern="LG") if family == "decoder" else {}),
  ).resolve()
  tokens = np.random.default_rng(0).integers(0, 64, (2, 256), np.int32)
  segments = np.repeat([[1] * 100 + [2] * 120 + [0] * 36], 2, 0).astype(np.int32)
  source = {}
  if family == "encoder_decoder":
    source = dict(source=Source(tokens[:, :128], segments_BS=segments[:, 70:198]))

  def loss(params, model):
    out = model.apply({"params": params}, tokens, None, segments, method="hidden", **source)
    return ((out.value.astype(jnp.float32) * (segments > 0)[..., None]) ** 2).mean()

  plain, fused = model_pair(cfg, remat=remat, scanned=True)
  params = random_params(plain)
  run = jax.jit(jax.value_and_grad(loss), static_argnums=1)
  close = lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-3, atol=1e-5)
  jax.tree.map(close, run(params, fused), run(params, plain))


@pytest.mark.parametrize("window", [slow(None), 48])
def test_prompts_are_read_by_splash(window, monkeypatch):
  """Prompts of different lengths, into a ring too, by the mask alone."""
  cfg = ModelConfig(
    depth=2,
    width=32,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=64,
    context=512,
    window=window,
    layer_pattern="G" if window is None else "LG",
  ).resolve()
  prompts = [[*range(1, 60)] * 4, [*range(9, 50)], [7]]
  request = Request(prompts, 20, num_ids=64)
  found, masks = [], []
  monkeypatch.setattr(
    "flaxlm.nn.kernels.splash.attend_masked",
    lambda arrays, **options: masks.append(1) or attend_masked(arrays, **options),
  )
  for path in ("blocked", "auto"):
    model = build_model(cfg, TrainingConfig(attention=path), INTERPRETED)
    logits_BV, _ = prefill_prompts(model, random_params(model), request, mesh=None)
    found.append(np.asarray(logits_BV[:3]))
  assert masks
  np.testing.assert_allclose(found[1], found[0], atol=1e-4 * np.abs(found[0]).max())


def test_other_rows_than_those_of_training_have_any_length():
  """Training refuses its own before it starts; a prompt for an encoder comes as it is."""
  cfg = ModelConfig(vocab_size=64, context=512).resolve()
  run = Execution(attention="splash", kernel=SPLASH)
  with pytest.raises(ConfigError, match="multiple of 128"):
    training_path(cfg, run, {}, 100, 0)
  assert rows_path(cfg, run, {}, (100, 100)).name == "blocked"
  assert rows_path(cfg, run, {}, (512, 512)).name == "splash"
  with pytest.raises(ConfigError, match="pipeline"):
    rows_path(cfg, run, {"stage": 2}, (100, 100))


# -- What it cannot do -------------------------------------------------------------------


def test_what_splash_cannot_do_is_refused_by_name():
  def chosen(wanted="auto", kernel=SPLASH, sizes=None, lengths=(1024, 0), **model):
    cfg = ModelConfig(vocab_size=64, **model).resolve()
    run = Execution(attention=wanted, kernel=kernel)
    return choose_path(cfg, run, sizes or {}, lengths)

  assert chosen().name == chosen("splash").name == "splash"
  assert "supports the model" in chosen().why
  assert chosen("blocked").name == "blocked"
  # All of these are for it.
  taken = dict(attention_softcap=30.0, learned_sinks=True, window=8, layer_pattern="LG")
  assert chosen(**taken, sizes={"context": 4, "tensor": 2}).name == "splash"
  # `auto` alone looks at the length.
  assert chosen(lengths=(512, 512)).name == "blocked"
  assert "1,024 tokens" in chosen(lengths=(512, 512)).why
  assert chosen("splash", lengths=(512, 512)).name == "splash"
  for cause, case in {
    "above 256": dict(width=512, num_heads=1),
    "alibi": dict(positions="alibi"),
    "relative": dict(positions="relative"),
    "sink_tokens": dict(window=8, sink_tokens=2),
    "multiple of 128": dict(lengths=(1000,)),
    "multiple of 1024 .* context=4": dict(lengths=(1536,), sizes={"context": 4}),
    "pipeline": dict(sizes={"stage": 2}),
  }.items():
    with pytest.raises(ConfigError, match=f"attention=splash is not possible: .*{cause}"):
      chosen("splash", **case)
    assert chosen(**case).name == "blocked"
    assert chosen(**case).why.startswith("splash is not possible: ")
  with pytest.raises(ConfigError, match="splash is not possible: it runs on TPUs"):
    chosen("splash", kernel=FusedKernel("cudnn", 256))
  with pytest.raises(ConfigError, match="cudnn is not possible: it runs on NVIDIA GPUs"):
    chosen("cudnn")


# -- On TPUs that are not here -----------------------------------------------------------


# One layer of llama3_8b with its gradients, on four devices: lines of bytes of temporaries.
COMPILE = """
import json
import sys
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from flaxlm.config import mesh_shape
from flaxlm.nn.kernels.splash import attend_splash
from flaxlm.nn.masks import Pattern, Scoring, Sight
from flaxlm.planning.compile import make_target_mesh, tpu_options
from flaxlm.devices import find_device

def gradients(q, k, v, segments):
  sight = Sight(None, pattern=Pattern(True, None, (segments, segments)))
  run = lambda *qkv: attend_splash(*qkv, sight, Scoring(0.1, 30.0))
  return jax.vjp(run, q, k, v)[1](q)

name = sys.argv[1]
for axes in ({"tensor": 4}, {"context": 2, "data": 2}):
  mesh = make_target_mesh(mesh_shape(axes), find_device(name))[1]
  array = lambda dtype, *shape, spec: jax.ShapeDtypeStruct(
    shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec))
  )
  for T in (8192, 32_768):
    heads = lambda n: array("bfloat16", 2, T, n, 128, spec=("data", "context", "tensor"))
    arrays = heads(32), heads(8), heads(8), array("int32", 2, T, spec=("data", "context"))
    with jax.set_mesh(mesh):
      compiled = jax.jit(gradients).lower(*arrays).compile(tpu_options())
    kernels = compiled.as_text().count('custom_call_target="tpu_custom_call"')
    print(json.dumps([kernels, compiled.memory_analysis().temp_size_in_bytes]))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_for_users")
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize("name", ["v5e", "v5p", "v6e", "7x"])
def test_a_layer_compiles_for_tpus(name):
  """Heads or queries on several devices, at 8k and 32k, in three kernels. The scores of
  8,192 tokens would take 4 GiB in bfloat16, and 64 those of 32,768."""
  environment = os.environ | TPU_ENVIRONMENT | {"JAX_PLATFORMS": "cpu"}
  child = subprocess.run(
    [sys.executable, "-c", COMPILE, name], env=environment, capture_output=True, text=True
  )
  assert child.returncode == 0, child.stderr
  found = [json.loads(line) for line in child.stdout.splitlines()]
  assert [kernels for kernels, _ in found] == [3] * 4
  assert max(size for _, size in found) < 2**30
