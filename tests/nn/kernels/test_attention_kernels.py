# SPDX-License-Identifier: Apache-2.0
"""The attention paths agree, forward and backward, for every mask."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import slow
from jax.sharding import NamedSharding, PartitionSpec
from meshes import mesh_of
from parameters import random_params

from flaxlm.config import SPLASH, TILED, ModelConfig, TrainingConfig, cudnn
from flaxlm.decoding.prefill import Request, prefill_prompts
from flaxlm.errors import ConfigError
from flaxlm.nn.attention import attend
from flaxlm.nn.execution import Execution
from flaxlm.nn.kernels import tiled
from flaxlm.nn.kernels.blocked import attend_blocked, cuts, query_blocks
from flaxlm.nn.kernels.cudnn import attend_cudnn
from flaxlm.nn.kernels.paths import choose_path
from flaxlm.nn.kernels.tiled import attend_tiled, tiles
from flaxlm.nn.masks import Pattern, Placement, Reach, Scoring, Sight, visible
from flaxlm.nn.models import build_model
from flaxlm.sharding import KV_COPIES, make_mesh

WAYS = {
  "causal": dict(),
  "window": dict(window=40),
  "window_and_sinks": dict(window=40, sink_tokens=2),
  "bidirectional": dict(causal=False),
  "bidirectional_window": dict(causal=False, window=40),
  "softcap": dict(softcap=2.0),
  "bias": dict(bias=1),
  "bias_of_each_row": dict(bias=2),
  "learned_sinks": dict(sinks=True),
  "all": dict(window=40, softcap=2.0, bias=1, sinks=True),
}
# It has everything; one thing each is for the slow tests.
ONCE = ("all",)
OUTSIDE_TILES = ("softcap", "bias", "bias_of_each_row", "learned_sinks", "all")
OUTSIDE_CUDNN = ("softcap", "bias", "bias_of_each_row", "learned_sinks", "all")


@pytest.mark.parametrize(
  ("way", "num_tokens", "kv_heads"),
  [
    *(slow(way, 130, 2) for way in WAYS if way not in (*ONCE, "window")),
    *((way, 130, 2) for way in (*ONCE, "window")),
    *(("all", 9, 1), ("all", 9, 4), ("causal", 9, 2)),
  ],
)
def test_kernels_equal_reference_with_gradients(way, num_tokens, kv_heads, monkeypatch):
  monkeypatch.setattr(tiled, "QUERIES", 48)  # several tiles of 130 queries
  B, T, N, H = 2, num_tokens, 4, 8
  options = dict(causal=True, window=None, softcap=None, bias=0, sinks=False) | WAYS[way]
  sink_tokens = options.get("sink_tokens", 0)
  keys = jax.random.split(jax.random.key(num_tokens), 5)
  q = jax.random.normal(keys[0], (B, T, N, H))
  k, v = jax.random.normal(keys[1], (2, B, T, kv_heads, H))
  cotangent = jax.random.normal(keys[2], (B, T, N, H))
  bias = jax.random.normal(keys[3], (options["bias"], N, T, T)) if options["bias"] else None
  sinks = jax.random.normal(keys[4], (N,)) if options["sinks"] else None
  slots = jnp.broadcast_to(jnp.arange(T), (B, T))
  segments = 1 + (slots > T // 3) + (slots > T // 2)
  where = Placement(slots, segments, segments)
  mask = visible(where, T, options["causal"], options["window"], sink_tokens)
  scoring = Scoring(H**-0.5, options["softcap"])
  reach = None
  if options["causal"]:
    reach = Reach(None if sink_tokens else options["window"])

  def output_and_gradients(attention):
    out, vjp = jax.vjp(attention, q, k, v, bias, sinks)
    return out, vjp(cotangent)

  expected = jax.jit(output_and_gradients, static_argnums=0)(
    lambda q, k, v, bias, sinks: attend(q, k, v, Sight(mask, bias), scoring, sinks)[0]
  )
  sight = lambda bias: Sight(mask, bias, reach=reach)
  kernels = [
    lambda q, k, v, bias, sinks: attend_blocked(q, k, v, sight(bias), scoring, sinks)
  ]
  if way not in OUTSIDE_TILES:
    kernels.append(lambda q, k, v, *_: attend_tiled(q, k, v, sight(None), scoring))
    if not sink_tokens:  # nothing is read but the pattern
      pattern = Pattern(options["causal"], options["window"], (segments, segments))
      seen = Sight(None, reach=reach, pattern=pattern)
      kernels.append(lambda q, k, v, *_: attend_tiled(q, k, v, seen, scoring))
  for kernel in kernels:
    actual = jax.jit(output_and_gradients, static_argnums=0)(kernel)
    close = lambda a, e: np.testing.assert_allclose(a, e, atol=3e-5)
    jax.tree.map(close, actual, expected)


def test_windows_reach_over_blocks():
  """Nothing but the window hides keys here: no document ends where a block begins."""
  q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 130, 2, 8))
  where, window, scoring = Placement(jnp.arange(130)[None]), 40, Scoring(0.3)
  sight = Sight(visible(where, 130, window=window), reach=Reach(window))
  assert len(query_blocks(130)) > 1
  with_gradients = lambda function: (
    function(q, k, v),
    jax.grad(lambda *qkv: (function(*qkv) ** 2).sum(), (0, 1, 2))(q, k, v),
  )
  expected = with_gradients(lambda *qkv: attend(*qkv, sight, scoring)[0])
  actual = with_gradients(lambda *qkv: attend_blocked(*qkv, sight, scoring))
  close = lambda a, e: np.testing.assert_allclose(a, e, atol=3e-5)
  jax.tree.map(close, actual, expected)


def test_gradients_of_ranges_are_rounded_once():
  """1 + 2^-8 + 2^-8: rounded after each sum, in bfloat16 it would be 1."""
  parts = [(1.0, (0, 5)), (2**-8, (2, 7)), (2**-8, (2, 6))]
  ranges = tuple(bounds for _, bounds in parts)
  scaled = lambda x: sum(
    (grad * part.sum() for part, (grad, _) in zip(cuts(x, ranges), parts, strict=True))
  )
  x = jnp.zeros((1, 7, 1, 1), jnp.bfloat16)
  found = np.float32(jax.grad(scaled)(x).ravel())
  np.testing.assert_array_equal(found, [1, 1, *[1 + 2**-7] * 3, 2**-7, 2**-8])


@pytest.fixture
def asked(monkeypatch) -> list[dict]:
  """What cuDNN is asked for, computed by the library's XLA implementation."""
  asked = []

  def in_its_place(*arrays, implementation, **options):
    asked.append(options)
    return library(*arrays, implementation="xla", **options)

  library = jax.nn.dot_product_attention
  monkeypatch.setattr(jax.nn, "dot_product_attention", in_its_place)
  return asked


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("way", [w for w in WAYS if w not in OUTSIDE_CUDNN])
def test_cudnn_is_asked_for_the_same(way, packed, asked):
  """Masks, windows and the scale, as the library reads them; `gpu` tests run cuDNN."""
  B, T, N, H = 2, 130, 4, 8
  options = dict(causal=True, window=None, sink_tokens=0) | WAYS[way]
  q, *_ = jax.random.normal(jax.random.key(0), (1, B, T, N, H))
  k, v = jax.random.normal(jax.random.key(1), (2, B, T, 2, H))
  slots = jnp.broadcast_to(jnp.arange(T), (B, T))
  segments = 1 + (slots > T // 3) + (slots > T // 2) if packed else None
  mask = visible(Placement(slots, segments, segments), T, *options.values())
  sinks = options["sink_tokens"]
  reach = Reach(None if sinks else options["window"], not packed and not sinks)
  sight = Sight(mask, reach=reach if options["causal"] else None)
  expected = jax.jit(lambda *qkv: attend(*qkv, sight, Scoring(0.3))[0])(q, k, v)
  actual = jax.jit(lambda *qkv: attend_cudnn(*qkv, sight, Scoring(0.3)))(q, k, v)
  np.testing.assert_allclose(actual, expected, atol=3e-5)
  # A mask is a bias of all scores: only what cuDNN cannot know otherwise is one.
  known = options["causal"] and not packed and not sinks
  assert (asked[0]["mask"] is None) == (known or sight.mask_BTS is None)


@pytest.mark.parametrize("window", [slow(None), 48])
def test_prompts_are_read_by_cudnn_where_it_can(window, asked, monkeypatch):
  """Prompts of different lengths, into a ring too; elsewhere the usual path is taken."""
  pattern = "G" if window is None else "LG"
  cfg = ModelConfig(
    depth=2,
    width=32,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=64,
    context=512,
    window=window,
    layer_pattern=pattern,
  ).resolve()
  prompts = [[*range(1, 60)] * 4, [*range(9, 50)], [7]]
  request = Request(prompts, 3, num_ids=64)
  params = random_params(build_model(cfg))
  found = []
  for on_gpu, wanted in ((True, "blocked"), (True, "auto"), (False, "cudnn")):
    run = TrainingConfig(dtype="bfloat16", attention=wanted)
    model = build_model(cfg, run, cudnn(256 * on_gpu))
    asked.clear()
    logits_BV, _ = prefill_prompts(model, params, request, mesh=None)
    assert len(asked) == (2 if on_gpu and wanted == "auto" else 0)
    found.append(np.asarray(logits_BV[:3], np.float32))
  for logits in found[1:]:
    np.testing.assert_allclose(logits, found[0], atol=3e-2 * np.abs(found[0]).max())


def test_the_path_is_one_that_can():
  def chosen(
    wanted="auto", dtype="bfloat16", kernel=256, sizes=None, lengths=(64, 0), **model
  ):
    cfg = ModelConfig(vocab_size=64, **model).resolve()
    run = Execution(jnp.dtype(dtype), attention=wanted, kernel=cudnn(kernel))
    return choose_path(cfg, run, sizes or {}, lengths)

  assert chosen().name == "cudnn" and chosen("cudnn").name == "cudnn"
  assert chosen("blocked").name == "blocked"
  for cause, case in {
    "float32": dict(dtype="float32"),
    "above 128": dict(kernel=128, width=256, num_heads=1),
    "multiple of 8": dict(width=48, num_heads=4),
    "softcap": dict(attention_softcap=30.0),
    "learned_sinks": dict(learned_sinks=True),
    "alibi": dict(positions="alibi"),
    "odd length": dict(lengths=(63,)),
    "context": dict(sizes={"context": 2}),
    "tensor": dict(sizes={"tensor": 4}, num_heads=4, num_kv_heads=2, width=256),
    "kv heads": dict(sizes={"tensor": 2, KV_COPIES: 2}, num_heads=4, num_kv_heads=2),
    "pipeline": dict(sizes={"stage": 2}),
  }.items():
    path = chosen(**case)
    assert path.name == "blocked" and cause in path.why
    with pytest.raises(ConfigError, match=cause):
      chosen("cudnn", **case)
  assert chosen(kernel=0) == ("blocked", "the devices have no fused kernel")
  with pytest.raises(ConfigError, match="it runs on NVIDIA GPUs"):
    chosen("cudnn", kernel=0)


def test_tiles_are_for_long_rows_on_one_cpu():
  def chosen(wanted="auto", kernel=TILED, sizes=None, length=512, **model):
    cfg = ModelConfig(vocab_size=64, **model).resolve()
    run = Execution(attention=wanted, kernel=kernel)
    return choose_path(cfg, run, sizes or {}, (length, 0))

  assert chosen().name == chosen("tiled", length=9).name == "tiled"
  assert chosen(length=511) == ("blocked", "tiled is for rows of 512 tokens or more")
  for cause, case in {
    "one device": dict(sizes={"data": 2}),
    "softcap": dict(attention_softcap=30.0),
    "learned_sinks": dict(learned_sinks=True),
    "alibi": dict(positions="alibi"),
    "relative": dict(positions="relative"),
    "CPUs": dict(kernel=SPLASH),
  }.items():
    with pytest.raises(ConfigError, match=f"attention=tiled is not possible: .*{cause}"):
      chosen("tiled", **case)
    assert chosen(**case).name == "blocked"


def test_prompts_are_read_in_tiles(monkeypatch):
  """Prompts of different lengths, into rings too, by the mask alone."""
  sizes = dict(depth=2, width=32, num_heads=4, num_kv_heads=2, vocab_size=64, context=256)
  cfg = ModelConfig(**sizes, window=48, layer_pattern="LG").resolve()
  request = Request([[*range(1, 60)] * 4, [*range(9, 50)], [7]], 3, num_ids=64)
  calls, found = [], []
  monkeypatch.setattr(
    "flaxlm.nn.attention.attend_tiled",
    lambda *arguments: calls.append(1) or attend_tiled(*arguments),
  )
  for path in ("blocked", "auto"):
    kernel = dataclasses.replace(TILED, shortest=64)
    model = build_model(cfg, TrainingConfig(attention=path), kernel)
    logits_BV, _ = prefill_prompts(model, random_params(model), request, mesh=None)
    found.append(np.asarray(logits_BV))
  assert calls
  np.testing.assert_allclose(found[1], found[0], atol=1e-4 * np.abs(found[0]).max())


@pytest.mark.parametrize(("num_queries", "window"), [(9, None), (600, None), (5000, 700)])
def test_tiles_have_every_key_that_is_seen_once(num_queries, window):
  seen = np.zeros((num_queries, num_queries), int)
  for queries, keys in tiles(Reach(window), num_queries, num_queries):
    seen[queries, keys] += 1
  mask = visible(Placement(jnp.arange(num_queries)[None]), num_queries, window=window)
  assert seen.max() == 1 and (seen >= mask[0]).all()
  assert num_queries < 1000 or seen.mean() < 0.25  # most of the rest is skipped


@pytest.mark.parametrize("num_queries", [1, 63, 64, 130, 256, 1000])
def test_query_blocks_cover_every_query_once(num_queries):
  covered = [i for start, end in query_blocks(num_queries) for i in range(start, end)]
  assert covered == list(range(num_queries))


def test_bfloat16_stays_close_to_float32():
  """The softmax runs in float32 whatever the inputs: errors stay at bfloat16's rounding."""
  q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 128, 2, 16))
  slots = jnp.arange(128)[None]
  sight, scoring = Sight(visible(Placement(slots), 128), reach=Reach()), Scoring(0.25)
  exact = attend(q, k, v, sight, scoring)[0]
  narrow = attend_blocked(*(x.astype(jnp.bfloat16) for x in (q, k, v)), sight, scoring)
  assert narrow.dtype == jnp.bfloat16
  np.testing.assert_allclose(narrow.astype(jnp.float32), exact, atol=0.03)


def test_members_of_context_share_every_block_of_queries():
  """The same values and gradients, and a quarter of the work each, blocks and all."""
  rng = np.random.default_rng(0)
  B, T, N, H = 2, 256, 2, 8
  q, k, v = (rng.standard_normal((B, T, N, H), np.float32) for _ in range(3))
  sight = Sight(np.tril(np.ones((T, T), bool))[None].repeat(B, 0), reach=Reach())
  mesh = make_mesh({"context": 4, "data": 2})

  def loss(q, k, v):
    out = attend_blocked(q, k, v, sight, Scoring(0.3))
    return (out**2).sum()

  def run(mesh):
    where = NamedSharding(mesh, PartitionSpec("data", "context"))
    with jax.set_mesh(mesh):
      jitted = jax.jit(jax.value_and_grad(loss, (0, 1, 2)), in_shardings=where)
      compiled = jitted.lower(q, k, v).compile()
    return compiled(*jax.device_put((q, k, v), where)), compiled.cost_analysis()["flops"]

  (expected, all_flops), (actual, flops) = run(mesh_of()), run(mesh)
  compare = lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-4)
  jax.tree.map(compare, actual, expected)
  assert flops < 1.1 * all_flops / 8
