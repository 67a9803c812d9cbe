# SPDX-License-Identifier: Apache-2.0
"""Laws of pipelines: a step with stages = the step without, and what is refused."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import fuzz
from meshes import mesh_of
from parameters import random_state
from test_training_laws import (
  CFG,
  OTHERS,
  assert_same,
  loss_and_gradient_on,
  on_one,
  packed_batch,
  params_on,
)

from flaxlm.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainingConfig
from flaxlm.decoding.weights import prepare_params
from flaxlm.errors import ConfigError
from flaxlm.nn.layers import Dropout
from flaxlm.nn.models import abstract_params, build_model, init_cache
from flaxlm.sharding import Schedule, axes_of, check_batch, use_mesh
from flaxlm.training.optimizer import build_optimizer
from flaxlm.training.step import (
  abstract_batch,
  abstract_state,
  jit_eval_step,
  jit_train_step,
  put_batch,
)

DEEP = dataclasses.replace(CFG, depth=4)
RUN = TrainingConfig(scanned=True)
TWICE = TrainingConfig(scanned=True, remat="full", pipeline_repeats=2)


def cfg_of(name, **fields):
  return dataclasses.replace(DEEP, **OTHERS[name], **fields)


def check(sizes, cfg=DEEP, run=RUN):
  """The same seed, parameters and batch: loss to 1e-5, gradients to 1e-4."""
  plain = TrainingConfig(scanned=True)
  assert_same(loss_and_gradient_on(mesh_of(**sizes), cfg, run), on_one(cfg, plain))


def test_a_pipeline_equals_one_device():
  check(dict(stage=2, data=2))


@pytest.mark.slow
def test_experts_in_a_pipeline_that_goes_round_twice():
  """With every other axis in use, more microbatches than stages, and accumulation."""
  run = dataclasses.replace(TWICE, pipeline_microbatches=4, accumulation_steps=2)
  check(dict(stage=2, fsdp=2, tensor=2), cfg_of("experts"), run)


@pytest.mark.slow
def test_a_pipeline_without_loops_over_layers():
  check(dict(stage=4, data=2), run=TrainingConfig(scanned=False))


@pytest.mark.slow
@pytest.mark.parametrize(
  ("sizes", "fields"),
  [
    (dict(stage=2), dict(remat="dots", pipeline_repeats=4, pipeline_microbatches=8)),
    (dict(stage=4), dict(remat="full", accumulation_steps=2)),
    (dict(stage=4, data=2), dict(remat="full", pipeline_repeats=2)),
    (dict(stage=2, data=4), dict(scanned=False, remat="dots", accumulation_steps=2)),
    (dict(stage=2, fsdp=4), dict(scanned=False, remat="full", pipeline_repeats=2)),
    (dict(stage=2, fsdp=2, tensor=2), dict(pipeline_microbatches=4)),
    (dict(stage=2, data=2, fsdp=2), dict(remat="attention", pipeline_repeats=2)),
    (dict(stage=2, expert=4), dict(remat="full", pipeline_repeats=2)),
    (dict(stage=2, data=2, context=2), dict(remat="dots", pipeline_microbatches=4)),
    (dict(stage=2, data=2), dict(remat="offload", pipeline_repeats=2)),
  ],
  ids=str,
)
@pytest.mark.parametrize("name", ["dense", fuzz("experts")])
def test_a_pipeline_equals_one_device_however_it_runs(name, sizes, fields):
  check(sizes, cfg_of(name, depth=8), TrainingConfig(**dict(scanned=True) | fields))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(OTHERS))
@pytest.mark.parametrize("repeats", [1, 2])
def test_other_families_in_a_pipeline(name, repeats):
  run = dataclasses.replace(TWICE, pipeline_repeats=repeats, pipeline_microbatches=4)
  depth = 8 if name == "windows" else 4  # a stage holds whole patterns
  check(dict(stage=2, data=2), cfg_of(name, depth=depth), run)
  if name not in ("capacity", "experts"):
    check(dict(stage=2, data=2, tensor=2), cfg_of(name, depth=depth), run)


@pytest.mark.slow
@pytest.mark.parametrize(("stages", "repeats"), [(2, 3), (4, 2), (4, 3), (2, 4), (4, 4)])
def test_any_number_of_rounds(stages, repeats):
  """Layers change places once, whether the numbers divide each other or not."""
  run = dataclasses.replace(TWICE, pipeline_repeats=repeats)
  check(dict(stage=stages), dataclasses.replace(CFG, depth=stages * repeats), run)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_steps_in_a_pipeline_are_the_steps_without(kind):
  """Parameters after two whole steps; moments cut over copies as well."""
  after = []
  optimizer = build_optimizer(
    OptimizerConfig(kind=kind, sharded=True, warmup_steps=0, epsilon=1e-3), 10
  )
  for mesh, run in [(mesh_of(), RUN), (mesh_of(stage=2, data=2), TWICE)]:
    model = build_model(DEEP, run)
    state = random_state(model, optimizer, mesh)
    step = jit_train_step(model, optimizer, run, mesh)
    for n in range(2):
      state, _ = step(state, put_batch(packed_batch(seed=n), mesh), jnp.uint32(0))
    after.append(jax.device_get(state.params))
  compare = lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5)
  jax.tree.map(compare, *after)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "experts", "encoder_decoder"])
def test_bfloat16_in_a_pipeline(name):
  run = dataclasses.replace(TWICE, dtype="bfloat16", param_dtype="bfloat16")
  loss, _ = loss_and_gradient_on(mesh_of(stage=2, data=2), cfg_of(name), run)
  expected, _ = loss_and_gradient_on(mesh_of(), cfg_of(name), run)
  np.testing.assert_allclose(loss, expected, rtol=5e-3)


def compiled_step(cfg, mesh):
  """The state that a training step takes, abstract, and the text of its program."""
  model, optimizer = build_model(cfg, RUN), build_optimizer(OptimizerConfig(), 10)
  state = abstract_state(model, optimizer, mesh)
  step = jit_train_step(model, optimizer, RUN, mesh)
  batch = abstract_batch(DataConfig(seq_len=16, batch_size=16), mesh)
  return state, step.lower(state, batch).compile().as_text()


@pytest.mark.slow
def test_stages_hold_their_layers_and_hand_on():
  """Each stage holds a quarter of all blocks; neighbours exchange in the compiled step."""
  state, text = compiled_step(DEEP, mesh_of(stage=4, data=2))
  for leaf in jax.tree.leaves(state.params["blocks"]):
    assert axes_of(leaf.sharding.spec[0]) == ("stage",)
    assert leaf.sharding.shard_shape(leaf.shape)[0] == 1
  assert "collective-permute" in text
  up = state.params["blocks"]["ffn"]["up"]["kernel"].shape[1:]
  whole = ",".join(map(str, (4, *up)))
  assert f"f32[{whole}]" not in text, "no device ever has all layers"


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [dict(fsdp=4), dict(stage=2, fsdp=4)], ids=str)
def test_gathered_experts_are_not_kept(sizes):
  """A layer's kernels are whole while it runs; never those of all layers, for the gradient.

  Gathering them in a separate loop before a pipeline's would also sometimes hang XLA's CPU
  backend: an independent exchange after such a loop can overtake it.
  """
  state, text = compiled_step(cfg_of("experts"), mesh_of(**sizes))
  layers, *up = state.params["blocks"]["ffn"]["experts"]["up"]["kernel"].shape
  whole = ",".join(map(str, (layers // sizes.get("stage", 1), *up)))
  assert f"f32[{whole}]" not in text


def test_the_bubble_shrinks_with_rounds_and_microbatches():
  assert Schedule(4, 4).bubble == pytest.approx(3 / 7)
  assert Schedule(4, 4, 2).bubble == pytest.approx(3 / 11)
  assert Schedule(4, 16, 2).bubble == pytest.approx(3 / 35)
  assert Schedule(1, 1).bubble == 0


def test_every_microbatch_has_dropout_of_its_own():
  """Equal rows in different microbatches come out different, and twice the same.

  The dropout of embeddings, which draws for all rows at once, is left out: the rows would
  differ by it alone.
  """
  mesh = mesh_of(stage=2)
  run = dataclasses.replace(RUN, pipeline_microbatches=4)
  model = build_model(dataclasses.replace(CFG, dropout=0.5), run)
  params = params_on(mesh, model)
  tokens_BT = jnp.broadcast_to(jnp.arange(16), (4, 16))

  def hidden(params, seed):
    rngs = {"dropout": jax.random.key(seed)}
    options = dict(deterministic=False, rngs=rngs, method="hidden")
    with nn.intercept_methods(leave_embeddings):
      return model.apply({"params": params}, tokens_BT, **options).value

  def leave_embeddings(call, args, kwargs, context):
    of_all = isinstance(context.module, Dropout) and len(args[0]) == len(tokens_BT)
    return args[0] if of_all else call(*args, **kwargs)

  drop = use_mesh(mesh)(jax.jit(hidden))
  first, again, other = (np.asarray(drop(params, seed)) for seed in (0, 0, 1))
  np.testing.assert_array_equal(first, again)
  rows = [*first, other[0]]
  assert all(np.abs(a - b).max() > 0.1 for n, a in enumerate(rows) for b in rows[:n])


@pytest.mark.slow
def test_evaluation_and_decoding_on_stages():
  """Losses through the pipeline; a token at a time with every layer on every stage."""
  results = []
  batch = packed_batch()
  for mesh in (mesh_of(), mesh_of(stage=2, tensor=2)):
    model = build_model(DEEP, RUN)
    params = params_on(mesh, model)
    sums = jit_eval_step(model, mesh)(params, put_batch(batch, mesh))
    prepared = prepare_params(params, model.cfg)

    def decode(params, tokens_BT, model=model):
      cache, logits = init_cache(model, 4, 16), []
      for t in range(3):
        out = model.apply({"params": params}, tokens_BT[:, t : t + 1], cache=cache)
        cache, logits = out.cache, [*logits, out.value]
      return jnp.concatenate(logits, 1)

    logits = use_mesh(mesh)(jax.jit(decode))(prepared, batch.tokens_BT[:4])
    results.append(jax.device_get((sums, logits)))
  compare = lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5)
  jax.tree.map(compare, *results)


@pytest.mark.slow
def test_maps_are_captured_on_stages():
  maps = []
  for mesh in (mesh_of(), mesh_of(stage=2, data=2)):
    model = build_model(DEEP, RUN)
    params = params_on(mesh, model)
    look = lambda params, tokens_BT, model=model: model.apply(
      {"params": params}, tokens_BT, capture=True
    ).attention["self"]
    tokens_BT = packed_batch().tokens_BT[:4]
    maps.append(np.asarray(use_mesh(mesh)(jax.jit(look))(params, tokens_BT)))
  np.testing.assert_allclose(*maps, atol=1e-5)


@pytest.mark.parametrize(
  ("model", "training", "batch_size", "cause"),
  [
    (dict(depth=6), {}, 16, "model.depth=6 is not a multiple of mesh stage=4"),
    (
      dict(depth=4),
      dict(pipeline_repeats=2, remat="full"),
      16,
      "model.depth=4 is not a multiple of mesh stage=4 x training.pipeline_repeats=2",
    ),
    (
      dict(depth=4, encoder_depth=5, family="encoder_decoder"),
      {},
      16,
      "model.encoder_depth=5 is not a multiple",
    ),
    (dict(depth=4, window=4, layer_pattern="LG"), {}, 16, "model.layer_pattern=LG differs"),
    (dict(depth=4), dict(pipeline_microbatches=6), 24, "pipeline_microbatches=6 is not"),
    (dict(depth=4), {}, 12, "data.batch_size=12 is not a multiple of stage=4 x data=2"),
    (
      dict(depth=4),
      dict(pipeline_microbatches=8),
      24,
      "data.batch_size=24 is not a multiple of pipeline_microbatches=8 x data=2",
    ),
    (dict(depth=8), dict(pipeline_repeats=2), 16, "with training.remat=none"),
    (dict(depth=4, family="rnn"), {}, 16, "stage is for transformers"),
  ],
)
def test_what_a_pipeline_refuses(model, training, batch_size, cause):
  cfg = Config(
    model=ModelConfig(**model),
    training=TrainingConfig(**training),
    data=DataConfig(batch_size=batch_size),
  )
  with pytest.raises(ConfigError) as caught:
    check_batch(cfg, mesh_of(stage=4, data=2).shape)
  assert cause in caught.value.cause


def test_parameters_that_stages_do_not_divide_name_the_field():
  with pytest.raises(
    ConfigError, match=r"model.depth = 2 cannot be split over mesh stage=4"
  ):
    abstract_params(build_model(CFG, RUN), mesh_of(stage=4))
