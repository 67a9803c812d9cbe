# SPDX-License-Identifier: Apache-2.0
"""Products of int8 numbers in training: exact sums, gradients near the full ones, laws."""

import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import fuzz, slow
from meshes import mesh_of
from parameters import cosines
from random_runs import make_run, save_run
from test_training_laws import CFG, FAST, loss_and_gradient_on, on_one, packed_batch

from flaxlm.config import OptimizerConfig, TrainingConfig
from flaxlm.decoding.loading import load_run
from flaxlm.nn.kernels.products import rows_dot
from flaxlm.nn.models import build_model
from flaxlm.nn.quantized import projected
from flaxlm.planning.compile import TPU_ENVIRONMENT
from flaxlm.sharding import make_mesh
from flaxlm.training.optimizer import build_optimizer
from flaxlm.training.step import init_state, jit_train_step, put_batch

INT8 = dataclasses.replace(FAST, matmul="int8")
int8 = functools.partial(projected, "int8")


def arrays(*shapes: tuple) -> list[jax.Array]:
  rng = np.random.default_rng(0)
  return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def rounded(x_RI: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Whole numbers up to 127, and the scale of each row."""
  largest_R1 = np.maximum(np.abs(x_RI).max(1, keepdims=True), 1e-30)
  scale_R1 = largest_R1.astype(np.float32) / np.float32(127)
  return np.round(x_RI / scale_R1).astype(np.int64), scale_R1.astype(np.float64)


def product(x_RI: np.ndarray, kernel_IO: np.ndarray) -> np.ndarray:
  """The definition, in numpy's whole numbers: no int8, no int32."""
  (x_RI, rows_R1), (kernel_OI, outputs_O1) = rounded(x_RI), rounded(kernel_IO.T)
  return (x_RI @ kernel_OI.T) * rows_R1 * outputs_O1.T


@pytest.mark.parametrize(
  ("shape", "contracted"), [((8, 2, 3), 1), ((2, 4, 6), 2), ((8, 5), 1)], ids=str
)
def test_an_int8_product_and_its_gradients_are_as_defined(shape, contracted):
  """With one or two dims of inputs or outputs; a row of zeros, too."""
  kernel, x = arrays(shape, (3, 4, *shape[:contracted]))
  x = x.at[0, 1].set(0)
  (grad,) = arrays((3, 4, *shape[contracted:]))

  @jax.jit
  def gradients(x, kernel, grad):
    y, backward = jax.vjp(lambda x, kernel: int8(x, kernel, contracted), x, kernel)
    return y, *backward(grad)

  y, grad_x, grad_kernel = gradients(x, kernel, grad)
  x_RI, kernel_IO = np.asarray(x).reshape(12, 8), np.asarray(kernel).reshape(8, -1)
  grad_RO = np.asarray(grad).reshape(12, -1)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  assert y.shape == (3, 4, *shape[contracted:])
  close(y.reshape(12, -1), product(x_RI, kernel_IO))
  close(grad_x.reshape(12, 8), product(grad_RO, kernel_IO.T))
  close(grad_kernel.reshape(8, -1), np.asarray(x).reshape(12, 8).T @ grad_RO)
  assert np.abs(np.asarray(y) - rows_dot(x, kernel, contracted)).max() > 1e-4


def test_a_row_depends_on_no_other():
  """Its scale is its own, so that causal, packed and padded stay what they are."""
  x, kernel = arrays((4, 8, 16), (16, 12))
  product = jax.jit(lambda x: int8(x, kernel, 1))
  changed = product(x.at[:, 5:].multiply(1e3))
  np.testing.assert_array_equal(changed[:, :5], product(x)[:, :5])


def test_bfloat16_stays_bfloat16():
  x, kernel = (x.astype(jnp.bfloat16) for x in arrays((4, 16), (16, 12)))
  gradients = jax.jit(
    lambda y, x, kernel: jax.vjp(lambda *of: int8(*of, 1), x, kernel)[1](y)
  )
  y = jax.jit(lambda x, kernel: int8(x, kernel, 1))(x, kernel)
  assert {z.dtype for z in (y, *gradients(y, x, kernel))} == {jnp.dtype("bfloat16")}
  exact = np.float32(x) @ np.float32(kernel)
  assert np.linalg.norm(np.float32(y) - exact) < 0.02 * np.linalg.norm(exact)


@pytest.mark.slow
def test_every_gradient_of_a_model_points_the_same_way():
  """Cosine above 0.995 (seen: 0.9985), a loss within 0.1 %, and none the same."""
  (loss, full), (near_loss, near) = on_one(CFG, FAST), on_one(CFG, INT8)
  assert abs(near_loss / loss - 1) < 1e-3
  assert 0.995 < min(cosines(near, full)) < max(cosines(near, full)) < 0.99999


@pytest.mark.parametrize(
  "sizes",
  [
    slow(dict(data=2, fsdp=2, tensor=2)),
    fuzz(dict(fsdp=2, context=2, tensor=2)),
    fuzz(dict(stage=2, data=2)),
  ],
  ids=str,
)
def test_sharded_equals_one_device(sizes):
  """The scales are of whole rows and columns, wherever their parts lie. An error of the
  last bit may move a number to the next whole one, so that not all have to be equal."""
  loss, gradient = loss_and_gradient_on(mesh_of(**sizes), CFG, INT8)
  one_loss, one_gradient = on_one(CFG, INT8)
  np.testing.assert_allclose(loss, one_loss, rtol=1e-4)
  assert min(cosines(gradient, one_gradient)) > 0.9999


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["dots", fuzz("full")])
def test_what_is_kept_changes_nothing(remat):
  run = dataclasses.replace(INT8, remat=remat)
  jax.tree.map(np.testing.assert_array_equal, on_one(CFG, run), on_one(CFG, INT8))


def test_dots_keep_what_full_products_keep():
  """The results in bfloat16, and no sums in int32."""
  tokens_BT = jnp.asarray(packed_batch().tokens_BT)

  def kept_bytes(run: TrainingConfig) -> int:
    model = build_model(CFG, dataclasses.replace(run, remat="dots", dtype="bfloat16"))
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens_BT)["params"])
    forward = lambda params: model.apply({"params": params}, tokens_BT).value.sum()
    kept = jax.eval_shape(lambda params: jax.vjp(forward, params)[1], params)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept))

  assert kept_bytes(INT8) == kept_bytes(FAST)


@pytest.mark.slow
def test_a_run_learns_as_well():
  """The mean loss of the last ten of 60 steps on one batch, from 4.2 to 1.1 nats: full
  products are less than 5 % of that way ahead (seen: 2.3 %)."""

  def final_loss(run: TrainingConfig) -> tuple[float, float]:
    mesh, model = make_mesh(dict(data=8)), build_model(CFG, run)
    optimizer = build_optimizer(OptimizerConfig(warmup_steps=5), 60)
    state = init_state(model, optimizer, mesh, 0)
    step = jit_train_step(model, optimizer, run, mesh)
    batch = put_batch(packed_batch(), mesh)
    losses = []
    for _ in range(60):
      state, metrics = step(state, batch, 0)
      losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.9 * losses[0]
    return losses[0], float(np.mean(losses[-10:]))

  (first, full), (_, near) = final_loss(FAST), final_loss(INT8)
  assert 1e-6 < abs(near - full) < 0.05 * (first - full)


def test_a_run_decodes_with_full_products(tmp_path):
  """What was trained in int8 is evaluated and decoded as any other run."""
  run = make_run(depth=1)
  narrow = dataclasses.replace(run.cfg, training=INT8)
  path = save_run(run._replace(cfg=narrow), tmp_path / "run")
  loaded = load_run(path, mesh_of())
  assert loaded.cfg.training.matmul == "int8"
  assert loaded.model.execution.matmul == "full"


@pytest.mark.parametrize(
  ("option", "why"),
  [
    ("--model.family=rnn", "not for an RNN"),
    ("--model.moe.num-experts=4", "not for experts"),
  ],
)
def test_it_is_refused_by_name(in_process, option, why):
  found = in_process("train", "--training.matmul=int8", option)
  assert found.returncode == 2
  assert "training.matmul=int8" in found.stderr and why in found.stderr
  assert "--training.matmul=full" in found.stderr


# -- On TPUs that are not here -----------------------------------------------------------

# Two projections and their gradients on four devices: a line of the products' operands.
COMPILE = """
import json
import re
import sys
import jax
from jax.sharding import NamedSharding, PartitionSpec
from flaxlm.config import mesh_shape
from flaxlm.devices import find_device
from flaxlm.nn.quantized import projected
from flaxlm.planning.compile import make_target_mesh, tpu_options

def gradients(x, up, down):
  run = lambda x, up, down: projected("int8", projected("int8", x, up, 1), down, 1)
  y, backward = jax.vjp(run, x, up, down)
  return backward(y)

mesh = make_target_mesh(mesh_shape({"data": 2, "tensor": 2}), find_device(sys.argv[1]))[1]
array = lambda *shape, spec: jax.ShapeDtypeStruct(
  shape, "bfloat16", sharding=NamedSharding(mesh, PartitionSpec(*spec))
)
arrays = [array(8, 512, 1024, spec=("data",)), array(1024, 4096, spec=(None, "tensor"))]
arrays += [array(4096, 1024, spec=("tensor",))]
with jax.set_mesh(mesh):
  compiled = jax.jit(gradients).lower(*arrays).compile(tpu_options())
text = compiled.as_text()
dtypes = dict(re.findall(r"(%[\\w.-]+) = (\\w+)\\[", text))
pattern = r"= (\\w+)\\[\\S* (?:convolution|dot)\\((%[\\w.-]+), (%[\\w.-]+)"
products = re.findall(pattern, text)
print(json.dumps(sorted([dtypes[a], dtypes[b], result] for result, a, b in products)))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_for_users")
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize("name", ["v5e", "v5p", "v6e"])
def test_a_tpu_multiplies_int8_numbers(name):
  """Both products and the gradients of their inputs; those of the kernels are full."""
  environment = os.environ | TPU_ENVIRONMENT | {"JAX_PLATFORMS": "cpu"}
  child = subprocess.run(
    [sys.executable, "-c", COMPILE, name], env=environment, capture_output=True, text=True
  )
  assert child.returncode == 0, child.stderr
  found = json.loads(child.stdout)
  assert set(map(tuple, found)) == {("s8", "s8", "s32"), ("bf16", "bf16", "bf16")}
  assert found.count(["s8", "s8", "s32"]) == 4 and found.count(["bf16"] * 3) == 2
