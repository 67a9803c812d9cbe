# SPDX-License-Identifier: Apache-2.0
"""On an NVIDIA GPU: cuDNN's attention is attention, and a step with it is the same step.

FLAXLM_TEST_PLATFORM=cuda pytest -m gpu -n 0
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxlm.config import ModelConfig, TrainingConfig
from flaxlm.data.objectives import Windows, next_token
from flaxlm.decoding.prefill import Request, prefill_prompts
from flaxlm.nn.attention import attend
from flaxlm.nn.kernels.cudnn import attend_cudnn
from flaxlm.nn.masks import Placement, Reach, Scoring, Sight, visible
from flaxlm.nn.models import build_model, init_params
from flaxlm.platform import fused_kernel
from flaxlm.training.step import loss_and_gradient

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


def test_a_step_with_cudnn_is_the_step_without():
  cfg = ModelConfig(**SHAPE, context=256, window=64, layer_pattern="LG").resolve()
  rng = np.random.default_rng(0)
  windows = rng.integers(1, cfg.vocab_size, (4, cfg.context + 1))
  windows[rng.random(windows.shape) < 0.02] = 0
  lengths_B = np.full(4, cfg.context + 1)
  batch = next_token(Windows(windows, windows == 0, lengths_B), end_id=0)
  found = {}
  for path in ("blocked", "cudnn"):
    model, params = with_path(cfg, path)
    run = training(path)
    step = jax.jit(lambda p, b, k, m=model, r=run: loss_and_gradient(m, r, p, b, k))
    found[path] = jax.device_get(step(params, batch, jax.random.key(0)))
  for ours, theirs in zip(*map(jax.tree.leaves, found.values()), strict=True):
    error = np.linalg.norm(np.float32(ours) - theirs)
    assert error <= 3e-2 * np.linalg.norm(theirs) + 1e-6
