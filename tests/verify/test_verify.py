# SPDX-License-Identifier: Apache-2.0
"""`flaxlm verify`: laws hold for good configs, and one that fails is named; exit codes."""

import dataclasses
import gettext
import io
import json
from pathlib import Path

import pytest

from flaxlm.config import load_config
from flaxlm.planning.planner import resolve
from flaxlm.sharding import KV_COPIES, RULES
from flaxlm.verify.case import Case
from flaxlm.verify.laws import HOLDS, LAWS
from flaxlm.verify.run_laws import catalogue
from flaxlm.verify.shrink import MOST_DEVICES, shrink_mesh

CONFIGS = sorted(
  path.stem for path in (Path(__file__).parent.parent.parent / "configs").glob("*.py")
)
# A decoder to which every law for decoders applies.
RICH = (
  "--model.window=6",
  *("--model.sink_tokens=2", "--model.learned_sinks=true", "--model.num_kv_heads=2"),
  *("--model.dropout=0.1", "--model.rope.fraction=0.5", "--model.rope.scaling=llama3"),
  *("--model.rope.factor=4", "--model.rope.fast_turns=4", "--model.context=1024"),
)
QUICK = (
  *("causal", "window", "sinks", "packed", "padding", "kv heads", "attention", "rope"),
  *("norms", "feed-forward", "layer", "layout", "tokenizer", "every row"),
)
# What the config that has everything is too plain for.
MORE = ("cross-attention", "experts", "cell", "capacity", "bfloat16", "adapters", "cudnn")
OWN_RUNS = ("resumed", "processes")  # these train


def laws(*names: str) -> list[str]:
  return [f"--law={name}" for name in names]


def results_of(done) -> dict[str, dict]:
  return {result["law"]: result for result in json.loads(done.stdout)}


def test_the_quick_laws_hold_for_one_layer(in_process):
  small = ("--model.depth=1", *laws(*QUICK))
  done = in_process("verify", "stdlib_tiny", *RICH, *small, "--json")
  assert done.returncode == 0, done.stdout + done.stderr
  found = results_of(done)
  assert [*found] == [law.name for law in LAWS if law.name in QUICK]
  assert {result["result"] for result in found.values()} == {HOLDS}
  assert all(result["seconds"] >= 0 for result in found.values())
  assert "shrunk: one period of the layer pattern" in done.stderr
  assert "window 6 -> 5" in done.stderr


@pytest.mark.slow
def test_all_laws_hold_for_a_config_that_has_everything(in_process):
  names = [law.name for law in LAWS if law.name not in OWN_RUNS]
  rich = (*RICH, "--model.layer_pattern=LG")
  done = in_process("verify", "stdlib_tiny", *rich, *laws(*names), "--json")
  assert done.returncode == 0, done.stdout + done.stderr
  found = results_of(done)
  others = {name for name, result in found.items() if result["result"] != HOLDS}
  assert others == {"both sides", "exported", "splash", *MORE}
  assert found["both sides"]["reason"] == "there is no encoder"
  assert found["splash"]["reason"].endswith("does not support sink_tokens")
  assert all(result["reason"] for result in found.values() if result["result"] != HOLDS)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("arguments", "names"),
  [
    (
      ("moe_tiny", "--model.moe.capacity_factor=1.25", "--model.depth=1"),
      ("experts", "layer", "capacity"),
    ),
    (
      ("stdlib_tiny", "--lora.rank=2", "--model.depth=1", "--training.dtype=bfloat16"),
      ("bfloat16", "adapters", "splash"),
    ),
    (("rnn_lstm", "--model.cell=gru"), ("norms", "cell")),
    (("t5_small",), ("norms", "feed-forward", "cross-attention", "layer")),
  ],
)
def test_laws_of_what_a_config_need_not_have(in_process, arguments, names):
  done = in_process("verify", *arguments, *laws(*names), "--json")
  assert done.returncode == 0, done.stdout + done.stderr
  found = results_of(done)
  assert {name: found[name]["result"] for name in names} == dict.fromkeys(names, HOLDS)


@pytest.mark.slow
def test_a_killed_run_is_the_same_run(in_process):
  small = ("--model.depth=1", "--mesh=data=2")
  done = in_process("verify", "stdlib_tiny", *small, *laws("resumed"), "--json")
  assert done.returncode == 0, done.stdout + done.stderr
  (found,) = results_of(done).values()
  assert (found["result"], found["largest_error"]) == (HOLDS, 0)


@pytest.mark.fuzz
def test_two_processes_are_one(in_process):
  done = in_process("verify", "stdlib_tiny", *laws("processes"), "--json")
  assert done.returncode == 0, done.stdout + done.stderr
  assert results_of(done)["processes"]["result"] == HOLDS


def test_pairs_that_are_made_up_are_read_as_a_catalogue(tmp_path):
  """The bytes of a .mo file, read by Python's own reader."""
  messages = {"One": "enO", "Three": "eerhT", "Two": "owT"}
  found = gettext.GNUTranslations(io.BytesIO(catalogue(messages)))
  assert {source: found.gettext(source) for source in messages} == messages


@pytest.mark.fuzz
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", CONFIGS)
def test_all_laws_hold_for_a_card(in_process, name: str):
  done = in_process("verify", name, "--json")
  assert done.returncode == 0, done.stdout + done.stderr


def test_a_law_that_fails_is_named_and_ends_with_1(in_process, monkeypatch):
  monkeypatch.setitem(RULES, "embed", ())
  done = in_process("verify", "stdlib_tiny", *laws("layout", "rope"))
  assert done.returncode == 1, done.stdout + done.stderr
  (line,) = (line for line in done.stdout.splitlines() if line.startswith("layout"))
  assert "fails: " in line and "is cut into 2 pieces, not 4" in line
  assert "1 hold, 1 fail, 0 do not apply" in done.stdout


def test_an_unknown_law_names_those_that_there_are(in_process):
  done = in_process("verify", "stdlib_tiny", "--law=casual")
  assert done.returncode == 2
  assert "there is no law 'casual'" in done.stderr
  assert "causal" in done.stderr


@pytest.mark.parametrize("name", CONFIGS)
def test_a_card_keeps_its_kind_when_it_is_shrunk(name: str):
  """What the laws test is still there: kinds of layers, shared kv heads, experts."""
  cfg = resolve(load_config(name))
  small = Case.of(cfg).model_cfg
  assert set(small.layer_kinds()) == set(cfg.model.layer_kinds())
  grouped = cfg.model.num_heads > cfg.model.num_kv_heads
  assert (small.num_heads > small.num_kv_heads) == grouped
  assert (small.num_kv_heads == 1) == (cfg.model.num_kv_heads == 1)
  assert (small.window is None) == (cfg.model.window is None)
  assert bool(small.moe.num_experts) == bool(cfg.model.moe.num_experts)
  assert small.num_ids < small.vocab_size


def test_a_mesh_of_many_devices_is_cut_to_two_along_each_axis():
  model = load_config("llama3_8b").model
  sizes = shrink_mesh({"data": "4@dcn", "fsdp": 64, "tensor": 8}, model)
  used = {axis: size for axis, size in sizes.items() if size > 1}
  assert used == {"data": 2, "fsdp": 2, "tensor": 2}
  sizes = shrink_mesh({"fsdp": 4, "tensor": 2}, model)
  assert (sizes["fsdp"], sizes["tensor"]) == (4, 2)
  assert sizes["fsdp"] * sizes["tensor"] <= MOST_DEVICES
  assert set(shrink_mesh({"data": 1}, model).values()) == {1}


@pytest.mark.parametrize(
  ("name", "mesh", "heads", "copies"),
  [
    ("llama3_70b", {"fsdp": 4, "tensor": 16}, (2, 1), 2),
    ("llama3_70b", {"tensor": 8}, (16, 8), None),
    ("palm_540b", {"tensor": 8}, (8, 1), 8),
    ("palm_540b", {"data": -1}, (2, 1), 2),
  ],
)
def test_kv_heads_are_on_several_devices_as_in_the_config(name, mesh, heads, copies):
  case = Case.of(resolve(dataclasses.replace(load_config(name), mesh=mesh)))
  assert (case.model_cfg.num_heads, case.model_cfg.num_kv_heads) == heads
  assert case.mesh.shape.get(KV_COPIES) == copies
