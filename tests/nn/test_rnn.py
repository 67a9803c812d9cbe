# SPDX-License-Identifier: Apache-2.0
"""Recurrent models equal float64 loops, and keep the decoder's laws."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import slow, slow_but
from parameters import random_params

from flaxlm.config import ModelConfig
from flaxlm.nn.execution import Execution
from flaxlm.nn.models import abstract_params, init_params
from flaxlm.nn.rnn import RNN, init_rnn_cache
from flaxlm.sharding import batch_sharding, make_mesh
from flaxlm.training.step import shardings_of

SMALL = dict(family="rnn", depth=3, width=16, vocab_size=64)
KINDS = {
  "lstm": dict(cell="lstm"),
  "gru": dict(
    cell="gru",
    tied_embeddings=False,
    head_biased=True,
    norm="layernorm",
    embedding_scaled=True,
    logit_scale=0.5,
  ),
}


@pytest.fixture(scope="module", params=slow_but(["lstm"], KINDS))
def rnn(request):
  """(model, params): every parameter random, as zeros and ones would hide mistakes."""
  cfg = ModelConfig(**SMALL | KINDS[request.param]).resolve()
  model = RNN(cfg, Execution(scanned=True))  # compiles one layer, not three
  return model, random_params(model)


@functools.partial(jax.jit, static_argnames="model")
def logits_of(model, params, tokens_BT, segments_BT=None):
  return model.apply({"params": params}, tokens_BT, None, segments_BT).value


@functools.partial(jax.jit, static_argnames="model")
def continued(model, params, tokens_BT, cache, num_new_B=None):
  output = model.apply({"params": params}, tokens_BT, cache=cache, num_new_B=num_new_B)
  return output.value, output.cache


def random_tokens(*shape: int) -> np.ndarray:
  return np.random.default_rng(7).integers(1, SMALL["vocab_size"], shape)


# -- The reference -------------------------------------------------------------------------


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def lstm(cell, state, x_D):
  """Hochreiter & Schmidhuber (1997) with the forget gate of Gers et al. (2000)."""
  c_D, h_D = state

  def gate(name):
    inner = cell[f"h{name}"]
    return x_D @ cell[f"i{name}"]["kernel"] + h_D @ inner["kernel"] + inner["bias"]

  c_D = sigmoid(gate("f")) * c_D + sigmoid(gate("i")) * np.tanh(gate("g"))
  h_D = sigmoid(gate("o")) * np.tanh(c_D)
  return (c_D, h_D), h_D


def gru(cell, h_D, x_D):
  """Cho et al. (2014); the reset gate acts on the product, as in cuDNN."""
  outer = lambda name: x_D @ cell[f"i{name}"]["kernel"] + cell[f"i{name}"]["bias"]
  inner = lambda name: h_D @ cell[f"h{name}"]["kernel"]
  reset_D, keep_D = (sigmoid(outer(name) + inner(name)) for name in "rz")
  new_D = np.tanh(outer("n") + reset_D * (inner("n") + cell["hn"]["bias"]))
  h_D = (1 - keep_D) * new_D + keep_D * h_D
  return h_D, h_D


def norm(cfg, params, x_TD):
  if cfg.norm == "rmsnorm":
    rms_T1 = np.sqrt((x_TD**2).mean(-1, keepdims=True) + cfg.norm_epsilon)
    return x_TD / rms_T1 * params["scale"]
  x_TD = x_TD - x_TD.mean(-1, keepdims=True)
  deviation_T1 = np.sqrt((x_TD**2).mean(-1, keepdims=True) + cfg.norm_epsilon)
  return x_TD / deviation_T1 * params["scale"] + params["bias"]


def reference(cfg, params, tokens_T):
  """Logits (T, V) of one document."""
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  x_TD = params["embedding"]["table"][tokens_T]
  if cfg.embedding_scaled:
    x_TD = x_TD * np.sqrt(cfg.width)
  for l in range(cfg.depth):
    block = jax.tree.map(lambda x: x[l], params["blocks"])
    h_TD = norm(cfg, block["norm"], x_TD)
    zeros_D = np.zeros(cfg.width)
    state = (zeros_D, zeros_D) if cfg.cell == "lstm" else zeros_D
    outputs = []
    for h_D in h_TD:
      state, y_D = {"lstm": lstm, "gru": gru}[cfg.cell](block["cell"], state, h_D)
      outputs.append(y_D)
    x_TD = x_TD + np.stack(outputs)
  x_TD = norm(cfg, params["final_norm"], x_TD)
  if cfg.tied_embeddings:
    return x_TD @ params["embedding"]["table"].T
  return cfg.logit_scale * (x_TD @ params["head"]["kernel"]) + params["head_bias"]


def test_logits_equal_float64_loops(rnn):
  model, params = rnn
  tokens_BT = random_tokens(2, 11)
  expected = [reference(model.cfg, params, tokens_T) for tokens_T in tokens_BT]
  logits = logits_of(model, params, tokens_BT)
  np.testing.assert_allclose(logits, np.stack(expected), atol=2e-5, rtol=2e-5)


# -- Laws ----------------------------------------------------------------------------------


def test_causal_by_gradient(rnn):
  """The logits at t have exactly zero gradient to every later token's embedding."""
  model, params = rnn
  tokens_BT = np.arange(8)[None]  # each its own row of the table

  def logits_sum_T(table_VD):
    embedded = params | {"embedding": {"table": table_VD}}
    if model.cfg.tied_embeddings:  # the head must not see the change
      hidden = model.apply({"params": embedded}, tokens_BT, method="hidden").value
      return model.apply({"params": params}, hidden, method="logits")[0].sum(-1)
    return model.apply({"params": embedded}, tokens_BT).value[0].sum(-1)

  jacobian_TVD = jax.jit(jax.jacrev(logits_sum_T))(params["embedding"]["table"])
  reach_TS = np.abs(jacobian_TVD[:, :8]).sum(-1)
  assert np.all(reach_TS[np.triu_indices(8, 1)] == 0)
  assert np.all(reach_TS[np.tril_indices(8)] > 0)


def test_packed_equals_alone(rnn):
  """With padding between and behind, each document is as in a row of its own."""
  model, params = rnn
  first, second = random_tokens(9), random_tokens(2, 6)[1]
  row = np.concatenate([first, [5, 5], second, [5]])[None]
  segments = np.array([[1] * 9 + [0] * 2 + [2] * 6 + [0]])
  packed = logits_of(model, params, row, segments)[0]
  for alone, place in ((first, slice(0, 9)), (second, slice(11, 17))):
    expected = logits_of(model, params, alone[None])[0]
    np.testing.assert_allclose(packed[place], expected, atol=1e-5)


def test_padding_never_matters(rnn):
  """Padding in front, in the middle and behind changes no bit of real tokens."""
  model, params = rnn
  tokens = random_tokens(2, 12)
  segments = np.array([[0, 0, 1, 1, 1, 0, 1, 1, 2, 2, 0, 0]] * 2)
  other = np.where(segments == 0, 63 - tokens, tokens)
  logits = [logits_of(model, params, x, segments) for x in (tokens, other)]
  np.testing.assert_array_equal(*(x[:, segments[0] > 0] for x in logits))
  real_T = segments[0] > 0
  dense = logits_of(model, params, tokens[:, real_T], segments[:, real_T])
  np.testing.assert_allclose(logits[0][:, real_T], dense, atol=1e-5)


def test_cached_equals_full_at_every_position(rnn):
  """Ragged rows, in chunks of any size, some with nothing new for a row."""
  model, params = rnn
  tokens_BT = random_tokens(3, 15)
  full_BTV = np.asarray(logits_of(model, params, tokens_BT))
  cache, done_B = init_rnn_cache(model.cfg, 3), np.zeros(3, int)
  for num_new in ([2, 6, 4], [5, 0, 1], [1, 3, 6], [7, 6, 4]):
    width = max(num_new)
    index_BT = np.minimum(done_B[:, None] + np.arange(width), 14)
    new_BT = np.take_along_axis(tokens_BT, index_BT, 1)
    new_BT = np.where(np.arange(width) < np.array(num_new)[:, None], new_BT, 59)
    logits, cache = continued(model, params, new_BT, cache, np.array(num_new))
    for row, (done, new) in enumerate(zip(done_B, num_new, strict=True)):
      expected_TV = full_BTV[row, done : done + new]
      np.testing.assert_allclose(logits[row, :new], expected_TV, atol=1e-5)
    done_B += num_new
    np.testing.assert_array_equal(cache.lengths_B, done_B)


def test_all_tokens_are_new_by_default(rnn):
  model, params = rnn
  tokens_BT = random_tokens(2, 5)
  logits, cache = continued(model, params, tokens_BT[:, :4], init_rnn_cache(model.cfg, 2))
  last, cache = continued(model, params, tokens_BT[:, 4:], cache)
  full = logits_of(model, params, tokens_BT)
  np.testing.assert_allclose(np.concatenate([logits, last], 1), full, atol=1e-5)
  np.testing.assert_array_equal(cache.lengths_B, [5, 5])


def loss_and_gradients(model, params, tokens_BT):
  """A loss in which padding and packing take part; also the logits."""

  def loss(params):
    segments_BT = jnp.asarray([[1, 1, 1, 2, 2, 0]] * len(tokens_BT))
    logits = model.apply({"params": params}, tokens_BT, None, segments_BT).value
    return (jax.nn.log_softmax(logits)[..., 3] * (segments_BT > 0)).mean(), logits

  return jax.value_and_grad(loss, has_aux=True)(params)


def assert_close(actual, expected, **tolerance):
  compare = lambda a, e: np.testing.assert_allclose(a, e, **tolerance)
  jax.tree.map(compare, actual, expected)


@pytest.fixture(scope="module")
def on_one_device(rnn):
  model, params = rnn
  tokens_BT = random_tokens(8, 6)
  run = jax.jit(loss_and_gradients, static_argnums=0)
  return tokens_BT, run(model, params, tokens_BT)


@pytest.mark.parametrize(
  "run",
  [Execution(scanned=True, remat="full"), slow(Execution(scanned=False, remat="dots"))],
  ids=lambda run: f"scanned={run.scanned},remat={run.remat}",
)
def test_how_it_runs_changes_nothing(rnn, run, on_one_device):
  model, params = rnn
  tokens_BT, expected = on_one_device
  as_run = jax.jit(loss_and_gradients, static_argnums=0)
  assert_close(as_run(model.clone(execution=run), params, tokens_BT), expected, atol=1e-5)


@pytest.mark.slow
def test_remat_keeps_less():
  """The knob is real: full remat needs less temporary memory for the gradient."""

  def temporary_bytes(remat):
    run = Execution(scanned=True, remat=remat)
    model = RNN(ModelConfig(**SMALL | dict(depth=6)).resolve(), run)
    tokens_BT = jax.ShapeDtypeStruct((8, 6), jnp.int32)
    params = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), tokens_BT))["params"]
    lowered = jax.jit(loss_and_gradients, static_argnums=0).lower(model, params, tokens_BT)
    return lowered.compile().memory_analysis().temp_size_in_bytes

  assert temporary_bytes("full") < 0.7 * temporary_bytes("none")


@pytest.mark.parametrize(
  "sizes",
  [
    slow(dict(data=8)),
    slow(dict(fsdp=4, tensor=2)),
    dict(data=2, expert=2, tensor=2),
  ],
  ids=str,
)
def test_a_mesh_changes_nothing(rnn, sizes, on_one_device):
  model, params = rnn
  tokens_BT, expected = on_one_device
  mesh = make_mesh(sizes)
  params = jax.device_put(params, shardings_of(abstract_params(model, mesh)))
  with jax.set_mesh(mesh):
    rows = jax.device_put(tokens_BT, batch_sharding(mesh))
    actual = jax.jit(loss_and_gradients, static_argnums=0)(model, params, rows)
  np.testing.assert_allclose(actual[0][0], expected[0][0], rtol=1e-5)
  assert_close(actual, expected, atol=1e-4)


def test_gradients_are_summed_once_and_not_at_every_step():
  """On a mesh the loop over time holds no collective."""
  model = RNN(ModelConfig(**SMALL | dict(depth=1)).resolve())
  params = random_params(model)
  with jax.set_mesh(make_mesh(dict(data=2, fsdp=2, tensor=2))):
    jitted = jax.jit(loss_and_gradients, static_argnums=0)
    text = jitted.lower(model, params, random_tokens(8, 6)).compile().as_text()
  loops = [part for part in text.split("\n\n") if "/while/body/" in part]
  assert any("dot(" in loop for loop in loops), "the loop over time is looked at"
  assert "all-reduce" in text
  moved = ("all-reduce(", "all-gather(", "reduce-scatter(", "collective-permute(")
  inside = [line for line in text.splitlines() if "/while/body/" in line]
  assert not [line for line in inside if any(name in line for name in moved)]


def test_dropout_needs_a_key_and_changes_the_output():
  model = RNN(ModelConfig(**SMALL, dropout=0.5).resolve(), Execution(scanned=True))
  params = random_params(model)

  @jax.jit
  def apply(seed):
    rngs = {"dropout": jax.random.key(seed)}
    tokens_BT = jnp.arange(8)[None]
    return model.apply({"params": params}, tokens_BT, deterministic=False, rngs=rngs).value

  np.testing.assert_array_equal(apply(0), apply(0))
  assert not np.allclose(apply(0), apply(1))


def test_bfloat16_stays_close_to_float32(rnn):
  """Over many steps, as the state stays in float32."""
  model, params = rnn
  tokens_BT = random_tokens(2, 64)
  exact, _ = continued(model, params, tokens_BT, init_rnn_cache(model.cfg, 2))
  narrow_model = model.clone(execution=Execution(jnp.dtype("bfloat16")))
  narrow, cache = continued(narrow_model, params, tokens_BT, init_rnn_cache(model.cfg, 2))
  assert {x.dtype for x in jax.tree.leaves(cache.state)} == {jnp.dtype("float32")}
  assert narrow.dtype == jnp.float32
  spread = np.abs(exact - exact.mean(-1, keepdims=True)).mean()
  assert np.abs(narrow - exact).mean() < 0.03 * spread


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recurrent_kernels_start_orthogonal(dtype):
  run = Execution(param_dtype=jnp.dtype(dtype))
  model = RNN(ModelConfig(**SMALL).resolve(), run)
  params = nn.unbox(init_params(model, 0))
  kernel_LDD = params["blocks"]["cell"]["hf"]["kernel"]
  assert kernel_LDD.dtype == dtype
  for kernel in np.asarray(kernel_LDD, np.float32):
    np.testing.assert_allclose(kernel @ kernel.T, np.eye(16), atol=0.02)
