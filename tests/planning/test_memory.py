# SPDX-License-Identifier: Apache-2.0
"""Memory by part: the state exactly as training lays it out, and what the layers keep."""

import dataclasses
import math

import jax
import pytest
from meshes import mesh_of

from flaxlm.config import (
  Config,
  DataConfig,
  LoraConfig,
  ModelConfig,
  OptimizerConfig,
  ResolvedMoE,
  RewardConfig,
  TrainingConfig,
  mesh_shape,
)
from flaxlm.cost import adapter_parameters, forward_work, parameters, step_cost
from flaxlm.decoding.prefill import Request
from flaxlm.decoding.weights import prepare_params
from flaxlm.devices import find_device
from flaxlm.errors import ConfigError
from flaxlm.nn.execution import REMAT_POLICIES
from flaxlm.nn.models import abstract_params, build_model, init_cache
from flaxlm.planning.compile import compile_here
from flaxlm.planning.memory import decoding_memory, state_bytes, training_memory
from flaxlm.planning.network import network_bytes
from flaxlm.planning.residuals import kept_bytes
from flaxlm.sharding import batch_shards, make_mesh, mesh_for, use_mesh
from flaxlm.training.optimizer import build_optimizer
from flaxlm.training.step import abstract_batch, abstract_state

MODEL = ModelConfig(
  depth=3, width=64, num_heads=8, num_kv_heads=4, vocab_size=256, context=128
).resolve()
CFG = Config(
  model=MODEL,
  data=DataConfig(seq_len=64, batch_size=16),
  training=TrainingConfig(dtype="bfloat16", scanned=True),
)
MESHES = [
  dict(data=8),
  dict(fsdp=8),
  dict(fsdp=2, tensor=4),
  dict(tensor=8),  # each kv head is on two devices
  dict(data=2, fsdp=2, tensor=2),
]


def changed(**fields) -> Config:
  return dataclasses.replace(CFG, training=dataclasses.replace(CFG.training, **fields))


@pytest.mark.parametrize("kind", ["adamw", "lion", "adafactor", "muon", "sgd"])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_the_state_is_that_of_training(kind: str, mesh: dict[str, int]):
  """Shards of the real state on real devices, added up."""
  optimizer = OptimizerConfig(kind=kind)
  state = state_bytes(dataclasses.replace(CFG, optimizer=optimizer), mesh_shape(mesh))
  real = abstract_state(
    build_model(MODEL, CFG.training),
    build_optimizer(optimizer, 10),
    mesh_for(make_mesh(mesh), MODEL),
  )
  local = lambda tree: sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )
  assert state.parameters == local(real.params)
  assert state.optimizer_state == local(real.opt_state)


def test_a_tpu_fills_up_rows_of_128_lanes():
  """Seen of libtpu: 12 heads of 64, width 768 over fsdp=8 take 4/3 of their size."""
  model = ModelConfig(depth=2, width=768, num_heads=12, vocab_size=512).resolve()
  cfg = dataclasses.replace(CFG, model=model)
  size = lambda lanes: state_bytes(cfg, mesh_shape(dict(fsdp=8)), lanes)
  attention = 2 * 4 * 768 * 768 * 4 // 8
  assert size(128).parameters - size(1).parameters == pytest.approx(attention / 3, rel=0.1)
  assert size(128).elements == size(1).elements


def test_moments_by_kind():
  one = mesh_shape({})
  model = dataclasses.replace(MODEL, width=256)  # Adafactor factors from 128 on
  ratio = {}
  for kind in ("adamw", "lion", "sgd", "muon", "adafactor"):
    optimizer = OptimizerConfig(kind=kind)
    state = state_bytes(dataclasses.replace(CFG, model=model, optimizer=optimizer), one)
    ratio[kind] = state.optimizer_state / state.parameters
  assert ratio["adamw"] == pytest.approx(2, abs=1e-3)
  assert ratio["lion"] == pytest.approx(1, abs=1e-3)
  assert ratio["sgd"] == pytest.approx(1, abs=1e-3)
  assert 1 < ratio["muon"] < 2  # one for matrices, two for the embedding
  assert ratio["adafactor"] < 0.3


def test_what_the_layers_keep():
  """With full remat each block's input, in bfloat16; with less of it, more."""
  remats = ("none", *REMAT_POLICIES)
  kept = {remat: kept_bytes(CFG, mesh_shape({}), remat).per_row for remat in remats}
  inputs = MODEL.depth * 64 * MODEL.width * 2
  final_norm = 64 * MODEL.width * 8  # in float32, twice; the embedding keeps ids alone
  assert inputs < kept["full"] < inputs + final_norm + 64 * 1024
  # q, k, v, the output's input, gate and up: what matrix products give.
  D, N, K, H, F = 64, 8, 4, 8, MODEL.ffn_width
  assert F is not None
  dots = MODEL.depth * 64 * 2 * (N * H + 2 * K * H + D + 2 * F)
  assert kept["full"] + 0.95 * dots < kept["dots"] < kept["full"] + 1.3 * dots
  assert kept["none"] > 1.5 * kept["dots"]
  assert kept["attention"] == kept["full"] + MODEL.depth * 64 * 2 * D
  assert kept["offload"] == kept["full"]  # of the device's memory


def test_tensor_members_keep_less():
  sizes = (mesh_shape({"tensor": n}) for n in (1, 4))
  whole, part = (kept_bytes(CFG, one, "none").per_row for one in sizes)
  assert whole / 4 < part < whole


@pytest.mark.parametrize("capacity", [None, 1.25])
def test_members_of_expert_have_room_for_the_choices_of_all(capacity: float | None):
  """By hand, per choice and layer: an expert's input and six arrays of its width, in
  bfloat16, and its output in float32; libtpu keeps the same. Places of a capacity are
  moved, not added."""
  D, F, T, A = MODEL.width, 96, 64, 2
  moe = ResolvedMoE(
    num_experts=8, experts_per_token=A, expert_width=F, capacity_factor=capacity
  )
  cfg = dataclasses.replace(CFG, model=dataclasses.replace(MODEL, moe=moe))
  kept = lambda n, remat: kept_bytes(cfg, mesh_shape({"expert": n}), remat).per_row
  assert kept(4, "full") == kept(1, "full")
  more = kept(4, "none") - kept(1, "none")
  if capacity is not None:
    assert more == 0
    return
  by_hand = 3 * A * T * MODEL.depth * (2 * D + 2 * 6 * F + 4 * D)
  assert more == pytest.approx(by_hand, rel=0.02)


def test_cut_logits_stay_while_layers_keep_much():
  """libtpu sums the head's gradient after the layers' with `tensor` and remat=dots, not
  with full (docs/LOG.md), and makes the gradient of the logits anew."""
  logits = 16 // 2 * 64 * 256 * 4 // 4
  for remat, stay in (("dots", True), ("full", False)):
    at = training_memory(changed(remat=remat), mesh_shape(dict(fsdp=2, tensor=4))).moments
    assert at["loss"]["logits"] == logits
    assert ("logits" in at["backward"]) is stay
  whole = training_memory(changed(remat="dots"), mesh_shape(dict(fsdp=8))).moments
  assert whole["loss"]["logits"] == 2 * 64 * 256 * (4 + 2)
  assert "logits" not in whole["backward"]


@pytest.mark.parametrize(("remat", "times"), [("full", 1), ("dots", 2), ("none", 2)])
def test_rows_that_are_shared_are_kept_once(remat: str, times: int):
  """Of 3 blocks' inputs (and second norms'), three of four members keep nothing."""
  sizes = mesh_shape(dict(fsdp=2, tensor=4))
  whole, shared = (
    training_memory(changed(remat=remat, sequence_parallel=on), sizes).moments["loss"]
    for on in (False, True)
  )
  saved = 8 * times * 3 * 64 * 64 * 2 * 3 // 4
  assert whole["activations"] - shared["activations"] == saved


def test_parts_add_up_and_shrink_as_they_should():
  one, eight = (training_memory(CFG, mesh_shape(mesh)) for mesh in ({}, dict(data=8)))
  assert one.total == sum(one.parts.values()) == sum(one.moments[one.peak].values())
  loss, eighth = one.moments["loss"], eight.moments["loss"]
  # In float32, and their gradient in bfloat16.
  assert loss["logits"] == 16 * 64 * 256 * (4 + 2) == 8 * eighth["logits"]
  assert loss["parameters"] == eighth["parameters"]  # data replicates them
  assert loss["parameters"] == 4 * sum(parameters(MODEL).values())
  sharded = training_memory(CFG, mesh_shape(dict(fsdp=8))).moments["loss"]
  assert sharded["parameters"] < loss["parameters"] / 7
  parts = training_memory(changed(accumulation_steps=4), mesh_shape({})).moments["loss"]
  assert parts["logits"] == loss["logits"] / 4
  assert parts["gradient_sums"] == loss["parameters"]
  assert parts["batch"] == loss["batch"]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES[1::2], ids=str)
def test_arguments_are_those_of_the_compiled_step(mesh: dict[str, int]):
  """State and batch to the byte, but for the step, counters and the seed."""
  sizes = mesh_shape(mesh)
  compiled = compile_here(CFG, sizes, find_device("cpu"))
  parts = training_memory(CFG, sizes).moments["loss"]
  expected = parts["parameters"] + parts["optimizer_state"] + parts["batch"]
  assert compiled.argument_bytes is not None
  assert 0 <= compiled.argument_bytes - expected < 64
  assert compiled.alias_bytes is not None  # the whole state is donated
  assert compiled.alias_bytes >= parts["parameters"] + parts["optimizer_state"]
  assert compiled.collectives


@pytest.mark.parametrize(
  ("mesh", "field"),
  [
    (dict(tensor=16), "model.num_heads=8 and model.num_kv_heads=4"),
    (dict(fsdp=128), "model.width = 64"),
    (dict(data=32), "data.batch_size=16"),
  ],
)
def test_what_does_not_divide_is_refused_by_name(mesh: dict[str, int], field: str):
  with pytest.raises(ConfigError, match=field):
    training_memory(CFG, mesh_shape(mesh))


def test_decoding_needs_weights_and_cache():
  parts = decoding_memory(CFG, mesh_shape(dict(tensor=2)), rows=8, context=100)
  lengths = 4 * 8  # on both devices
  assert parts["kv_cache"] == 2 * 3 * 8 * 100 * 4 * 8 * 2 // 2 + lengths
  assert parts["parameters"] < 2 * sum(parameters(MODEL).values()) * 0.51


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [dict(fsdp=2, tensor=4)], ids=str)
@pytest.mark.parametrize("base", ["full", "int8"])
def test_frozen_bases_and_adapters_are_counted(base: str, mesh: dict[str, int]):
  """The state as training lays it out, the arguments of the compiled step, the FLOPs."""
  lora = LoraConfig(rank=4, base_weights=base)
  cfg, sizes = dataclasses.replace(CFG, lora=lora), mesh_shape(mesh)
  optimizer = build_optimizer(cfg.optimizer, 10)
  model = build_model(MODEL, CFG.training)
  real = abstract_state(model, optimizer, make_mesh(mesh), lora)
  local = lambda tree: sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )
  state, whole = state_bytes(cfg, sizes), state_bytes(CFG, sizes)
  assert state.learning == local(real.params)
  assert state.parameters == local((real.params, real.frozen))
  assert state.optimizer_state == local(real.opt_state)
  assert state.optimizer_state < whole.optimizer_state / 3
  assert (state.parameters < whole.parameters) == (base == "int8")
  parts = training_memory(cfg, sizes).moments["loss"]
  assert parts["adapters"] == state.learning
  names = ("parameters", "adapters", "optimizer_state", "batch")
  compiled = compile_here(cfg, sizes, find_device("cpu"))
  assert compiled.argument_bytes is not None
  assert 0 <= compiled.argument_bytes - sum(parts[name] for name in names) < 64
  least = decoding_memory(CFG, sizes, rows=8, context=100)
  assert decoding_memory(cfg, sizes, rows=8, context=100) == least, "they are merged"


PREFERS = dataclasses.replace(CFG.data, objective="preference")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 4])
def test_the_reference_is_counted(rank: int):
  """The arguments of the compiled step, and about what it takes besides."""
  mesh = dict(fsdp=2, tensor=4)
  cfg = dataclasses.replace(CFG, data=PREFERS, lora=LoraConfig(rank=rank))
  sizes = mesh_shape(mesh)
  memory = training_memory(cfg, sizes)
  parts = memory.moments["loss"]
  assert ("reference" in parts) == (rank == 0)
  compiled = compile_here(cfg, sizes, find_device("cpu"))
  assert compiled.argument_bytes is not None and compiled.temp_bytes is not None
  names = ("parameters", "adapters", "optimizer_state", "reference", "batch")
  held = sum(parts.get(name, 0) for name in names)
  assert 0 <= compiled.argument_bytes - held < 64
  alone = compile_here(dataclasses.replace(cfg, data=CFG.data), sizes, find_device("cpu"))
  assert alone.temp_bytes is not None
  assert compiled.temp_bytes / alone.temp_bytes < 1.25  # the passes take turns


def test_a_reference_costs_a_forward_pass():
  for lora in (LoraConfig(), LoraConfig(rank=2)):
    plain = dataclasses.replace(CFG, lora=lora)
    cfg = dataclasses.replace(plain, data=PREFERS)
    costs = [step_cost(one) for one in (cfg, plain)]
    forward = forward_work(MODEL, 16, 64)
    assert costs[0].strict_flops - costs[1].strict_flops == forward.strict
    for mesh in ({}, dict(fsdp=8), dict(context=2, fsdp=2, tensor=2)):
      sizes = mesh_shape(mesh)
      moments = [training_memory(one, sizes).moments for one in (cfg, plain)]
      more = 0 if lora.rank else state_bytes(plain, sizes).parameters
      for name, parts in moments[1].items():
        assert sum(moments[0][name].values()) == sum(parts.values()) + more
      # Two sums of logits where the head travels, and nothing of the pass that learns.
      logits = 16 // batch_shards(sizes) * 64 * 256 * 4 // sizes["tensor"]
      logits = logits // sizes["context"] * (1 + (sizes["fsdp"] > 1))
      assert moments[0]["reference"]["logits"] == logits
      assert "activations" not in moments[0]["reference"]
      sent = [network_bytes(one, sizes) for one in (cfg, plain)]
      assert all(sent[0][axis] > sent[1][axis] for axis in sizes if sizes[axis] > 1)


@pytest.mark.parametrize("kv_heads", [1, 4, 8])
@pytest.mark.parametrize("cache", [None, "int8"])
def test_the_cache_of_a_device_has_the_kv_heads_of_its_query_heads(kv_heads, cache):
  """As large for 1 and 4 kv heads as for 8, and as decoding makes it."""
  model = dataclasses.replace(MODEL, num_kv_heads=kv_heads)
  cfg, sizes = dataclasses.replace(CFG, model=model), mesh_shape(dict(tensor=8))
  execution = dataclasses.replace(
    build_model(model, CFG.training).execution, narrow_cache=cache == "int8"
  )
  decoder = build_model(model, CFG.training).clone(execution=execution)
  mesh = mesh_for(make_mesh(dict(tensor=8)), model)
  with use_mesh(mesh):
    made = jax.jit(lambda: init_cache(decoder, 2, 64).constrained())()
  local = sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(made)
  )
  planned = decoding_memory(cfg, sizes, 2, 64, cache=cache)["kv_cache"]
  per_slot = 8 + 4 if cache else 8 * 2
  assert planned == local == 2 * 64 * MODEL.depth * 2 * per_slot + 2 * 4


@pytest.mark.parametrize("rank", [0, 4])
def test_drawing_is_counted(rank: int):
  """The parameters as decoding reads them, and the cache that it makes for the rows."""
  data = dataclasses.replace(CFG.data, objective="reward")
  reward = RewardConfig(max_new_tokens=24)
  cfg = dataclasses.replace(CFG, data=data, reward=reward, lora=LoraConfig(rank=rank))
  sizes = mesh_shape({})
  moments = training_memory(cfg, sizes).moments
  model = build_model(MODEL, CFG.training)
  request = Request([range(40)], 24, MODEL.num_ids)  # 40 + 24 = data.seq_len
  cache = jax.eval_shape(lambda: init_cache(model, 16, request.slots))
  params = abstract_params(model, mesh_of())
  laid_out = jax.eval_shape(lambda params: prepare_params(params, MODEL), params)
  size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
  assert moments["drawing"]["kv_cache"] == size(cache)
  assert moments["drawing"]["weight_copies"] == size(laid_out) * (2 if rank else 1)
  batch = abstract_batch(data, mesh_of())
  assert moments["drawing"]["batch"] == size(batch)
  assert "drawing" not in training_memory(CFG, sizes).moments


def test_adapters_take_less_of_everything():
  lora = dataclasses.replace(CFG, lora=LoraConfig(rank=2))
  for mesh in ({}, dict(fsdp=8), dict(data=8)):
    sizes = mesh_shape(mesh)
    peaks = [training_memory(cfg, sizes).total for cfg in (lora, CFG)]
    assert peaks[0] < peaks[1]
    sent = [sum(network_bytes(cfg, sizes).values()) for cfg in (lora, CFG)]
    assert sent[0] < sent[1] or not mesh
  flops = [step_cost(cfg).strict_flops for cfg in (lora, CFG)]
  assert 0.6 < flops[0] / flops[1] < 0.85
  assert adapter_parameters(MODEL, LoraConfig(rank=2)) == 3 * 2 * (
    2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + MODEL.ffn_width)
  )
  assert adapter_parameters(MODEL, LoraConfig()) == 0


def test_heads_that_do_not_fill_the_lanes_are_there_twice():
  """Padded from 8 to 128, and as they are: libtpu's 7.50 GB of GPT-2's 64 rows."""
  one = mesh_shape({})
  sizes = {
    lanes: decoding_memory(CFG, one, 8, 100, lanes=lanes)["kv_cache"] for lanes in (8, 128)
  }
  assert sizes[128] == sizes[8] * (1 + 128 / 8)
  assert decoding_memory(CFG, one, 8, 100)["kv_cache"] == sizes[8]


def test_the_head_is_gathered_to_decode():
  parts = decoding_memory(CFG, mesh_shape(dict(fsdp=8)), 8, 100)
  assert parts["gathered"] == 256 * MODEL.width * 2
  assert "gathered" not in decoding_memory(CFG, mesh_shape(dict(tensor=8)), 8, 100)
