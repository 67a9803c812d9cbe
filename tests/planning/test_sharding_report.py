# SPDX-License-Identifier: Apache-2.0
"""`flaxlm shard`: the sharding that training really uses, and what is really sent."""

import dataclasses
import json

import jax
import pytest
from conftest import fuzz

from flaxlm.cli import main
from flaxlm.config import (
  Config,
  DataConfig,
  ModelConfig,
  OptimizerConfig,
  ResolvedConfig,
  mesh_shape,
)
from flaxlm.devices import ANY
from flaxlm.errors import ConfigError
from flaxlm.nn.models import build_model
from flaxlm.planning.compile import compile_step
from flaxlm.planning.network import network_bytes
from flaxlm.planning.planner import resolve
from flaxlm.planning.sharding_report import explain, report_sharding
from flaxlm.sharding import (
  axes_of,
  check_replication,
  find_replication,
  make_mesh,
  mesh_for,
  split_sizes,
  sums_once,
  whole_sizes,
)
from flaxlm.training.step import abstract_params

TINY = resolve(
  Config(
    name="tiny",
    model=ModelConfig(depth=2, width=32, num_heads=4, vocab_size=512, context=64),
    data=DataConfig(seq_len=64, batch_size=8),
    optimizer=OptimizerConfig(kind="adamw"),
  )
)


def with_kv_heads(number: int) -> ResolvedConfig:
  return dataclasses.replace(
    TINY, model=dataclasses.replace(TINY.model, num_kv_heads=number)
  )


@pytest.mark.parametrize(
  ("cfg", "sizes"),
  [
    (TINY, {"data": 2, "fsdp": 2, "tensor": 2}),
    (with_kv_heads(2), {"fsdp": 2, "tensor": 4}),
    (with_kv_heads(1), {"fsdp": 2, "tensor": 4}),
  ],
)
def test_it_is_the_sharding_that_training_has(cfg: ResolvedConfig, sizes: dict[str, int]):
  mesh = mesh_for(make_mesh(sizes), cfg.model)
  params = abstract_params(build_model(cfg.model, cfg.training), mesh)
  leaves = jax.tree_util.tree_leaves_with_path(params)
  report = report_sharding(cfg, sizes, None, compiled=False)
  assert len(leaves) == len(report.parameters)
  for one, (path, leaf) in zip(report.parameters, leaves, strict=True):
    assert one.name == "/".join(key.key for key in path)
    in_use = [
      tuple(whole_sizes({a: 1 for a in axes_of(e) if mesh.shape[a] > 1}))
      for e in leaf.sharding.spec
    ]
    assert [entry or () for entry in one.spec] == in_use
    shard = leaf.sharding.shard_shape(leaf.shape)
    assert one.bytes_per_device == leaf.dtype.itemsize * jax.numpy.prod(
      jax.numpy.array(shard)
    )
  assert report.bytes_per_device["parameters"] == sum(
    one.bytes_per_device for one in report.parameters
  )


def test_the_contract_of_json(capsys: pytest.CaptureFixture):
  assert main(["shard", "gpt2_124m", "--mesh", "fsdp=8", "--no-compile", "--json"]) == 0
  result = json.loads(capsys.readouterr().out)
  table = next(one for one in result["parameters"] if one["name"] == "embedding/table")
  assert table["logical"] == ["vocab", "embed"]
  assert table["spec"] == [None, ["fsdp"]]
  assert table["bytes_per_device"] * 8 == 4 * table["shape"][0] * 768
  assert result["collectives"] == []
  assert set(table) >= {"name", "shape", "logical", "spec", "bytes_per_device", "reason"}


def test_people_read_why(capsys: pytest.CaptureFixture):
  assert main(["shard", "llama3_8b", "--mesh", "tensor=4", "--no-compile"]) == 0
  text = capsys.readouterr().out
  assert "kv_heads:tensor" in text and "rows of the table" in text
  sizes = mesh_shape({"tensor": 4})
  assert explain(("layers", "norm"), sizes).startswith("whole: norm")
  assert "fsdp would cut embed" in explain(("slots", "embed"), sizes)
  split = split_sizes(sizes, with_kv_heads(2).model)
  assert explain(("kv_heads",), split).endswith("that read them, each on 2 devices")
  assert explain(("heads",), split).startswith("heads over tensor=4: whole query heads")


@pytest.mark.parametrize("command", [["plan"], ["shard", "--no-compile"]])
def test_a_card_is_padded_where_tensor_does_not_divide_it(command, capsys):
  command = [command[0], "gpt2_124m", *command[1:], "--mesh"]
  said = "vocabulary: 50,257 ids, padded to 50,304 rows"
  assert main([*command, "tensor=2"]) == 0
  assert said in capsys.readouterr().out
  assert main([*command, "fsdp=2"]) == 0
  assert "padded" not in capsys.readouterr().out


def test_the_slow_network_is_shown(capsys: pytest.CaptureFixture):
  asked = ["shard", "llama3_8b", "--device", "v5e", "--no-compile", "--mesh"]
  assert main([*asked, "data=2@dcn,fsdp=8", "--json"]) == 0
  result = json.loads(capsys.readouterr().out)
  assert result["slow_axes"] == ["data"]
  assert result["bytes_per_second"] == {"data": 3.125e9, "fsdp": 180e9}
  assert main([*asked, "data=2@dcn,fsdp=8"]) == 0
  text = capsys.readouterr().out
  assert "llama3_8b on data=2@dcn,fsdp=8: 16 devices" in text
  assert "data (data-centre network): " in text and "at 3.125 GB/s" in text


@pytest.mark.slow
@pytest.mark.parametrize(
  "mesh, extra, kv_heads",
  [
    ({"data": 4}, 0, 4),
    ({"fsdp": 4}, 0, 4),
    # Of q, k and v, and of up and gate, XLA's CPU compiler sums each gradient on its own,
    # where the TPU's adds them up first: 3 vectors more in each of 2 layers.
    ({"tensor": 2}, 6, 4),
    # Each kv head on 4 devices, or on 2: what k and v add is summed over one copy of each
    # head, which is over none, or over 2 devices: 2/3 of a vector for each layer.
    fuzz({"tensor": 4}, 2, 1),
    ({"tensor": 4}, 2 + 2 * 2 / 3, 2),
    # The gradients of k and v are summed whole, not scattered: twice, in each of 2 layers.
    ({"context": 2}, 2, 4),
    ({"stage": 2}, 0, 4),
  ],
  ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_travels_is_what_the_formula_says(mesh: dict, extra: float, kv_heads: int):
  sizes, cfg = mesh_shape(mesh), with_kv_heads(kv_heads)
  axis = next(iter(mesh))
  compiled = compile_step(cfg, sizes, ANY)
  assert compiled.error is None
  formula = network_bytes(cfg, sizes)[axis]
  vector = 2 * (8 * 64 * 32 * 4) * (1 - 1 / sizes[axis])
  # Not in the formula: looked-up rows of the table that change places (all-to-all).
  found = sum(one.bytes for one in compiled.collectives if one.kind != "all-to-all")
  assert found == pytest.approx(formula + extra * vector, rel=0.02)
  assert all(one.axes == axis for one in compiled.collectives)
  counts = {one.kind: one.count for one in compiled.collectives}
  if axis == "tensor":
    assert set(counts) == {"all-reduce"}
  if mesh == {"tensor": 2}:  # two a layer, forward and backward; embedding, head, softmax
    assert counts == {"all-reduce": 4 * 2 + 5}
  if axis == "fsdp":  # on a TPU: gathered twice, and the gradients reduce-scattered
    assert set(counts) == {"all-gather", "all-reduce", "all-to-all"}
  if axis == "stage":  # three ticks, forward and backward, and rows to and from the stages
    assert counts["collective-permute"] > 2 * 3
  if axis == "data":  # all gradients in one
    assert set(counts) == {"all-reduce"} and counts["all-reduce"] <= 2


@pytest.mark.slow
@pytest.mark.parametrize(
  ("mesh", "times"),
  # Over data once for all parts, in float32 as here; over stage in each of two parts, and
  # the head's in every chunk of the loss.
  [({"data": 4}, 1), fuzz({"stage": 2}, 2), fuzz({"stage": 2, "data": 2}, 1)],
  ids=str,
)
def test_how_often_gradients_of_parts_are_summed(mesh: dict, times: int):
  training = dataclasses.replace(TINY.training, accumulation_steps=2, loss_chunks=4)
  cfg, sizes = dataclasses.replace(TINY, training=training), mesh_shape(mesh)
  axis = [*mesh][-1]
  collectives = compile_step(cfg, sizes, ANY).collectives
  found = sum(one.bytes for one in collectives if one.axes == axis)
  assert found == pytest.approx(network_bytes(cfg, sizes)[axis], rel=0.02)
  once = network_bytes(TINY, sizes)[axis]
  is_once = times == 1 and sums_once(sizes, 2)
  assert found < 1.05 * once if is_once else found > 2 * once


@pytest.mark.slow
def test_a_chunk_of_the_loss_gathers_no_head_again():
  sizes, found, planned = mesh_shape({"fsdp": 4}), [], []
  for chunks in (1, 4):
    training = dataclasses.replace(TINY.training, loss_chunks=chunks)
    cfg = dataclasses.replace(TINY, training=training)
    found.append(sum(one.bytes for one in compile_step(cfg, sizes, ANY).collectives))
    planned.append(network_bytes(cfg, sizes)["fsdp"])
  # The CPU's compiler sums whole gradients, which moves twice as much as to scatter them.
  assert found[1] - found[0] == pytest.approx(2 * (planned[1] - planned[0]), rel=0.02)


@pytest.mark.slow
def test_norms_cut_over_tensor_keep_a_share_of_each_layers_input():
  depth, T, D = 4, 256, 64
  model = dataclasses.replace(TINY.model, depth=depth, context=T, width=D, ffn_width=D)
  training = dataclasses.replace(TINY.training, remat="full", scanned=True)
  data = dataclasses.replace(TINY.data, seq_len=T)
  cfg = dataclasses.replace(TINY, model=model, training=training, data=data)
  cut = dataclasses.replace(training, sequence_parallel=True)
  sizes = mesh_shape({"tensor": 4})
  whole, shares = (
    compile_step(dataclasses.replace(cfg, training=run), sizes, ANY)
    for run in (training, cut)
  )
  inputs = depth * data.batch_size * T * D * 4
  assert whole.temp_bytes - shares.temp_bytes > 0.7 * inputs


def test_what_is_left_whole_by_accident_is_refused():
  mesh = make_mesh({"fsdp": 8})
  params = abstract_params(build_model(TINY.model, TINY.training), mesh)
  found = find_replication(params, mesh.shape)
  norms = 4 * (2 * 2 + 1) * 32
  total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
  assert found.fraction == norms / total
  check_replication(params, mesh.shape, found.fraction)
  with pytest.raises(ConfigError, match=r"blocks/(attention|ffn)_norm"):
    check_replication(params, mesh.shape, found.fraction * 0.99)
  copies = find_replication(params, mesh_shape({"data": 8}))
  assert copies.fraction == 0, "copies are what `data` is for"


@pytest.mark.parametrize(
  "arguments, cause",
  [
    (["--mesh", "tensor=5"], "cannot be split"),
    (["--mesh", "tensr=2"], "tensr"),
    (["--mesh", "fsdp=-1"], "leaves a size open"),
    (["--compile", "--no-compile"], "choose one"),
    (["--mesh", "fsdp=8", "--device", "v99"], "v99"),
  ],
)
def test_mistakes(arguments: list[str], cause: str, capsys: pytest.CaptureFixture):
  assert main(["shard", "gpt2_124m", *arguments]) == 2
  assert cause in capsys.readouterr().err
