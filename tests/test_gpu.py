# SPDX-License-Identifier: Apache-2.0
"""On an NVIDIA GPU: each kernel is the plain mathematics, and a step with it the same step.

FLAXLM_TEST_PLATFORM=cuda pytest -m gpu -n 0
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxlm.config import DataConfig, ModelConfig, OptimizerConfig, TrainingConfig
from flaxlm.data.objectives import Windows, next_token
from flaxlm.decoding.generate import generate
from flaxlm.decoding.prefill import Request, prefill_prompts
from flaxlm.decoding.sampling import make_sampling
from flaxlm.decoding.weights import pack, prepare_params, quantise
from flaxlm.errors import ConfigError
from flaxlm.nn.attention import attend
from flaxlm.nn.kernels.cudnn import attend_cudnn
from flaxlm.nn.kernels.few_rows import few_rows_dot
from flaxlm.nn.kernels.int4 import unpacked
from flaxlm.nn.kernels.products import matrix_dot
from flaxlm.nn.masks import Placement, Reach, Scoring, Sight, visible
from flaxlm.nn.models import build_model, init_params
from flaxlm.platform import check_matmul, fused_kernel
from flaxlm.sharding import make_mesh
from flaxlm.training.optimizer import build_optimizer
from flaxlm.training.step import (
  abstract_batch,
  abstract_state,
  jit_train_step,
  loss_and_gradient,
)

pytestmark = pytest.mark.gpu

# Causal, window, sinks at a document's start, and whether rows hold several documents.
WAYS = {
  "causal": (True, None, 0, False),
  "causal_packed": (True, None, 0, True),
  "window": (True, 100, 0, False),
  "window_packed": (True, 100, 0, True),
  "window_and_sinks": (True, 100, 4, True),
  "bidirectional": (False, None, 0, False),
  "bidirectional_packed": (False, None, 0, True),
  "bidirectional_window": (False, 100, 0, True),
}


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("way", WAYS)
def test_cudnn_equals_reference_with_gradients(way, kv_heads):
  causal, window, sink_tokens, packed = WAYS[way]
  B, T, N, H = 2, 256, 4, 64
  keys = jax.random.split(jax.random.key(kv_heads), 3)
  q, cotangent = jax.random.normal(keys[0], (2, B, T, N, H), jnp.bfloat16)
  k, v = jax.random.normal(keys[1], (2, B, T, kv_heads, H), jnp.bfloat16)
  slots = jnp.broadcast_to(jnp.arange(T), (B, T))
  segments = 1 + (slots > T // 3) + (slots > T // 2) if packed else None
  where = Placement(slots, segments, segments)
  reach = Reach(None if sink_tokens else window, is_all=not (packed or sink_tokens))
  mask = visible(where, T, causal, window, sink_tokens)
  sight = Sight(mask, reach=reach if causal else None)

  def output_and_gradients(attention, *arrays):
    out, pull = jax.vjp(attention, *arrays)
    return out, pull(cotangent.astype(out.dtype))

  def reference(q, k, v):
    return attend(q, k, v, sight, Scoring(H**-0.5))[0]

  def fused(q, k, v):
    return attend_cudnn(q, k, v, sight, Scoring(H**-0.5))

  with jax.default_matmul_precision("highest"):
    exact = (x.astype(jnp.float32) for x in (q, k, v))
    expected = output_and_gradients(reference, *exact)
  actual = jax.jit(output_and_gradients, static_argnums=0)(fused, q, k, v)
  for ours, exactly in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    error = np.linalg.norm(np.float32(ours) - exactly) / np.linalg.norm(exactly)
    assert error < 1e-2


@pytest.mark.parametrize("most", [8, 2])  # 2: a row has more, and a mask is used
@pytest.mark.parametrize(("causal", "kv_heads"), [(True, 4), (True, 1), (False, 2)])
def test_documents_by_their_offsets_equal_reference_with_gradients(causal, kv_heads, most):
  """With padding, and a row of one document."""
  if not fused_kernel().packed:
    pytest.skip("needs a GPU from Hopper on and cuDNN 9.6")
  from flaxlm.nn.kernels.cudnn_packed import Form, attend_packed

  B, T, N, H = 3, 256, 4, 64
  keys = jax.random.split(jax.random.key(kv_heads), 3)
  q, cotangent = jax.random.normal(keys[0], (2, B, T, N, H), jnp.bfloat16)
  k, v = jax.random.normal(keys[1], (2, B, T, kv_heads, H), jnp.bfloat16)
  slots = jnp.broadcast_to(jnp.arange(T), (B, T))
  ends = jnp.array([[1, 90, 130, 200], [256, 256, 256, 256], [77, 78, 79, 256]])
  segments = 1 + (slots[:, :, None] >= ends[:, None]).sum(-1)
  segments = jnp.where((slots >= 200) & (jnp.arange(B) == 0)[:, None], 0, segments)
  sight = Sight(visible(Placement(slots, segments, segments), T, causal))
  form = Form(causal, H**-0.5, most=most)

  def output_and_gradients(attention, cotangent, *arrays):
    out, pull = jax.vjp(attention, *arrays)
    return out, pull(cotangent.astype(out.dtype))

  with jax.default_matmul_precision("highest"):
    exact = [x.astype(jnp.float32) for x in (q, k, v)]
    reference = lambda *x: attend(*x, sight, Scoring(H**-0.5))[0]
    expected = output_and_gradients(reference, cotangent, *exact)
  packed = lambda *x: attend_packed(*x, segments, form)
  found = jax.jit(output_and_gradients, static_argnums=0)(packed, cotangent, q, k, v)
  for ours, exactly in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    error = np.linalg.norm(np.float32(ours) - exactly) / np.linalg.norm(exactly)
    assert error < 1e-2


SHAPE = dict(depth=2, width=256, num_heads=4, num_kv_heads=2, vocab_size=512)


def training(path):
  return TrainingConfig(dtype="bfloat16", attention=path)


def with_path(cfg, path):
  """The same model and parameters, attending by `path`."""
  model = build_model(cfg, training(path), fused_kernel())
  return model, jax.jit(lambda: nn.unbox(init_params(model, 0)))()


@pytest.mark.parametrize("window", [None, 64])
def test_prompts_read_by_cudnn_are_read_as_without(window):
  """Prompts of different lengths, in chunks, into a ring too."""
  pattern = "G" if window is None else "LG"
  cfg = ModelConfig(**SHAPE, context=1024, window=window, layer_pattern=pattern).resolve()
  rng = np.random.default_rng(0)
  prompts = [rng.integers(1, 512, length).tolist() for length in (700, 64, 3)]
  found = []
  for path in ("blocked", "cudnn"):  # cudnn: where it can, with a cache
    model, params = with_path(cfg, path)
    request = Request(prompts, 4, num_ids=512)
    logits_BV, cache = prefill_prompts(model, params, request, mesh=None)
    found.append(jax.device_get((logits_BV[:3], cache.layers[0][0][:1, :, -64:])))
  for ours, theirs in zip(*map(jax.tree.leaves, found), strict=True):
    error = np.linalg.norm(np.float32(ours) - np.float32(theirs))
    assert error <= 3e-2 * np.linalg.norm(np.float32(theirs))


def some_batch(cfg):
  rng = np.random.default_rng(0)
  windows = rng.integers(1, cfg.vocab_size, (4, cfg.context + 1))
  windows[rng.random(windows.shape) < 0.02] = 0
  lengths_B = np.full(4, cfg.context + 1)
  return next_token(Windows(windows, windows == 0, lengths_B), end_id=0)


def test_a_step_with_cudnn_is_the_step_without():
  cfg = ModelConfig(**SHAPE, context=256, window=64, layer_pattern="LG").resolve()
  batch = some_batch(cfg)
  found = {}
  for path in ("blocked", "cudnn"):
    model, params = with_path(cfg, path)
    run = training(path)
    step = jax.jit(lambda p, b, k, m=model, r=run: loss_and_gradient(m, r, p, b, k))
    found[path] = jax.device_get(step(params, batch, jax.random.key(0)))
  for ours, theirs in zip(*map(jax.tree.leaves, found.values()), strict=True):
    error = np.linalg.norm(np.float32(ours) - theirs)
    assert error <= 3e-2 * np.linalg.norm(theirs) + 1e-6


# -- Narrow weights ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_few_rows_times_narrow_weights(kind, rows, dtype):
  """The kernel, and XLA's products, against numpy."""
  rng = np.random.default_rng(0)
  matrix = jnp.asarray(rng.normal(size=(512, 1024)), jnp.float32)
  values, scale = (pack if kind == "int4" else quantise)(matrix)
  params = {"matrix": values, "scale": scale}
  if kind == "int4":
    wide = np.float64(unpacked(values, scale, jnp.float32))
  else:
    wide = np.float64(values) * np.float64(scale)[:, None]
  x = jnp.asarray(rng.normal(size=(rows, 1024)), dtype)
  exact = np.float64(x) @ wide.T
  tolerance = {"float32": 2e-3, "bfloat16": 4e-3}[dtype]  # TF32; int4 is widened to 16 bits
  for form in (few_rows_dot, matrix_dot):
    found = np.float64(jax.jit(form)(x, params))
    assert np.abs(found - exact).max() < tolerance * np.abs(exact).max()
  if dtype == "bfloat16":
    found = np.float64(jax.jit(few_rows_dot)(x, params))
    assert np.abs(found - exact).max() < 1e-4 * np.abs(exact).max(), "exact products"


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("num_rows", [1, 5])
def test_the_kernel_of_narrow_weights_decodes_as_a_forward_pass(kind, num_rows):
  cfg = ModelConfig(**SHAPE, ffn_width=768, context=64).resolve()
  model, params = with_path(cfg, "auto")
  prepared = prepare_params(params, cfg, kind)
  execution = dataclasses.replace(model.execution, weights_kernel="pallas")
  request = Request([[1, 2, 3 + n] for n in range(num_rows)], 16, num_ids=512)
  blocks = generate(
    model.clone(execution=execution), prepared, request, make_sampling(num_rows, 0.0)
  )
  answers = np.concatenate([block.tokens_BT for block in blocks], 1)
  rows = np.concatenate([np.array(request.prompts), answers], 1)
  logits = np.float32(jax.jit(model.apply)({"params": prepared}, rows).value)[:, 2:-1]
  chosen = np.take_along_axis(logits, answers[..., None], -1)[..., 0]
  spread = logits.max(-1) - logits.min(-1)
  assert ((logits.max(-1) - chosen) / spread).max() < 3e-2


# -- 8-bit floats --------------------------------------------------------------------------


def test_a_step_of_8_bit_floats_is_near_the_full_one():
  try:
    check_matmul("fp8")
  except ConfigError as e:
    pytest.skip(str(e))
  cfg = ModelConfig(**SHAPE, context=256).resolve()
  batch, found = some_batch(cfg), {}
  for kind in ("full", "fp8"):
    run = dataclasses.replace(training("auto"), matmul=kind)
    model = build_model(cfg, run, fused_kernel())
    params = jax.jit(lambda m=model: nn.unbox(init_params(m, 0)))()
    step = jax.jit(lambda p, b, k, m=model, r=run: loss_and_gradient(m, r, p, b, k))
    found[kind] = jax.device_get(step(params, batch, jax.random.key(0)))
  (loss, full), (near_loss, near) = found.values()
  assert abs(near_loss / loss - 1) < 1e-2
  for ours, exact in zip(*map(jax.tree.leaves, (near, full)), strict=True):
    cosine = (ours * exact).sum() / np.linalg.norm(ours) / np.linalg.norm(exact)
    assert cosine > 0.9


def test_all_products_of_projections_are_of_8_bit_floats():
  """Three for each, in what is compiled for a training step."""
  try:
    check_matmul("fp8")
  except ConfigError as e:
    pytest.skip(str(e))
  cfg = ModelConfig(**SHAPE, context=256).resolve()
  run = dataclasses.replace(training("auto"), matmul="fp8")
  model, optimizer = (
    build_model(cfg, run, fused_kernel()),
    build_optimizer(OptimizerConfig(), 1),
  )
  mesh = make_mesh({"data": -1})
  state = abstract_state(model, optimizer, mesh)
  data = DataConfig(seq_len=256, batch_size=4 * mesh.size)
  step = jit_train_step(model, optimizer, run, mesh)
  text = step.lower(state, abstract_batch(data, mesh)).compile().as_text()
  assert text.count("__cublas$lt$matmul$f8") >= 3 * 7 * cfg.depth
