# SPDX-License-Identifier: Apache-2.0
"""Products of 8-bit floats in training: as defined, near the full ones, refused by name."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import slow
from meshes import mesh_of
from parameters import cosines
from test_training_laws import CFG, FAST, loss_and_gradient_on, on_one, packed_batch

from flaxlm import platform
from flaxlm.config import OptimizerConfig
from flaxlm.errors import ConfigError
from flaxlm.nn.models import build_model
from flaxlm.nn.quantized import GRADIENTS, OPERANDS, fp8, projected, widened_fp8
from flaxlm.sharding import make_mesh
from flaxlm.training.optimizer import build_optimizer
from flaxlm.training.step import init_state, jit_train_step, put_batch

FP8 = dataclasses.replace(FAST, matmul="fp8")


def arrays(*shapes: tuple) -> list[jax.Array]:
  """Exact in float16, by way of which one of XLA's emitters on CPUs rounds to 8 bits."""
  rng = np.random.default_rng(0)
  halves = [rng.normal(size=shape).astype(np.float16) for shape in shapes]
  return [jnp.asarray(half, jnp.float32) for half in halves]


def rounded(x: np.ndarray, kind: str) -> np.ndarray:
  """By numpy: the least power of two above largest / most, and what is left in 8 bits."""
  dtype, most = {
    "e4m3": (ml_dtypes.float8_e4m3fn, 448),
    "e5m2": (ml_dtypes.float8_e5m2, 57344),
  }[kind]
  scale = 2.0 ** (np.floor(np.log2(np.abs(x).max() / most)) + 1)
  return (x / scale).astype(dtype).astype(np.float64) * scale


@pytest.mark.parametrize(("shape", "contracted"), [((8, 2, 3), 1), ((2, 4, 6), 2)], ids=str)
def test_a_product_and_its_gradients_are_as_defined(shape, contracted):
  kernel, x = arrays(shape, (3, 4, *shape[:contracted]))
  (grad,) = arrays((3, 4, *shape[contracted:]))
  x, grad = 128 * x, 2.0**-20 * grad

  @jax.jit
  def gradients(x, kernel, grad):
    dot = functools.partial(projected, "fp8", contracted=contracted)
    y, backward = jax.vjp(lambda x, kernel: dot(x, kernel), x, kernel)
    return y, *backward(grad)

  found = [np.asarray(one) for one in gradients(x, kernel, grad)]
  x_RI = rounded(np.asarray(x), "e4m3").reshape(12, 8)
  kernel_IO = rounded(np.asarray(kernel), "e4m3").reshape(8, -1)
  grad_RO = rounded(np.asarray(grad), "e5m2").reshape(12, -1)
  expected = (x_RI @ kernel_IO, grad_RO @ kernel_IO.T, x_RI.T @ grad_RO)
  for ours, exact, like in zip(found, expected, (found[0], x, kernel), strict=True):
    assert ours.shape == like.shape
    np.testing.assert_allclose(
      ours.reshape(exact.shape), exact, atol=1e-6 * abs(exact).max()
    )


@pytest.mark.parametrize("largest", [448.0, 449.0, 1e-20, 3e30, 0.0])
@pytest.mark.parametrize("dtype", [OPERANDS, GRADIENTS])
def test_the_largest_number_is_in_range(dtype, largest):
  """Never infinite, never NaN, and with as many bits as there are."""
  x = jnp.asarray([largest, -largest, largest / 3])
  narrow = jax.jit(fp8, static_argnums=1)(x, dtype)
  assert np.frexp(float(narrow.scales))[0] == 0.5, "a power of two"
  found = np.asarray(widened_fp8(narrow, jnp.float32))
  np.testing.assert_allclose(found, x, rtol=0.126)


@pytest.mark.slow
def test_every_gradient_of_a_model_points_the_same_way():
  """Cosine above 0.9 (seen: 0.944 to 0.98, as gradients have three significant bits)."""
  (loss, full), (near_loss, near) = on_one(CFG, FAST), on_one(CFG, FP8)
  assert abs(near_loss / loss - 1) < 5e-3
  assert 0.9 < min(cosines(near, full)) < max(cosines(near, full)) < 0.9999


@pytest.mark.parametrize("sizes", [slow(dict(data=2, fsdp=2, tensor=2))], ids=str)
def test_sharded_equals_one_device(sizes):
  """A scale is of the whole array, wherever its parts lie. An error of the last bit may
  move a number to the next one in 8 bits, so that not all have to be equal."""
  loss, gradient = loss_and_gradient_on(mesh_of(**sizes), CFG, FP8)
  one_loss, one_gradient = on_one(CFG, FP8)
  np.testing.assert_allclose(loss, one_loss, rtol=1e-3)
  assert min(cosines(gradient, one_gradient)) > 0.999


def test_what_is_kept_has_8_bits():
  """Of a projection's input and of its kernel; nothing else is needed."""
  x, kernel = arrays((2, 8, 16), (16, 12))
  dot = functools.partial(projected, "fp8", contracted=1)
  kept = jax.eval_shape(lambda x, kernel: jax.vjp(dot, x, kernel)[1], x, kernel)
  large = [leaf for leaf in jax.tree.leaves(kept) if leaf.size > 1]
  assert {leaf.dtype for leaf in large} == {jnp.dtype(OPERANDS)}
  assert sorted(leaf.size for leaf in large) == [16 * 12, 2 * 8 * 16]


@pytest.mark.slow
def test_a_run_learns_as_well():
  """The loss after 40 steps on one batch, from 4.2 to 0.85 nats: full products are less
  than 5 % of that way ahead (seen: 1.6 %)."""
  mesh, batch, seed = make_mesh({"data": -1}), packed_batch(), np.uint32(0)
  ends = []
  for run in (FAST, FP8):
    model = build_model(CFG, run)
    optimizer = build_optimizer(OptimizerConfig(learning_rate=3e-3, warmup_steps=5), 40)
    state = init_state(model, optimizer, mesh, seed=0)
    step = jit_train_step(model, optimizer, run, mesh)
    losses = []
    for _ in range(40):
      state, metrics = step(state, put_batch(batch, mesh), seed)
      losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0]
    ends.append(float(np.mean(losses[-5:])))
  full, near = ends
  assert 1e-6 < abs(near - full) < 0.05 * (losses[0] - full)


@pytest.mark.parametrize(
  ("device", "cause"),
  [
    (("gpu", "8.0", "cuda 12", "NVIDIA A100"), "A100 has 8.0"),
    (("tpu", "", "tpu", "TPU v5"), "is for NVIDIA GPUs, not tpu"),
    (("gpu", "gfx942", "rocm 6", "MI300X"), "is for NVIDIA GPUs, not gpu"),
    (("gpu", "8.9", "cuda 12", "NVIDIA L4"), None),
    (("gpu", "10.0", "cuda 12", "NVIDIA B200"), None),
    (("cpu", "", "cpu", "cpu"), None),
  ],
  ids=str,
)
def test_devices_that_cannot_are_named(monkeypatch, device, cause):
  kind, capability, version, name = device
  client = types.SimpleNamespace(platform_version=version)
  found = types.SimpleNamespace(
    platform=kind, compute_capability=capability, client=client, device_kind=name
  )
  monkeypatch.setattr(platform.jax, "devices", lambda: [found])
  platform.check_matmul("full")
  if cause is None:
    platform.check_matmul("fp8")
    return
  with pytest.raises(ConfigError, match=cause):
    platform.check_matmul("fp8")
