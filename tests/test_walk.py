# SPDX-License-Identifier: Apache-2.0
"""The walks from the doors to the mathematics, which the doors and the README print.

Each arrow is a name that stands in the source of the function before it, so that grep
finds the way, and a run goes through all of them, so that it is the way.
"""

import ast
import functools
import itertools
import re
import sys
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT

from flaxlm.config import ModelConfig, TrainingConfig
from flaxlm.data.objectives import Windows, next_token
from flaxlm.decoding.engine import Engine
from flaxlm.decoding.requests import EngineRequest
from flaxlm.decoding.sampling import SamplingSettings
from flaxlm.nn.models import build_model, init_params
from flaxlm.training.logprobs import forward
from flaxlm.training.step import loss_and_gradient

# Modules below flaxlm/, and what to follow in each; a class stands for its `__call__`.
TO_THE_SOFTMAX = [
  ("cli", "main"),
  ("cli", "build_parser"),
  ("commands.train", "add_train"),
  ("commands.train", "run_train"),
  ("training.loop", "train"),
  ("training.program", "Compiler.start"),
  ("training.program", "build_program"),
  ("training.step", "jit_train_step"),
  ("training.step", "train_step"),
  ("training.step", "loss_and_gradient"),
  ("training.logprobs", "learning_pass"),
  ("nn.models", "Decoder.hidden"),
  ("nn.stack", "Stack"),
  ("nn.stack", "Stack.run_blocks"),
  ("nn.stack", "Stack.layers"),
  ("nn.block", "Block"),
  ("nn.block", "Block.attend"),
  ("nn.attention", "Attention"),
  ("nn.kernels.blocked", "attend_blocked"),
  ("nn.kernels.blocked", "mix"),
  ("nn.kernels.blocked", "mix_forward"),
]
TO_THE_TOKEN = [
  ("cli", "main"),
  ("cli", "build_parser"),
  ("commands.infer", "add_infer"),
  ("commands.infer", "run_infer"),
  ("commands.infer", "print_completions"),
  ("decoding.completions", "complete_samples"),
  ("decoding.completions", "complete"),
  ("decoding.completions", "complete_request"),
  ("decoding.completions", "grow_completions"),
  ("decoding.completions", "answer_all"),
  ("decoding.engine", "Engine.step"),
  ("decoding.engine", "Engine._start_block"),
  ("decoding.rows", "decode_rows"),
  ("decoding.rows", "draw_step"),
  ("decoding.drawing", "sample"),
  ("decoding.drawing", "next_token"),
  ("decoding.drawing", "draw"),
  ("decoding.drawing", "inverse_cdf"),
]
WALKS = {"train.py": TO_THE_SOFTMAX, "infer.py": TO_THE_TOKEN}
STEPS = [
  (before, after) for walk in WALKS.values() for before, after in itertools.pairwise(walk)
]


@functools.cache
def tree_of(module: str) -> ast.Module:
  path = ROOT / "flaxlm" / (module.replace(".", "/") + ".py")
  return ast.parse(path.read_text("utf-8"))


def find(body: list[ast.stmt], name: str) -> Any:
  """The class or function of this name; its absence fails the test."""
  kinds = (ast.FunctionDef, ast.ClassDef)
  found = [node for node in body if isinstance(node, kinds) and node.name == name]
  assert len(found) == 1, f"{len(found)} definitions of {name}"
  return found[0]


def source_of(module: str, name: str) -> ast.FunctionDef:
  """The function that a step of the walk names."""
  node: Any = tree_of(module)
  for part in name.split("."):
    node = find(node.body, part)
  return find(node.body, "__call__") if isinstance(node, ast.ClassDef) else node


def names_in(function: ast.AST) -> set[str]:
  """Names and attributes that a function reads, and methods that it asks Flax to apply."""
  found = set()
  for node in ast.walk(function):
    if isinstance(node, ast.Name):
      found.add(node.id)
    elif isinstance(node, ast.Attribute):
      found.add(node.attr)
    elif isinstance(node, ast.keyword) and node.arg == "method":
      assert isinstance(node.value, ast.Constant)
      found.add(node.value.value)
  return found


def submodules(module: str, name: str) -> dict[str, set[str]]:
  """{attribute: names that it is made of} of `self.attribute = ...` in the class."""
  made: dict[str, set[str]] = {}
  if not name[0].isupper():
    return made
  for node in ast.walk(find(tree_of(module).body, name.partition(".")[0])):
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
      made.setdefault(node.targets[0].attr, set()).update(names_in(node.value))
  return made


@pytest.mark.parametrize(("before", "after"), STEPS, ids=lambda step: ".".join(step))
def test_each_arrow_is_a_name_in_the_source_of_the_function_before(before, after):
  read = names_in(source_of(*before))
  source_of(*after)
  made = submodules(*before)
  reached = set().union(*(made[attribute] for attribute in made.keys() & read))
  wanted = after[1].rpartition(".")[2]
  assert wanted in read | reached, f"{'.'.join(before)} does not name {wanted}"


@pytest.mark.parametrize("door", WALKS)
def test_a_door_enters_by_main(door):
  assert "main" in names_in(ast.parse((ROOT / door).read_text("utf-8")))


def test_at_the_end_stand_the_softmax_and_the_draw():
  softmax, drawn = (names_in(source_of(*walk[-1])) for walk in WALKS.values())
  assert {"exp", "max", "sum"} <= softmax
  assert {"cumsum", "argmax"} <= drawn


def printed(walk: list[tuple[str, str]]) -> list[str]:
  """The walk as it is printed: the module where it changes."""
  shown, last = [], ""
  for module, name in walk:
    shown.append(name if module == last else f"{module}.{name}")
    last = module
  return shown


@pytest.mark.parametrize(
  ("page", "door"),
  [(page, door) for door in WALKS for page in (door, "README.md")],
)
def test_what_is_printed_is_the_walk(page, door):
  text = (ROOT / page).read_text("utf-8")
  arrows = re.findall(r"(`[\w.]+`(?:\s*->\s*`[\w.]+`)+)", text)
  walks = [re.findall(r"`([\w.]+)`", walk) for walk in arrows]
  assert [door, *printed(WALKS[door])] in walks


# -- It is the way that a run takes --------------------------------------------------------


def functions_run(action: Callable[[], Any]) -> set[tuple[str, str]]:
  """(module, qualified name) of each function of ours that runs meanwhile."""
  seen, package = set(), str(ROOT / "flaxlm") + "/"

  def note(frame: Any, event: str, _: Any) -> None:
    code = frame.f_code
    if event == "call" and code.co_filename.startswith(package):
      module = code.co_filename.removeprefix(package).removesuffix(".py")
      seen.add((module.replace("/", "."), code.co_qualname))

  jax.clear_caches()  # what is compiled already would not be traced
  before = sys.getprofile()
  sys.setprofile(note)
  try:
    action()
  finally:
    sys.setprofile(before)
  return seen


CFG = ModelConfig(depth=1, width=16, num_heads=2, vocab_size=64, context=32)


def take_a_step() -> None:
  """The loss and its gradient, traced as a training step traces them, and evaluation."""
  run = TrainingConfig()
  model = build_model(CFG, run)
  params = jax.eval_shape(lambda: nn.unbox(init_params(model, jnp.uint32(0))))
  windows = np.ones((2, 9), np.int32)
  batch = next_token(Windows(windows, windows == 0, np.full(2, 9)), end_id=0)
  jax.eval_shape(functools.partial(forward, model), params, batch)
  key = jax.eval_shape(lambda: jax.random.key(0))
  jax.eval_shape(functools.partial(loss_and_gradient, model, run), params, batch, key)


def draw_a_token() -> None:
  model = build_model(CFG)
  params = jax.jit(lambda: nn.unbox(init_params(model, jnp.uint32(0))))()
  engine = Engine(model, params, num_ids=64)
  settings = SamplingSettings(temperature=0.8)
  engine.submit(EngineRequest(prompt=[1, 2, 3], max_new_tokens=2, settings=settings))
  while not engine.is_idle:
    engine.step()


@pytest.mark.slow
@pytest.mark.parametrize(
  ("action", "first", "walk"),
  [
    (take_a_step, "loss_and_gradient", TO_THE_SOFTMAX),
    (draw_a_token, "Engine.step", TO_THE_TOKEN),
  ],
  ids=["step", "token"],
)
def test_a_run_goes_this_way(action, first, walk):
  names = [name for _, name in walk]
  run = functions_run(action)
  for module, name in walk[names.index(first) :]:
    name = f"{name}.__call__" if name.split(".")[-1][0].isupper() else name
    assert (module, name) in run, f"{module}.{name} does not run"
