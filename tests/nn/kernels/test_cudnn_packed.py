# SPDX-License-Identifier: Apache-2.0
"""Packed documents by their offsets: where they are, and attention by what cuDNN is told.

No GPU is needed: `of_memory` computes what NVIDIA documents for ragged tensors, from
offsets into memory and lengths, in place of the kernel (test_gpu.py has the kernel).
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as library
from meshes import mesh_of

from flaxlm.config import ModelConfig, TrainingConfig, cudnn
from flaxlm.nn.attention import attend
from flaxlm.nn.execution import Execution
from flaxlm.nn.kernels import cudnn_packed
from flaxlm.nn.kernels.cudnn_packed import Form, attend_packed, documents_of
from flaxlm.nn.kernels.paths import choose_path
from flaxlm.nn.masks import Placement, Scoring, Sight, visible
from flaxlm.nn.models import build_model, init_params
from flaxlm.sharding import use_mesh

ROWS = (
  [1, 1, 1, 2, 2, 3, 3, 3],
  [1, 1, 1, 1, 1, 0, 0, 0],  # padding
  [1, 1, 1, 1, 1, 1, 1, 1],
  [0, 0, 0, 0, 0, 0, 0, 0],
)


def runs(row):
  """(start, length) of each run of one number."""
  edges = [0, *(1 + np.flatnonzero(np.diff(row))), len(row)]
  return [(a, b - a) for a, b in itertools.pairwise(edges)]


def test_documents_are_runs_of_one_number():
  rng = np.random.default_rng(0)
  made = np.cumsum(rng.random((20, 8)) < 0.3, 1)
  rows = np.concatenate([ROWS, made * (made < 3)])  # padding at the end of some
  most = max(len(runs(row)) for row in rows)
  found = documents_of(jnp.asarray(rows), most)
  for row, lengths, offsets in zip(rows, *map(np.asarray, found[:2]), strict=True):
    expected = runs(row)
    no = [-1] * (most - len(expected))
    assert offsets.tolist() == [start for start, _ in expected] + [*no, -1]
    assert lengths.tolist() == [length for _, length in expected] + no
  assert found.lengths_BM.dtype == found.offsets_BE.dtype == jnp.int32
  assert found.fit
  assert not documents_of(jnp.asarray(rows), most - 1).fit


def of_memory(causal, q, k, v, lengths, q_offsets, kv_offsets):
  """Attention of each document that lies at an offset of the flat arrays."""
  (T, N, H), K = q.shape[1:], k.shape[2]
  places = jnp.arange(T)

  def of_document(length, q_first, kv_first):
    def take(x, first, heads):
      index = first + jnp.arange(T * heads * H)
      found = jnp.take(x.reshape(-1), index, mode="fill", fill_value=0.0)
      return found.reshape(1, T, heads, H)

    real = places < length
    mask = real[None] & real[:, None]
    if causal:
      mask &= places[:, None] >= places
    arrays = take(q, q_first, N), take(k, kv_first, K), take(v, kv_first, K)
    mixed = attend(*arrays, Sight(mask[None]), Scoring(SCALE))[0]
    index = jnp.where(real.repeat(N * H), q_first + jnp.arange(T * N * H), q.size)
    return mixed.reshape(-1), index

  count = lengths.size  # of the offsets, the rest is not used
  each = (
    lengths.reshape(-1),
    q_offsets.reshape(-1)[:count],
    kv_offsets.reshape(-1)[:count],
  )
  mixed, index = jax.vmap(of_document)(*each)
  return jnp.full(q.size, jnp.nan).at[index].set(mixed, mode="drop").reshape(q.shape)


SCALE = 0.3


@pytest.fixture
def simulated(monkeypatch):
  """The library's functions by `of_memory`, with what they make of lengths and offsets."""

  def forward(q, k, v, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, **options):
    assert options.pop("scale") == SCALE
    causal = options.pop("mask_type") is library.MaskType.PADDING_CAUSAL
    assert options == {"sliding_window_length": None, "return_residual": True}
    fixed = library._fix_seqlen_offsets(q_seqlen, kv_seqlen, q_offsets, kv_offsets, q, k)
    B, T, N, _ = q.shape
    sums = jnp.zeros((B * q_seqlen.shape[1], N, T), jnp.float32)
    return of_memory(causal, q, k, v, fixed[0], *fixed[2:]), sums

  def backward(scale, *options_res_grad):
    *_, mask_type, layout, window, _, residual, res, grad = options_res_grad
    q, k, v, _, *places = res[:8]
    names = ("q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets")
    options = dict(zip(names, places, strict=True), scale=scale, mask_type=mask_type)
    options |= dict(sliding_window_length=window, return_residual=True)
    assert not residual and layout == library.AttentionLayout.BTNH.value
    assert res[10].shape == (q.shape[0] * places[0].shape[1], q.shape[2], q.shape[1])
    return jax.vjp(lambda *x: forward(*x, **options)[0], q, k, v)[1](grad)

  def by_mask(q, k, v, sight, scoring):
    return attend(q, k, v, sight, scoring)[0]

  monkeypatch.setattr(library, "dot_product_attention", forward)
  monkeypatch.setattr(library, "_dot_product_attention_bwd_rule", backward)
  monkeypatch.setattr(cudnn_packed, "attend_cudnn", by_mask)


def output_and_gradients(attention, cotangent, *arrays):
  out, pull = jax.vjp(attention, *arrays)
  return out, *pull(cotangent)


def check(kv_heads, causal, most, rows=ROWS):
  segments_BT = jnp.asarray(rows)
  B, T = segments_BT.shape
  keys = jax.random.split(jax.random.key(0), 2)
  q, cotangent = jax.random.normal(keys[0], (2, B, T, 4, 3))
  k, v = jax.random.normal(keys[1], (2, B, T, kv_heads, 3))
  slots = jnp.broadcast_to(jnp.arange(T), (B, T))
  mask = visible(Placement(slots, segments_BT, segments_BT), T, causal)
  reference = lambda *x: attend(*x, Sight(mask), Scoring(SCALE))[0]
  form = Form(causal, SCALE, most=most)
  packed = lambda *x: attend_packed(*x, segments_BT, form)
  found = [
    jax.jit(functools.partial(output_and_gradients, way))(cotangent, q, k, v)
    for way in (packed, reference)
  ]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *found)


@pytest.mark.parametrize("most", [3, 2])  # 2: the first row has more, and a mask is used
@pytest.mark.parametrize(("kv_heads", "causal"), [(4, False), (2, True)])
def test_by_offsets_is_by_mask_with_gradients(kv_heads, causal, most, simulated):
  check(kv_heads, causal, most)


def test_each_device_has_the_offsets_of_its_rows_and_heads(simulated):
  with use_mesh(mesh_of(data=2, tensor=2)):
    check(2, True, 3)


def lowered(monkeypatch, function, *arrays):
  """What would be compiled for a Hopper GPU, as text."""
  monkeypatch.setattr(library, "check_cudnn_version", lambda: 91300)
  monkeypatch.setattr(library, "check_compute_capability", lambda _: True)
  monkeypatch.setattr(library, "is_cuda_compute_capability_equal", lambda _: False)
  traced = jax.jit(function).trace(*arrays)
  return traced.lower(lowering_platforms=("cuda",)).as_text()


def test_a_models_program_has_offsets_and_its_masks_wait_in_another_branch(monkeypatch):
  """As the installed jax makes it: arguments of the calls of cuDNN, and their sizes."""
  cfg = ModelConfig(
    depth=1, width=32, num_heads=4, num_kv_heads=2, vocab_size=32, context=64
  )
  training = TrainingConfig(dtype="bfloat16", attention="cudnn")
  model = build_model(cfg, training, cudnn(256, packed=True))
  params = jax.eval_shape(lambda: init_params(model, 0))
  ids = jax.ShapeDtypeStruct((2, 64), jnp.int32)

  def loss(params, ids, segments):
    return model.apply({"params": params}, ids, ids, segments).value.sum()

  text = lowered(monkeypatch, jax.grad(loss), params, ids, ids)
  calls = [line for line in text.splitlines() if "@__cudnn$fmha" in line]
  packed = [line for line in calls if "max_seg_per_batch\\22: 32" in line]
  assert len(packed) == 2, "one forward, one backward"
  assert all("Bias" not in line and "PADDING_CAUSAL" in line for line in packed)
  assert all("tensor<2x32xi32>" in line and "tensor<2x33xi32>" in line for line in packed)
  others = [line for line in calls if line not in packed]
  assert others and all("Bias" in line for line in others), "for rows of more documents"


def test_a_path_says_how_it_tells_documents_apart():
  sizes = dict(num_heads=2, vocab_size=32)
  cfg = ModelConfig(head_dim=64, **sizes).resolve()
  wide = ModelConfig(head_dim=256, **sizes).resolve()

  def why(cfg, kernel, attention="cudnn"):
    execution = Execution(dtype=jnp.bfloat16, kernel=kernel, attention=attention)
    return choose_path(cfg, execution, {}, (64,)).why

  assert why(cfg, cudnn(256, packed=True)).endswith("by where they begin")
  assert "not measured yet" in why(cfg, cudnn(256, packed=True), "auto")
  assert "cuDNN 9.6" in why(cfg, cudnn(256))
  assert "head_dim=256" in why(wide, cudnn(256, packed=True))
