# SPDX-License-Identifier: Apache-2.0
"""Narrow weights and caches: within their stated bounds, and not widened in the loop."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from parameters import random_params
from test_generate import model_of
from test_prefill import tokens_of

from flaxlm.config import ModelConfig, ResolvedConfig, cudnn
from flaxlm.decoding import loading
from flaxlm.decoding.generate import DecodeState, StaticSampling, decode_block
from flaxlm.decoding.loading import Run, equip_for_decoding
from flaxlm.decoding.prefill import Request
from flaxlm.decoding.sampling import make_sampling
from flaxlm.decoding.weights import is_laid_out_for_decoding, prepare_params
from flaxlm.errors import ConfigError
from flaxlm.nn.execution import Execution
from flaxlm.nn.models import build_model, init_cache, init_params
from flaxlm.nn.quantized import Narrow, narrowed, widened
from flaxlm.planning.compile import TPU_ENVIRONMENT
from flaxlm.sharding import make_mesh


def unboxed(model: Any) -> Any:
  return nn.unbox(init_params(model, np.uint32(0)))


@pytest.mark.parametrize("name", ["gqa", "gpt2"])
def test_prepared_parameters_are_the_same_numbers(name: str):
  model, params = model_of(name)
  prepared = prepare_params(params, model.cfg)
  assert is_laid_out_for_decoding(prepared)
  assert not is_laid_out_for_decoding(params)
  assert prepare_params(prepared, model.cfg) is prepared
  tokens_BT = np.arange(12).reshape(2, 6)
  apply = jax.jit(lambda params: model.apply({"params": params}, tokens_BT).value)
  np.testing.assert_allclose(apply(prepared), apply(params), atol=1e-4)
  count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  assert count(prepared) == count(params)


@pytest.mark.parametrize("name", ["gqa", "gpt2", "window, mqa, untied"])
def test_int8_weights_are_off_by_half_a_step_at_most(name: str):
  """A step is 1/127 of the output's largest weight."""
  model, params = model_of(name)
  exact = flatten_dict(prepare_params(params, model.cfg))
  narrow = flatten_dict(prepare_params(params, model.cfg, "int8"))
  matrices = [path for path in exact if path[-1] == "matrix"]
  assert len(matrices) >= 2 * 6
  for path in matrices:
    assert narrow[path].dtype == jnp.int8
    scale_O1 = np.asarray(narrow[(*path[:-1], "scale")])[:, None]
    error = np.abs(narrow[path] * scale_O1 - np.asarray(exact[path]))
    assert (error <= 0.501 * np.abs(exact[path]).max(1, keepdims=True) / 127).all()


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_narrow_weights_decode_as_the_full_forward_pass(kind: str):
  """Cached = full holds for what the narrow parameters say."""
  model, params = model_of("gpt2")
  prepared = prepare_params(params, model.cfg, kind)
  prompts = [[1, 2, 3], [4]]
  tokens = tokens_of(model, prepared, Request(prompts, 20, 64), make_sampling(2, 0.0))
  for prompt, answer in zip(prompts, tokens, strict=True):
    whole = np.array([[*prompt, *answer]])
    logits_TV = jax.jit(model.apply)({"params": prepared}, whole).value[0]
    assert np.argmax(logits_TV[len(prompt) - 1 : -1], -1).tolist() == answer


def error_of(model: Any, params: Any, narrow_model: Any, narrow_params: Any) -> float:
  """The largest change of a log-probability at a step, over their spread."""
  tokens_BT = np.random.default_rng(0).integers(0, 64, (4, 12))

  def logprobs(model: Any, params: Any) -> np.ndarray:
    cache = init_cache(model, 4, 12)
    step = jax.jit(
      lambda token_B1, cache: model.apply({"params": params}, token_B1, cache=cache)[:2]
    )
    found = []
    for at in range(12):
      logits, cache = step(tokens_BT[:, at : at + 1], cache)
      found.append(jax.nn.log_softmax(logits, -1))
    return np.concatenate(found, 1)

  exact = logprobs(model, params)
  change = np.abs(logprobs(narrow_model, narrow_params) - exact)
  return float(change.mean() / exact.std())


def test_int4_is_for_the_projections_of_blocks():
  """The head and a tied embedding, whose rounding nothing evens out, are int8."""
  for name in ("gqa", "window, mqa, untied"):
    model, params = model_of(name)
    narrow = flatten_dict(prepare_params(params, model.cfg, "int4"))
    for path in [path for path in narrow if path[-1] == "matrix"]:
      assert narrow[path].dtype == (jnp.uint8 if "blocks" in path else jnp.int8), path


def test_the_kernel_of_narrow_weights_is_refused_by_name():
  """Where nothing can run it, and where nothing is narrow."""
  cfg = ResolvedConfig(model=ModelConfig(depth=1, width=64, vocab_size=64).resolve())
  run = Run(Path("a"), cfg, None, 0, build_model(cfg.model), {}, make_mesh({"data": -1}))
  refused = {
    "weights_kernel is for narrow": dict(weights="bfloat16", weights_kernel="pallas"),
    "is for NVIDIA GPUs": dict(weights="int4", weights_kernel="pallas"),
    "weights_kernel is 'cuda'": dict(weights="int4", weights_kernel="cuda"),
    "weights is 'int2'": dict(weights="int2"),
  }
  for cause, asked in refused.items():
    with pytest.raises(ConfigError, match=cause):
      equip_for_decoding(run, **asked)


def test_the_kernel_is_refused_for_sizes_and_meshes_that_it_lacks(monkeypatch):
  """As on a machine with a GPU."""
  monkeypatch.setattr(loading, "fused_kernel", lambda: cudnn(256))
  one = jax.sharding.Mesh(jax.devices()[:1], "data")
  for width, mesh, cause in (
    (96, one, "96 x 96 weights"),
    (128, make_mesh({"data": -1}), "is for one device"),
  ):
    sizes = dict(depth=1, width=width, num_heads=2, ffn_width=256, vocab_size=64)
    model = ModelConfig(**sizes).resolve()
    params = jax.eval_shape(functools.partial(unboxed, build_model(model)))
    run = Run(Path("a"), ResolvedConfig(model=model), None, 0, None, params, mesh)
    for kind in ("int8", "int4"):
      with pytest.raises(ConfigError, match=cause):
        loading.check_kernel(run, kind)
  loading.check_kernel(run._replace(mesh=one), "int4")


@pytest.mark.slow
def test_narrow_numbers_are_near():
  """int8 weights, the int8 cache and bfloat16 change log-probabilities by 6 % of their
  spread in the mean, int4 weights of random numbers by 60 %, and by more than nothing."""
  cfg = ModelConfig(
    depth=2, width=64, num_heads=4, num_kv_heads=2, vocab_size=64, context=64
  )
  model = build_model(cfg)
  params = random_params(model, spread=0.25)
  small = model.clone(execution=Execution(narrow_cache=True))
  for kind, narrow_model in ((None, small), ("int8", model), ("bfloat16", model)):
    narrow = prepare_params(params, model.cfg, kind)
    assert 1e-5 < error_of(model, params, narrow_model, narrow) < 0.06, kind
  narrow = prepare_params(params, model.cfg, "int4")
  assert 0.06 < error_of(model, params, model, narrow) < 0.6


def test_an_int8_vector_is_off_by_half_a_step_at_most():
  x = np.random.default_rng(0).normal(size=(3, 2, 5, 8)).astype(np.float32)
  x[0, 0, 0] = 0.0
  narrow = narrowed(jnp.asarray(x))
  assert narrow.values.dtype == jnp.int8
  error = np.abs(np.asarray(widened(narrow, jnp.float32)) - x)
  assert (error <= 0.501 * np.abs(x).max(-1, keepdims=True) / 127 + 1e-7).all()


@pytest.mark.slow
def test_an_int8_cache_is_a_cache():
  """A quarter of the bytes and the scales; a row alone is the row in a batch."""
  model, params = model_of("window, mqa, untied")
  model = model.clone(execution=Execution(narrow_cache=True))
  cache = init_cache(model, 4, 32)
  assert all(isinstance(x, Narrow) for kv in cache.layers for x in kv)
  prompts = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]]
  greedy = make_sampling(4, 0.0)
  together = tokens_of(model, params, Request(prompts, 20, 64), greedy)
  for row, prompt in enumerate(prompts):
    alone = tokens_of(model, params, Request([prompt], 20, 64), make_sampling(1, 0.0))
    assert alone == [together[row]]


# -- What is compiled ----------------------------------------------------------------------


@pytest.fixture
def optimized():
  """As a user's program is compiled: tests leave most of it out."""
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", True)


def compiled(batch: int, kind: str | None) -> Any:
  model = build_model(ModelConfig(depth=2, width=128, num_heads=2, vocab_size=512))
  params = jax.eval_shape(lambda: prepare_params(unboxed(model), model.cfg, kind))
  state = DecodeState(init_cache(model, batch, 64), np.zeros(batch, np.int32), None)
  rules = (make_sampling(batch, 0.0), np.int32(512), StaticSampling())
  return decode_block.lower(model, params, state, *rules).compile()


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 4])
def test_the_loop_copies_no_weight_and_no_cache(optimized, batch: int):
  copies = [
    line
    for line in compiled(batch, None).as_text().splitlines()
    if " copy(" in line
    for shape in (f"{batch},2,64,64", "128,128", "128,512", "128,352", "352,128")
    if f"= f32[{shape}]" in line
  ]
  assert not copies


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 4])
def test_narrow_weights_are_never_wide_together(optimized, batch: int):
  """One at a time at most: the compiler does not widen them all before the loop."""
  memory = compiled(batch, "int8").memory_analysis()
  largest, whole = 4 * 128 * 512, 4 * (2 * (4 * 128 * 128 + 3 * 128 * 352) + 128 * 512)
  assert memory.temp_size_in_bytes < 1.5 * largest + 100_000 < whole / 2


# Decoding in bfloat16 on one TPU with int8 weights and an int8 cache: the bytes of
# temporaries, the peak, and what the plan says.
COMPILE = """
import dataclasses
import json
import sys
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from flaxlm.config import Config, ModelConfig, TrainingConfig, mesh_shape
from flaxlm.decoding.generate import DecodeState, StaticSampling, decode_block
from flaxlm.decoding.sampling import make_sampling
from flaxlm.decoding.weights import prepare_params
from flaxlm.devices import find_device
from flaxlm.nn.models import boxed_shapes, build_model, init_cache
from flaxlm.planning.compile import make_target_mesh, tpu_options
from flaxlm.planning.memory import decoding_memory

device, sizes = find_device(sys.argv[1]), mesh_shape({"data": 1})
mesh = make_target_mesh(sizes, device)[1]
place = NamedSharding(mesh, PartitionSpec())
shape = dict(depth=1, width=4096, num_heads=32, num_kv_heads=8, ffn_width=14336)
shape |= dict(vocab_size=8192, tied_embeddings=False)
training = TrainingConfig(dtype="bfloat16", param_dtype="bfloat16")
cfg = Config(model=ModelConfig(**shape), training=training).resolve()
model = build_model(cfg.model, training, device.kernel)
model = model.clone(execution=dataclasses.replace(model.execution, narrow_cache=True))

def abstract(function, *arguments):
  shapes = jax.eval_shape(function, *arguments)
  add = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
  return jax.tree.map(add, shapes)

for rows in (1, 8):
  plain = nn.unbox(boxed_shapes(model))
  params = abstract(lambda params: prepare_params(params, model.cfg, "int8"), plain)
  cache = abstract(lambda: init_cache(model, rows, 512))
  state = DecodeState(cache, abstract(lambda: jnp.zeros(rows, jnp.int32)), None)
  sampling = abstract(lambda: make_sampling(rows, 0.0))
  number = abstract(lambda: jnp.int32(0))
  with jax.set_mesh(mesh):
    lowered = decode_block.lower(model, params, state, sampling, number, StaticSampling())
    memory = lowered.compile(tpu_options()).memory_analysis()
  plan = sum(decoding_memory(cfg, sizes, rows, 512, "int8", "int8").values())
  print(json.dumps([memory.temp_size_in_bytes, memory.peak_memory_in_bytes, plan]))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_for_users")
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize("name", ["v5e", "v6e"])
def test_a_tpu_widens_no_weights(name):
  """A projection of the feed-forward alone would take 112 MiB in bfloat16. What there is of
  temporaries, and more than is planned, are the scales of 8 rows of the cache, padded to
  128 lanes (docs/LOG.md)."""
  environment = os.environ | TPU_ENVIRONMENT | {"JAX_PLATFORMS": "cpu"}
  child = subprocess.run(
    [sys.executable, "-c", COMPILE, name], env=environment, capture_output=True, text=True
  )
  assert child.returncode == 0, child.stderr
  one, eight = map(json.loads, child.stdout.splitlines())
  for temporaries, peak, plan in (one, eight):
    assert temporaries < 2**24
    assert abs(plan / peak - 1) < 0.1, (temporaries, plan, peak)
