# SPDX-License-Identifier: Apache-2.0
"""Configs: every value on the command line, every mistake named, and JSON round trips."""

import ast
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import typing
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flaxlm import cli
from flaxlm.commands.parsing import read_config, with_hyphens
from flaxlm.config import (
  MESH_AXES,
  Config,
  DataConfig,
  ModelConfig,
  OptimizerConfig,
  TrainingConfig,
  check_config,
  difference,
  flag,
  from_json,
  knobs,
  load_config,
  override,
  parse_mesh,
  to_json,
  without,
)
from flaxlm.config.families import card
from flaxlm.errors import ConfigError

ROOT = Path(__file__).parent.parent
SHIPPED = sorted((ROOT / "configs").glob("*.py"))
LEAVES = {name: (kind, field) for name, kind, field in knobs(Config)}


def value_of(cfg: Config, name: str) -> Any:
  for part in name.split("."):
    cfg = getattr(cfg, part)
  return cfg


def refusal(*arguments: str) -> ConfigError:
  """The error that overriding with `arguments`, then checking, raises."""
  with pytest.raises(ConfigError) as caught:
    check_config(override(Config(name="test"), arguments))
  return caught.value


# -- Overrides -----------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("name", "text", "value"),
  [
    ("seed", "7", 7),
    ("seed", "+7", 7),
    ("training.num_steps", "1e3", 1000),
    ("training.num_steps", "2.0", 2),
    ("optimizer.learning_rate", "3e-4", 3e-4),
    ("optimizer.learning_rate", "1", 1.0),
    ("model.gated", "false", False),
    ("model.gated", "False", False),
    ("model.gated", "0", False),
    ("model.biased", "1", True),
    ("model.num_kv_heads", "2", 2),
    ("model.num_kv_heads", "none", None),
    ("optimizer.clip_norm", "None", None),
    ("optimizer.clip_norm", "0.5", 0.5),
    ("optimizer.kind", "muon", "muon"),
    ("data.corpus", "files:a=b*.txt", "files:a=b*.txt"),
    ("training.sample_prompt", "", ""),
    ("tokenizer.path", "a b/c.json", "a b/c.json"),
    ("mesh", "data=2,fsdp=4", {"data": 2, "fsdp": 4}),
    ("mesh", "tensor=2,data=-1", {"tensor": 2, "data": -1}),
    ("mesh", "data=2@dcn,fsdp=8", {"data": "2@dcn", "fsdp": 8}),
    ("mesh", "data=-1@dcn,fsdp=8", {"data": "-1@dcn", "fsdp": 8}),
  ],
)
def test_a_value_is_read_by_its_field_and_nothing_else_changes(name, text, value):
  cfg = Config()
  changed = override(cfg, [f"--{name}={text}"])
  new = value_of(changed, name)
  assert (new, type(new)) == (value, type(value))
  if text:
    assert override(cfg, [f"--{name}", text]) == changed
  dashed = name.replace("_", "-")
  assert override(cfg, [f"--{dashed}={text}"]) == changed
  assert set(difference(cfg, changed)) <= {name}
  assert cfg == Config()


def test_overrides_add_up_from_left_to_right():
  arguments = ["--model.depth=2", "--model.width", "64", "--model.biased", "--seed=3"]
  cfg = override(Config(), arguments)
  assert difference(Config(), cfg) == {
    "model.depth": (Config().model.depth, 2),
    "model.width": (Config().model.width, 64),
    "model.biased": (False, True),
    "seed": (0, 3),
  }


@pytest.mark.parametrize("rest", [[], ["--seed=1"], ["true"], ["true", "--seed=1"]])
def test_a_bool_needs_no_value(rest: list[str]):
  assert override(Config(), ["--model.biased", *rest]).model.biased is True


def test_a_negative_number_is_a_value_and_not_a_flag():
  assert override(Config(), ["--seed", "-1"]).seed == -1  # for `check` to refuse


def test_a_flag_given_twice_alike_is_fine():
  assert override(Config(), ["--seed=3", "--seed", "3"]).seed == 3


def test_a_flag_given_twice_unlike_is_refused():
  error = refusal("--model.num-heads=2", "--seed=1", "--model.num_heads=4")
  assert "--model.num-heads is given twice, as 2 and as 4" in error.cause


# -- Mistakes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("typo", "meant"),
  [
    ("--modle.depth=2", "--model.depth"),
    ("--model.dpeth=2", "--model.depth"),
    ("--optimiser.learning_rate=1", "--optimizer.learning-rate"),
    ("--learning_rate=1", "--optimizer.learning-rate"),
    ("--num_steps=3", "--training.num-steps"),
    ("--steps=3", "--training.num-steps"),
    ("--data.seqlen=3", "--data.seq-len"),
    ("--model.num-head", "--model.num-heads"),
    ("--mehs=data=8", "--mesh"),
  ],
)
def test_a_typo_gets_the_nearest_name(typo: str, meant: str):
  error = refusal(typo)
  assert f"unknown option {typo.partition('=')[0].replace('_', '-')[2:]}" in (
    error.cause.replace("--", "")
  )
  assert meant in error.cure


@pytest.mark.parametrize("name", LEAVES)
def test_every_field_answers_to_its_last_word(name: str):
  assert flag(name) in refusal(f"--wrong.{name.split('.')[-1]}=1").cure


def test_fields_can_be_left_out_of_a_command_line():
  """In either spelling, with the value in the same argument or in the next."""
  given = ["bert_tiny", "--name", "mine", "--training.num-steps=3", "--mesh", "data=2"]
  assert without(given, ("name", "training.num_steps")) == ["bert_tiny", "--mesh", "data=2"]
  assert without(given, ("mesh",)) == given[:-2]
  assert without(["--model.tied_embeddings", "--seed=1"], ("seed",)) == [
    "--model.tied_embeddings"
  ]


def test_flags_are_spelled_in_one_way():
  given = ["--top_p=0.9", "--prompt=a_b", "--name", "a_b", "--", "--top_p=1"]
  assert with_hyphens(given) == ["--top-p=0.9", *given[1:]]
  assert with_hyphens(["--model.num_heads=2"]) == ["--model.num-heads=2"]
  for spelling in ("--model.num_heads=2", "--model.num-heads=2"):
    assert override(Config(), [spelling]).model.num_heads == 2


@pytest.mark.parametrize("text", ["--", "--=3", "--model=3", "--model.depth.x=3", "--.=1"])
def test_what_is_no_field_is_no_option(text: str):
  assert "unknown option" in refusal(text).cause


@pytest.mark.parametrize(
  ("argument", "complaint"),
  [
    ("--seed=ten", "--seed: expected a whole number, got 'ten'"),
    ("--seed=1.5", "--seed: expected a whole number, got '1.5'"),
    ("--seed=nan", "--seed: expected a whole number, got 'nan'"),
    ("--seed=inf", "--seed: expected a whole number, got 'inf'"),
    ("--seed=", "--seed: expected a whole number, got ''"),
    ("--seed=none", "--seed: expected a whole number, got 'none'"),
    ("--seed=+-1", "--seed: expected a whole number, got '+-1'"),
    ("--optimizer.learning_rate=fast", "expected a number, got 'fast'"),
    ("--optimizer.clip_norm=", "expected a number, got ''"),
    ("--model.gated=maybe", "--model.gated: expected true or false, got 'maybe'"),
    ("--model.positions=rotary", "--model.positions: 'rotary' is not a choice"),
    ("--training.dtype=float16", "--training.dtype: 'float16' is not a choice"),
    ("--model.depth", "--model.depth needs a value"),
    ("depth=3", "expected --section.field=value, got 'depth=3'"),
    ("--mesh=8", "mesh '8': '8' is not AXIS=SIZE"),
    ("--mesh=", "is not AXIS=SIZE"),
    ("--mesh=data=2,", "'' is not AXIS=SIZE"),
    ("--mesh=data=two", "'data=two' is not AXIS=SIZE"),
    ("--mesh=data=2,data=4", "names data twice"),
    ("--mesh=model=2", "unknown mesh axis 'model'"),
    ("--mesh=data=0", "mesh axis data=0"),
    ("--mesh=data=-2", "mesh axis data=-2"),
    ("--mesh=data=0@dcn", "mesh axis data=0@dcn"),
    ("--mesh=data=@dcn", "'data=@dcn' is not AXIS=SIZE"),
    ("--mesh=data=2@ici", "'data=2@ici' is not AXIS=SIZE"),
    ("--mesh=data=2@dcn@dcn", "is not AXIS=SIZE"),
    ("--mesh=data=-1@dcn,fsdp=-1", "more than one mesh axis is -1"),
    ("--mesh=data=-1,fsdp=-1", "more than one mesh axis is -1"),
  ],
)
def test_a_wrong_value_is_named(argument: str, complaint: str):
  assert complaint in refusal(argument).cause


def test_a_choice_gets_the_nearest_and_all():
  cure = refusal("--optimizer.kind=adam").cure
  assert "did you mean adamw?" in cure
  for kind in typing.get_args(LEAVES["optimizer.kind"][0]):
    assert kind in cure


def test_all_mistakes_of_the_command_line_come_at_once():
  error = refusal("--modle.depth=1", "--seed=x", "--model.gated=7", "--seed=1")
  for part in ("--modle.depth", "--seed: expected", "--model.gated: expected"):
    assert part in error.cause
  assert error.exit_code == 2


def test_all_mistakes_of_a_config_come_at_once():
  arguments = ["--model.depth=0", "--optimizer.learning_rate=-1", "--data.seq_len=1024"]
  error = refusal(*arguments)
  for name in ("model.depth is 0", "optimizer.learning_rate is -1", "data.seq_len=1024"):
    assert name in error.cause


BOUNDED = [
  (name, bound, value)
  for name, (_, field) in LEAVES.items()
  for bound in ("low", "high")
  if (value := field.metadata[bound]) is not None
]


@pytest.mark.parametrize(("name", "bound", "value"), BOUNDED)
def test_bounds_are_inclusive_and_named(name: str, bound: str, value: float):
  outside = value - 1 if bound == "low" else value + 1
  if name == "model.dropout":  # one step further, where 0.999 + 1 would be seen anyway
    outside = -1e-3 if bound == "low" else 1.0
  cause = refusal(f"--{name}={outside}").cause
  assert f"{name} is {outside}" in cause
  cure = refusal(f"--{name}={outside}").cure
  assert f"{name} can be" in cure
  assert str(value) in cure
  try:
    check_config(override(Config(), [f"--{name}={value}"]))
  except ConfigError as e:  # a contradiction with another field, perhaps, but no bound
    assert f"{name} is" not in e.cause, e


@pytest.mark.parametrize("text", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
  "name", [name for name, (kind, _) in LEAVES.items() if kind in (float, float | None)]
)
def test_no_number_is_nan_or_infinite(name: str, text: str):
  assert f"{name} is {float(text)}" in refusal(f"--{name}={text}").cause


def test_there_is_no_field_without_help():
  assert all(field.metadata["help"] for _, field in LEAVES.values())


@pytest.mark.parametrize(
  ("vocab_size", "parts", "rows"),
  [
    (50_257, 1, 50_257),
    (50_257, 2, 50_304),
    (50_257, 3, 50_304),
    (50_257, 5, 50_560),
    (128_256, 8, 128_256),
    (64, 3, 192),
  ],
)
def test_a_vocabulary_is_padded_only_where_it_must_be(vocab_size, parts, rows):
  model = ModelConfig(vocab_size=vocab_size).resolve().padded(parts)
  assert model.vocab_size == rows and rows % parts == 0
  assert model.num_ids == vocab_size
  assert model.padded(parts) == model.resolve() == model
  assert model.unpadded == ModelConfig(vocab_size=vocab_size).resolve()
  assert (f"{vocab_size:,} ids, padded to {rows:,} rows" in model.padding) == (
    rows != vocab_size
  )
  again = model.padded(7)  # of the ids, not of the rows
  assert again.unpadded == model.unpadded


@pytest.mark.parametrize(("size", "rows"), [(257, 320), (4096, 4096), (65, 128)])
def test_a_tokenizers_vocabulary_is_padded_to_a_multiple_of_64(size: int, rows: int):
  model = ModelConfig().resolve(size)
  assert model.vocab_size == rows
  assert model.unpadded.vocab_size == size
  assert model.num_ids == size and model.is_padded == (rows > size)


SEQ2SEQ = ["--model.family=encoder_decoder", "--data.objective=seq2seq"]

# One failing example of each rule of `_contradictions`, and its nearest working neighbour.
CONTRADICTIONS = {
  "model.parallel=one_norm leaves an encoder_decoder no cross-attention": (
    [*SEQ2SEQ, "--model.parallel=one_norm"],
    SEQ2SEQ,
  ),
  "model.width=100 is not a multiple of model.num_heads=8": (
    ["--model.width=100", "--model.num_heads=8"],
    ["--model.width=96", "--model.num_heads=8"],
  ),
  "model.num_kv_heads=3 does not divide model.num_heads=4": (
    ["--model.num_kv_heads=3"],
    ["--model.num_kv_heads=2"],
  ),
  "model.num_ids=65 is more than model.vocab_size=64": (
    ["--model.num_ids=65", "--model.vocab_size=64"],
    ["--model.num_ids=64", "--model.vocab_size=64"],
  ),
  "model.num_ids=65 is more than model.vocab_size=None": (
    ["--model.num_ids=65"],
    ["--model.num_ids=65", "--model.vocab_size=128"],
  ),
  "RoPE rotates pairs, but the head dim is 5": (
    ["--model.head_dim=5"],
    ["--model.head_dim=5", "--model.positions=learned"],
  ),
  "model.layer_pattern='LX'": (
    ["--model.layer_pattern=LX", "--model.window=8"],
    ["--model.layer_pattern=LG", "--model.window=8"],
  ),
  "model.layer_pattern has local layers, but there is no window": (
    ["--model.layer_pattern=LG"],
    ["--model.layer_pattern=G"],
  ),
  "model.rope.fast_turns=1.0 is not more than model.rope.slow_turns=1.0": (
    ["--model.rope.scaling=llama3", "--model.rope.fast_turns=1"],
    ["--model.rope.scaling=llama3", "--model.rope.fast_turns=4"],
  ),
  "model.parallel=one_norm with model.norm_placement=post": (
    ["--model.parallel=one_norm", "--model.norm_placement=post"],
    ["--model.parallel=one_norm"],
  ),
  "model.moe.experts_per_token=5 is more than model.moe.num_experts=4": (
    ["--model.moe.experts_per_token=5", "--model.moe.num_experts=4"],
    ["--model.moe.experts_per_token=4", "--model.moe.num_experts=4"],
  ),
  "model.num_token_types and model.pooler are for encoders only": (
    ["--model.pooler=true"],
    ["--model.pooler=true", "--model.family=encoder", "--data.objective=masked"],
  ),
  "model.parallel is for transformers only": (
    ["--model.parallel=one_norm", "--model.family=rnn"],
    ["--model.family=rnn", "--model.norm=layernorm"],
  ),
  "model.family=rnn cannot learn data.objective=masked": (
    ["--model.family=rnn", "--data.objective=masked"],
    ["--model.family=rnn"],
  ),
  "data.source_len=512 is longer than model.context=256": (
    ["--data.source_len=512"],
    ["--data.source_len=512", "--model.context=512"],
  ),
  "sinusoidal positions need an even model.width, not 15": (
    ["--model.positions=sinusoidal", "--model.width=15", "--model.num_heads=5"],
    ["--model.positions=none", "--model.width=15", "--model.num_heads=5"],
  ),
  "data.seq_len=512 is longer than model.context=256": (
    ["--data.seq_len=512"],
    ["--data.seq_len=512", "--model.context=512"],
  ),
  "data.batch_size=16 is not a multiple of training.accumulation_steps=3": (
    ["--training.accumulation_steps=3"],
    ["--training.accumulation_steps=4"],
  ),
  "name='a/b' is not a plain directory name": (["--name=a/b"], ["--name=a-b"]),
  "name='..' is not a plain directory name": (["--name=.."], ["--name=..."]),
}


@pytest.mark.parametrize("cause", CONTRADICTIONS)
def test_contradictions_are_named(cause: str):
  wrong, right = CONTRADICTIONS[cause]
  assert cause in refusal(*wrong).cause
  check_config(override(Config(), right))


INTEGERS = [name for name, kind, _ in knobs(ModelConfig) if "int" in str(kind)]


@given(st.dictionaries(st.sampled_from(INTEGERS), st.integers(-3, 3), min_size=1))
def test_any_small_numbers_are_a_model_or_refused(numbers: dict[str, int]):
  """What is out of bounds does not break the checks of how fields go together."""
  with contextlib.suppress(ConfigError):
    check_config(override(Config(), [f"--model.{n}={x}" for n, x in numbers.items()]))


def test_a_contradiction_is_cured_by_its_cure():
  error = refusal("--data.seq_len=512")
  for cure in error.cure.removeprefix("set ").split(" or "):
    check_config(override(override(Config(), ["--data.seq_len=512"]), [cure]))


@pytest.mark.parametrize("positions", ["rope", "none"])
@pytest.mark.parametrize(("width", "num_heads"), [(100, 8), (102, 8), (1, 3), (16, 5)])
def test_the_nearest_width_is_one_that_works(width: int, num_heads: int, positions: str):
  rest = [f"--model.num_heads={num_heads}", f"--model.positions={positions}"]
  error = refusal(f"--model.width={width}", *rest)
  nearest = int(error.cure.split("nearest width: ")[1].split(",")[0])
  check_config(override(Config(), [f"--model.width={nearest}", *rest]))
  assert abs(nearest - width) <= 2 * num_heads


@pytest.mark.parametrize(
  "mesh",
  [
    {"data": 0},
    {"model": 2},
    {"data": -1, "fsdp": -1},
    {"data": "two@dcn"},
    {"data": "2@"},
    {"data": "0@dcn"},
    {"data": "-1@dcn", "fsdp": -1},
  ],
)
def test_a_mesh_of_a_config_file_is_checked_too(mesh: dict[str, int | str]):
  with pytest.raises(ConfigError, match="mesh"):
    check_config(Config(mesh=mesh))


@pytest.mark.parametrize("field", ["training.num_steps", "model.width", "model.vocab_size"])
def test_a_number_too_large_for_a_float_is_refused_or_taken(field: str):
  with pytest.raises(ConfigError) as caught:
    check_config(override(Config(), [f"--{field}=1{'0' * 400}", "--seed=-1"]))
  assert "seed is -1" in caught.value.cause


@pytest.mark.parametrize(
  "text", [f"data={'9' * 5000}", "data=--2", "data=-", "data=²"], ids=lambda text: text[:9]
)
def test_a_mesh_size_that_is_no_number(text: str):
  with pytest.raises(ConfigError, match="mesh"):
    parse_mesh(text)


def test_an_empty_name_is_no_directory():
  assert "name=''" in refusal("--name=").cause


# What a Python file can hold and a command line cannot: values of the wrong type.
WRONG_TYPES = {
  "model.depth": Config(model=ModelConfig(depth="4")),  # type: ignore[arg-type]
  "model.width": Config(model=ModelConfig(width="128")),  # type: ignore[arg-type]
  "model.positions": Config(model=ModelConfig(positions="RoPE")),  # type: ignore[arg-type]
  "model.gated": Config(model=ModelConfig(gated="yes")),  # type: ignore[arg-type]
  "training.num_steps": Config(training=TrainingConfig(num_steps=1e3)),  # type: ignore[arg-type]
  "data.corpus": Config(data=DataConfig(corpus=Path("x"))),  # type: ignore[arg-type]
  "mesh": Config(mesh="data=8"),  # type: ignore[arg-type]
  "seed": Config(seed=None),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", WRONG_TYPES)
def test_a_value_of_the_wrong_type_in_a_config_file_is_named(name: str):
  with pytest.raises(ConfigError, match=name):
    check_config(WRONG_TYPES[name])


# -- JSON ----------------------------------------------------------------------------------


def values(kind: Any, field: dataclasses.Field) -> st.SearchStrategy:
  """Values of a field, within its bounds."""
  if typing.get_origin(kind) is UnionType:
    return st.none() | values(typing.get_args(kind)[0], field)
  if typing.get_origin(kind) is Literal:
    return st.sampled_from(typing.get_args(kind))
  if typing.get_origin(kind) is Mapping:
    size = st.integers(1, 64)
    size |= size.map(lambda number: f"{number}@dcn")
    sizes = st.dictionaries(st.sampled_from(MESH_AXES), size, min_size=1)
    return sizes.map(lambda mesh: mesh | {next(iter(mesh)): -1}) | sizes
  low, high = field.metadata["low"], field.metadata["high"]
  if kind is bool:
    return st.booleans()
  if kind is int:
    return st.integers(low, high if high is not None else 10**12)
  if kind is float:
    return st.floats(low, high, allow_nan=False, allow_infinity=False)
  # Text that begins with -- is a flag, and "none" spelled out is None.
  return st.text(st.characters(exclude_categories=["Cs"])).filter(
    lambda text: text.lower() != "none" and not text.startswith("--")
  )


def spelled(value: Any) -> str:
  """How the command line spells a value."""
  if isinstance(value, dict):
    return ",".join(f"{axis}={size}" for axis, size in value.items())
  return str(value).lower() if value is None or isinstance(value, bool) else str(value)


@st.composite
def overrides(draw: Any) -> dict[str, Any]:
  names = draw(st.lists(st.sampled_from(sorted(LEAVES)), unique=True, max_size=12))
  return {name: draw(values(*LEAVES[name])) for name in names}


@settings(max_examples=80)
@given(changes=overrides(), together=st.booleans())
def test_any_override_arrives_and_survives_json(changes: dict, together: bool):
  arguments = []
  for name, value in changes.items():
    pair = [f"--{name}", spelled(value)]
    arguments += ["=".join(pair)] if together else pair
  cfg = override(Config(), arguments)
  assert {name: value_of(cfg, name) for name in changes} == changes
  assert set(difference(Config(), cfg)) <= set(changes)
  assert from_json(to_json(cfg), "text") == cfg


SAMPLE = to_json(Config(name="a", mesh={"data": "2@dcn", "fsdp": -1}))
JSON_VALUES = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
  lambda inner: (
    st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["model", "depth", "seed", "x"]), inner, max_size=3)
  ),
  max_leaves=6,
)


def is_refused_cleanly(text: str) -> None:
  try:
    cfg = from_json(text, "the file")
  except ConfigError as e:
    assert "the file is not a flaxlm config" in e.cause
  else:
    assert from_json(to_json(cfg), "again") == cfg or "NaN" in to_json(cfg)
    try:
      check_config(cfg)
    except ConfigError as e:
      assert e.cause


@settings(max_examples=100)
@given(data=st.data())
def test_damaged_json_is_a_config_or_a_config_error(data: Any):
  """Characters lost, doubled, changed, and parts repeated elsewhere."""
  text = SAMPLE
  for _ in range(data.draw(st.integers(1, 4))):
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 30)))
    other = data.draw(st.integers(0, len(text)))
    new = data.draw(
      st.sampled_from(["", "{", "}", "[", '"', ",", "1e999", "NaN", "-", "null", "\0"])
      | st.text(max_size=3)
      | st.just(text[other : other + 20])
    )
    text = text[:start] + new + text[end:]
  is_refused_cleanly(text)


@settings(max_examples=100)
@given(data=st.data())
def test_json_of_other_shapes_is_a_config_or_a_config_error(data: Any):
  """Valid JSON in which some value, at any depth, is replaced by some other value."""
  tree = json.loads(SAMPLE)
  path = data.draw(st.sampled_from(["", *tree, *LEAVES, "extra", "model.extra", "mesh.x"]))
  value = data.draw(JSON_VALUES)
  if not path:
    tree = value
  else:
    *parents, last = path.split(".")
    node = tree
    for parent in parents:
      node = node[parent]
    node[last] = value
  is_refused_cleanly(json.dumps(tree))


DEEP = ["[" * 100_000, '{"a":' * 100_000]
NO_CONFIGS = ["", "[", "[]", "null", "3", '"x"', "{}}", '{"x": 1}', '{"model": []}']
NO_CONFIGS += ['{"model": null}', '{"seed": true}', '{"seed": 1.0}', '{"mesh": 8}']


@pytest.mark.parametrize("text", DEEP + NO_CONFIGS, ids=lambda text: text[:15])
def test_what_is_no_config_is_refused(text: str):
  with pytest.raises(ConfigError, match="the file is not a flaxlm config"):
    from_json(text, "the file")


def test_a_key_that_is_there_twice_is_refused():
  with pytest.raises(ConfigError, match="seed"):
    from_json('{"seed": 1, "seed": 2}', "the file")


def test_missing_fields_take_their_defaults():
  assert from_json("{}", "the file") == Config()


# -- Config files --------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_load_check_and_travel(path: Path):
  cfg = load_config(str(path))
  check_config(cfg)
  assert cfg.name == path.stem
  assert from_json(to_json(cfg), "text") == cfg
  assert load_config(path.stem) == load_config(path.name) == cfg


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_tell_what_cost_expected_and_command(path: Path):
  text = path.read_text("utf-8")
  for heading in ("What:", "Cost:", "Expected:", "Command:"):
    assert heading in text


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_copy_of_a_shipped_config_works_in_any_folder(path: Path, tmp_path, monkeypatch):
  """People begin from one; it needs the installed package and none of its neighbours."""
  copy = tmp_path / path.name
  copy.write_bytes(path.read_bytes())
  monkeypatch.chdir(tmp_path)
  assert load_config(str(copy)) == load_config(str(path))
  for node in ast.walk(ast.parse(path.read_text("utf-8"))):
    assert not isinstance(node, ast.Import)
    if isinstance(node, ast.ImportFrom):
      assert node.level == 0
      assert str(node.module).split(".")[0] in {"flaxlm", *sys.stdlib_module_names}


def test_a_card_needs_the_size_of_its_vocabulary():
  with pytest.raises(ConfigError, match="no vocab_size"):
    card(model=ModelConfig(), data=DataConfig(), optimizer=OptimizerConfig(), num_steps=1)


def test_a_missing_config_gets_a_near_name():
  with pytest.raises(ConfigError, match="no config file 'stdlib_tni'") as caught:
    load_config("stdlib_tni")
  assert caught.value.cure == "did you mean stdlib_tiny?"
  with pytest.raises(ConfigError) as caught:
    load_config("some/where/stdlib-tiny.py")
  assert caught.value.cure == "did you mean stdlib_tiny?"
  with pytest.raises(ConfigError) as caught:
    load_config("zzz")
  assert all(path.stem in caught.value.cure for path in SHIPPED)


@pytest.mark.parametrize("name", ["", ".", "/", "configs", "\0", "x" * 300])
def test_what_can_be_no_file_is_no_config(name: str):
  with pytest.raises(ConfigError, match="no config file"):
    load_config(name)


@pytest.mark.parametrize(
  ("content", "complaint"),
  [
    (b"raise OSError('disk on fire')", "OSError: disk on fire"),
    (b"1 / 0", "ZeroDivisionError"),
    (b"config = (", "SyntaxError"),
    (b"import no_such_module_at_all", "ModuleNotFoundError"),
    (b"from flaxlm.config import *\nconfig = Config(dept=3)", "mine.py:2: Config has"),
    (b"import sys\nsys.exit(3)", "SystemExit"),
    (b"", "does not define `config = Config"),
    (b"config = {'model': 3}", "does not define `config = Config"),
    (b"Config = 3", "does not define `config = Config"),
    (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "SyntaxError"),
    (b"\xff\xfe" * 100, "SyntaxError"),
  ],
)
def test_a_config_file_that_fails(tmp_path: Path, content: bytes, complaint: str):
  path = tmp_path / "mine.py"
  path.write_bytes(content)
  with pytest.raises(ConfigError, match=str(path)) as caught:
    load_config(str(path))
  assert complaint in caught.value.cause


@pytest.mark.parametrize(
  ("line", "cause", "cure"),
  [
    ("Config(modle=3)", "Config has no field 'modle'", "did you mean model?"),
    ("ModelConfig(widht=3)", "ModelConfig has no field 'widht'", "did you mean width?"),
    (
      "Config(learning_rate=3)",
      "Config has no field 'learning_rate'",
      "did you mean learning_rate, a field of OptimizerConfig?",
    ),
    ("Config(zzz=3)", "Config has no field 'zzz'", "flaxlm train --help lists all"),
  ],
)
def test_a_misspelt_field_is_named_with_its_place(tmp_path, line, cause, cure):
  path = tmp_path / "mine.py"
  path.write_text(f"from flaxlm.config import *\n\nconfig = {line}\n")
  with pytest.raises(ConfigError) as caught:
    load_config(str(path))
  assert (caught.value.cause, caught.value.cure) == (f"{path}:3: {cause}", cure)


@pytest.mark.parametrize(
  ("argument", "complaint"),
  [
    ("--model.depth=100000", "model.depth is 100000"),
    ("--model.width=1e9", "model.width is 1000000000"),
    ("--model.rope.theta=1e39", "model.rope.theta is 1e+39"),
    ("--model.num-heads=999999999999", "model.num_heads is 999999999999"),
    ("--name=a\nb", "name is 'a\\nb'"),
    ("--name=a\x7f", "name is 'a\\x7f'"),
    ("--runs-dir=a\tb", "runs_dir is 'a\\tb'"),
    ("--training.sample-prompt=a\x00", "training.sample_prompt is 'a\\x00'"),
    (f"--name={'é' * 101}", "is not a plain directory name"),
  ],
)
def test_sizes_and_names_have_bounds(argument: str, complaint: str):
  error = refusal(argument)
  assert complaint in error.cause
  assert str(error).isprintable() or len(str(error).splitlines()) == 2


def test_a_prompt_may_have_several_lines():
  check_config(
    override(Config(), ["--training.sample-prompt=a\n\tb", f"--name={'é' * 99}"])
  )


@pytest.mark.parametrize("name", ["photo.png", "config.json", "config", "notes.txt"])
def test_a_file_that_is_no_python(tmp_path: Path, name: str):
  path = tmp_path / name
  path.write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
  with pytest.raises(ConfigError, match="is not a Python config file"):
    load_config(str(path))


def test_a_config_file_names_the_run_unless_it_says_otherwise(tmp_path: Path):
  path = tmp_path / "mine.py"
  path.write_text("from flaxlm.config import Config\nconfig = Config()\n")
  assert load_config(str(path)).name == "mine"
  path.write_text("from flaxlm.config import Config\nconfig = Config(name='other')\n")
  assert load_config(str(path)).run_dir == Path("runs/other")


# -- The command line ----------------------------------------------------------------------


def answer(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str]:
  """Exit code and stderr of a command that must not get as far as loading JAX's side."""
  code = cli.main(arguments)
  captured = capsys.readouterr()
  assert captured.out == ""
  return code, captured.err


@pytest.mark.parametrize(
  ("arguments", "complaint"),
  [
    (["train", "--modle.depth=3"], "did you mean --model.depth?"),
    (["train", "--model.depth=0"], "model.depth is 0"),
    (["train", "stdlib_tiny", "--model.depth", "0"], "model.depth is 0"),
    (["train", "stdlib_tiny.py", "--model.gated", "--seed=-1"], "seed is -1"),
    (["train", "stdlib_tiny", "extra", "--seed=3"], "got 'extra'"),
    (["train", "--mesh=data"], "'data' is not AXIS=SIZE"),
    (["infer", "--prompt=a", "--temperature=nan"], "temperature is nan"),
    (["infer", "--prompt=a", "--min-p=2"], "min-p is 2"),
    (["infer", "--prompt=a", "--seed=-1"], "seed is -1"),
    (["infer", "--prompt=a", "--topp=1"], "did you mean --top-p?"),
    (["infer", "--prompt=a", "--top_pp=1"], "did you mean --top-p?"),
    (["plan", "--devcie=h100"], "did you mean --device?"),
    (["serve", "--draft=ngram"], "flaxlm serve --help"),  # --port is nothing like it
    (["tokenizer", "train", "--vocabsize=300"], "did you mean --vocab-size?"),
    (["tokenizer", "train", "--kind=words"], "argument --kind: invalid choice: 'words'"),
    (["infer", "--prompt=a", "--num-samples=1000000000"], "num-samples is 1000000000"),
    (["launch", "--processes=1000000000", "--", "train"], "processes is 1000000000"),
    (["eval", "--batches=0"], "batches is 0"),
  ],
)
def test_mistakes_on_the_command_line_cost_two_lines_and_exit_2(
  capsys: pytest.CaptureFixture, arguments: list[str], complaint: str
):
  code, message = answer(capsys, *arguments)
  assert code == 2
  assert message.startswith("flaxlm: ")
  assert complaint in message
  assert len(message.splitlines()) <= 2


@pytest.mark.parametrize("spelling", [["--model.depth", "0"], ["--model.depth=0"]])
def test_the_default_config_takes_both_spellings(capsys, spelling: list[str]):
  code, message = answer(capsys, "train", *spelling)
  assert (code, message.splitlines()[0]) == (2, "flaxlm: model.depth is 0")


def test_no_name_is_the_config_files_name(flaxlm, tmp_path: Path):
  (tmp_path / "text.txt").write_text("To be, or not to be. " * 99)
  result = flaxlm(
    *("train", "stdlib_tiny", "--name=none", "--checkpoint.resume=must"),
    *("--tokenizer.kind=byte", "--data.corpus=files:text.txt", "--data.seq_len=4"),
    *("--data.batch_size=1", "--simulated_devices=1"),
  )
  assert result.returncode == 4
  assert result.stderr.splitlines()[-2] == (
    "flaxlm: runs/stdlib_tiny has no checkpoint to resume from"
  )


def test_a_mistake_is_told_before_anything_is_loaded(tmp_path: Path):
  """As for a user: a fresh process, which ends with exit code 2 and no traceback."""
  result = subprocess.run(
    [sys.executable, "-m", "flaxlm.cli", "train", "--modle.depth=3"],
    cwd=tmp_path,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=20,
  )
  assert (result.returncode, result.stdout) == (2, "")
  assert result.stderr.splitlines() == [
    "flaxlm: unknown option --modle.depth",
    "  did you mean --model.depth?",
  ]
  assert list(tmp_path.iterdir()) == []


def test_a_sample_prompt_is_for_what_its_config_learns():
  """It is code in the default config, and no conversation begins so."""
  prompt = lambda *more: read_config([*more]).training.sample_prompt
  assert prompt() == "def __init__(self"
  assert prompt("--data.objective=chat") == ""
  assert prompt("--data.objective=chat", "--training.sample-prompt=Hi") == "Hi"
