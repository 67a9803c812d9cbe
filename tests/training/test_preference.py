# SPDX-License-Identifier: Apache-2.0
"""Direct preference optimisation: the loss is that of the paper, and a model learns it."""

import functools
import itertools
import json
import math
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import reference_step
from conftest import commands_in_process, slow, tiny
from meshes import mesh_of
from parameters import float64_params
from test_chats import SIZES, metrics, random_store, write_talks

from flaxlm.config import (
  DataConfig,
  DpoConfig,
  LoraConfig,
  ModelConfig,
  OptimizerConfig,
  TrainingConfig,
)
from flaxlm.data.batches import Batches
from flaxlm.data.objectives import Batch
from flaxlm.nn.lora import abstract_adapters, freeze, init_adapters, merged
from flaxlm.nn.models import abstract_params, build_model
from flaxlm.training.optimizer import build_optimizer
from flaxlm.training.preference import preference_and_gradient
from flaxlm.training.step import (
  TrainState,
  abstract_state,
  jit_eval_step,
  jit_train_step,
  put_batch,
  shardings_of,
)

CFG = ModelConfig(**SIZES).resolve()
DPO = DpoConfig(beta=0.3)
# (tokens, how many of the last ones are the answer): chosen, rejected, chosen, ...
SHAPES = [
  *((9, 1), (12, 4), (16, 9), (8, 1), (2, 1), (2, 1), (5, 3), (4, 2)),
  *((3, 1), (20, 18), (7, 6), (6, 5), (11, 2), (13, 4), (15, 15 - 1), (15, 13)),
]
PAIRS = len(SHAPES) // 2


@functools.cache
def random_params(seed: int) -> Any:
  params = float64_params(build_model(CFG), seed)
  return jax.tree.map(lambda x: x.astype("f4"), params)


def test_the_models_pass_begins_when_the_reference_is_over():
  """Side by side, XLA would hold the logits of one beside the activations of the other: the
  ids that the model reads come out of a barrier, into which the reference's result goes."""
  model, params = build_model(CFG), random_params(0)
  ids = np.ones((2, 16), np.int32)
  batch = Batch(ids, ids, ids, ids, np.ones((2, 16), np.float32))
  of = functools.partial(preference_and_gradient, model, TrainingConfig(), DPO)
  jaxpr = jax.make_jaxpr(
    lambda *trees: of(trees[0], batch, jax.random.key(0), None, trees[1])
  )
  eqns = jaxpr(params, params).jaxpr.eqns
  [at] = [n for n, eqn in enumerate(eqns) if eqn.primitive.name == "optimization_barrier"]
  assert [x.aval.dtype for x in eqns[at].outvars] == [np.int32, np.float32]
  assert eqns[at].invars[1] in {x for eqn in eqns[:at] for x in eqn.outvars}
  read = {
    x
    for eqn in eqns[at + 1 :]
    for x in eqn.invars
    if isinstance(x, type(eqns[at].outvars[0]))
  }
  assert set(eqns[at].outvars) <= read
  heads = [n for n, eqn in enumerate(eqns) if CFG.vocab_size in eqn.outvars[0].aval.shape]
  assert heads and min(heads) < at < max(heads)


# -- The loss ------------------------------------------------------------------------------


def answers(params: Any) -> list[tuple[float, Any]]:
  """(nats, their gradient) of each answer in float64, each conversation by itself."""
  store, found = random_store(SHAPES), []
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  for start, end in itertools.pairwise(store.bounds.tolist()):
    ids = store.tokens[None, start:end].astype(np.int32)
    places = np.arange(end - start - 1)[None], np.ones((1, end - start - 1), np.int32)
    weights = store.weights[None, start + 1 : end].astype(np.float64)
    batch = Batch(ids[:, :-1], ids[:, 1:], *places, weights)
    kept = itertools.repeat(1.0)
    nats, gradient, _ = reference_step.loss_and_gradient(params, CFG, batch, kept, 0.0)
    found.append((nats, gradient))
  return found


def expected_of(params: Any, reference: Any, dpo: DpoConfig) -> dict[str, float]:
  """Means over pairs, by equation 7, and the norm of the gradient, by the chain rule."""
  sums = dict.fromkeys(
    ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward"), 0
  )
  gradient = jax.tree.map(np.zeros_like, params)
  own, others = answers(params), answers(reference)
  rewards = [dpo.beta * (other - nats) for (nats, _), (other, _) in zip(own, others)]  # noqa: B905
  for pair in range(PAIRS):
    chosen, rejected = rewards[2 * pair : 2 * pair + 2]
    margin = chosen - rejected
    sums["loss"] += math.log1p(math.exp(-margin))
    sums["accuracy"] += margin > 0
    sums["margin"] += margin
    sums["chosen_reward"] += chosen
    sums["rejected_reward"] += rejected
    right = 1 / (1 + math.exp(-margin))
    slope = dpo.beta * (right - 1 + dpo.label_smoothing)
    (_, up), (_, down) = own[2 * pair : 2 * pair + 2]
    gradient = jax.tree.map(lambda g, u, d: g + slope * (d - u), gradient, up, down)
  squares = sum(np.sum((g / PAIRS) ** 2) for g in jax.tree.leaves(gradient))
  means = {name: value / PAIRS for name, value in sums.items()}
  return means | {"gradient_norm": float(squares**0.5)}


@functools.cache
def expected(label_smoothing: float = 0.0) -> dict[str, float]:
  dpo = DpoConfig(beta=DPO.beta, label_smoothing=label_smoothing)
  return expected_of(random_params(1), random_params(2), dpo)


def the_batch(seq_len: int, batch_size: int) -> Batch:
  data = DataConfig(objective="preference", seq_len=seq_len, batch_size=batch_size)
  batches = Batches(random_store(SHAPES), data, vocab_size=64)
  assert batches.num_batches == 1 and not batches.notes
  return batches[0]


def measured(
  batch: Batch, training: TrainingConfig, dpo: DpoConfig, axes: dict[str, int]
) -> dict[str, float]:
  model, mesh = build_model(CFG, training), mesh_of(**axes)
  optimizer = build_optimizer(OptimizerConfig(), 1)
  abstract = abstract_state(model, optimizer, mesh, has_reference=True)
  params, reference = random_params(1), random_params(2)
  state = TrainState(np.int32(0), params, optimizer.init(params), None, reference)
  state = jax.device_put(state, shardings_of(abstract))
  step = jit_train_step(model, optimizer, training, mesh, dpo=dpo)
  after, metrics = step(state, put_batch(batch, mesh), 0)
  same = lambda a, b: np.testing.assert_array_equal(a, b)
  jax.tree.map(same, after.reference, reference)
  return {name: float(value) for name, value in metrics.items()}


@pytest.mark.parametrize(
  ("axes", "accumulation_steps", "seq_len", "batch_size", "chunks", "smoothing"),
  [
    ({}, 1, 40, 8, 1, 0.0),
    ({}, 2, 63, 4, 3, 0.2),
    slow({"data": 2}, 2, 63, 4, 1, 0.0),
    slow({"fsdp": 2, "data": 2}, 2, 40, 8, 2, 0.0),
    slow({"context": 2, "tensor": 2}, 1, 48, 8, 1, 0.0),
    slow({"data": 8}, 1, 30, 16, 1, 0.1),
  ],
)
def test_the_loss_is_the_mean_over_pairs(
  axes: dict[str, int],
  accumulation_steps: int,
  seq_len: int,
  batch_size: int,
  chunks: int,
  smoothing: float,
):
  """Of all rows together, though some have one pair and others three, and rows of padding
  none; whatever the packing, the mesh and the micro-batches."""
  batch = the_batch(seq_len, batch_size)
  assert len({*(batch.segments_BT.max(1) // 2).tolist()}) > 1
  dpo = DpoConfig(beta=DPO.beta, label_smoothing=smoothing)
  training = TrainingConfig(accumulation_steps=accumulation_steps, loss_chunks=chunks)
  found, wanted = measured(batch, training, dpo, axes), expected(smoothing)
  assert wanted.keys() <= found.keys()
  for name, value in wanted.items():
    np.testing.assert_allclose(found[name], value, rtol=3e-5, atol=2e-6, err_msg=name)


def test_an_evaluation_has_the_same_figures():
  model, mesh = build_model(CFG), mesh_of()
  batch = put_batch(the_batch(40, 8), mesh)
  step = jit_eval_step(model, mesh, DPO)
  sums = step(random_params(1), batch, random_params(2))
  assert sums["pairs"] == PAIRS
  assert sums["tokens"] == sum(last for _, last in SHAPES)
  for name in ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward"):
    np.testing.assert_allclose(sums[name] / PAIRS, expected()[name], rtol=3e-5, atol=2e-6)


@pytest.mark.parametrize("base_weights", ["full", "int8"])
def test_adapters_are_compared_with_themselves_off(base_weights: Any):
  """A fresh one has a loss of log 2; later the loss is that of the merged parameters."""
  lora = LoraConfig(rank=2, targets="/(q|down)$", base_weights=base_weights)
  training, mesh = TrainingConfig(), mesh_of()
  model, optimizer = build_model(CFG, training), build_optimizer(OptimizerConfig(), 1)
  abstract = abstract_state(model, optimizer, mesh, lora, has_reference=True)
  assert abstract.reference is None
  place = lambda tree: jax.device_put(tree, shardings_of(abstract_params(model, mesh)))
  base = place(random_params(2))
  frozen = freeze(dict(base), abstract.frozen, lora)
  fresh = init_adapters(abstract_adapters(model, lora, mesh), seed=0)
  rng = np.random.default_rng(3)
  learnt = jax.tree.map(lambda x: rng.normal(size=x.shape).astype("f4") / 4, fresh)
  step = jit_train_step(model, optimizer, training, mesh, lora, DPO)
  batch = put_batch(the_batch(40, 8), mesh)
  target = abstract_params(model, mesh)
  reference, now = (merged(frozen, part, target) for part in (fresh, learnt))
  wanted = expected_of(*map(jax.device_get, (now, reference)), DPO)
  kept = jax.device_get(frozen)
  for adapters, loss in ((fresh, math.log(2)), (learnt, wanted["loss"])):
    again = jax.device_put(kept, shardings_of(abstract.frozen))
    adapters = jax.device_put(adapters, shardings_of(abstract.params))
    state = TrainState(np.int32(0), adapters, optimizer.init(adapters), again)
    _, found = step(jax.device_put(state, shardings_of(abstract)), batch, 0)
    np.testing.assert_allclose(found["loss"], loss, rtol=3e-5, atol=2e-6)
    assert found["gradient_norm"] > 0
  np.testing.assert_allclose(found["margin"], wanted["margin"], rtol=1e-4)


# -- Runs ----------------------------------------------------------------------------------

Commands = Callable[..., Any]
THINGS = ("sky", "grass", "snow", "coal", "sea", "sand", "moss", "milk")
TALKS = {"model__context": 128, "data__seq_len": 96, "checkpoint__every_steps": 4}
LEARNS = {
  "data__objective": "preference",
  "training__num_steps": 8,
  "training__eval_every_steps": 4,
  "optimizer__warmup_steps": 0,
  "optimizer__learning_rate": 3e-3,
}


def preferences(count: int) -> list[dict[str, Any]]:
  """Of a polite and a rude answer the polite one is chosen."""
  draw = random.Random(0)
  pairs = []
  for n in range(count):
    thing = draw.choice(THINGS)
    polite, rude = f"{thing}, please", f"{thing}, go away"
    pairs.append({"prompt": f"{thing} {n}?", "chosen": polite, "rejected": rude})
  return pairs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
  return tmp_path_factory.mktemp("preferences")


@pytest.fixture(scope="module")
def commands(folder: Path) -> Iterator[Commands]:
  """Commands in a folder with preferences and a run that has learnt both answers."""
  with commands_in_process(folder / "data") as run, pytest.MonkeyPatch.context() as patch:
    patch.chdir(folder)
    pairs = preferences(120)
    write_talks(folder / "pairs.jsonl", [*pairs, LONG, LONG])
    talks = [
      {"prompt": pair["prompt"], "completion": pair[answer]}
      for pair in pairs
      for answer in ("chosen", "rejected")
    ]
    corpus = write_talks(folder / "talks.jsonl", talks)
    knobs = TALKS | {
      "data__objective": "chat",
      "training__num_steps": 40,
      "training__eval_every_steps": 40,
      "checkpoint__every_steps": 40,
      "optimizer__learning_rate": 5e-3,
      "model__width": 32,
    }
    done = run("train", *tiny(corpus, name="base", **knobs))
    assert done.returncode == 0, done.stderr
    yield run


LONG = {"prompt": "x" * 200, "chosen": "y", "rejected": "z"}


def asked(name: str, **knobs: Any) -> list[str]:
  """Arguments of a run that begins from the base, and says nothing of its model."""
  given = tiny("files:pairs.jsonl", name=name, init="base", **TALKS | LEARNS | knobs)
  return [one for one in given if not one.startswith(("--model.", "--tokenizer."))]


LORA = {"lora__rank": 4, "optimizer__learning_rate": 1e-2}
KINDS = [pytest.param({}, id="all"), pytest.param(LORA, id="lora")]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_chosen_is_learnt(commands: Commands, folder: Path, kind: dict[str, Any]):
  """Held-out pairs are put in order, by more and more. A killed run goes on, bit for bit,
  and an evaluation finds what training found."""
  name = f"polite{len(kind)}"
  done = commands("train", *asked(name, **kind))
  assert done.returncode == 0, done.stderr
  assert "pairs of more than 97 tokens: 2 dropped" in done.stderr
  assert "of the pairs in the right order" in done.stderr
  assert ("as many of the reference" in done.stderr) is not bool(kind)
  run, killed = folder / "runs" / name, folder / "runs" / f"{name}-killed"
  losses, margins = metrics(run, "train/loss"), metrics(run, "eval/margin")
  assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
  assert metrics(run, "train/accuracy")[0] == 0
  assert losses[-1] < 0.6 and 0 < margins[0] < margins[-1]
  assert metrics(run, "eval/accuracy")[-1] > 0.9
  assert not metrics(run, "eval/perplexity")

  shutil.copytree(run, killed)
  shutil.rmtree(killed / "checkpoints" / "8")
  done = commands("train", *asked(killed.name, **kind))
  assert done.returncode == 0 and f"resuming runs/{killed.name} at step 4" in done.stderr
  for figure in ("train/loss", "train/gradient_norm", "train/margin", "eval/margin"):
    assert metrics(killed, figure) == metrics(run, figure)

  done = commands("eval", name, "--json")
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)
  for figure in ("eval/loss", "eval/margin", "eval/accuracy"):
    assert found[figure] == pytest.approx(metrics(run, figure)[-1], rel=1e-4)


@pytest.mark.slow
def test_it_cannot_go_on_without_what_it_began_from(commands: Commands, folder: Path):
  """It can be asked, though."""
  knobs = {"training__num_steps": 1, "checkpoint__every_steps": 1}
  done = commands("train", *asked("alone", **knobs))
  assert done.returncode == 0, done.stderr
  (folder / "runs" / "base").rename(folder / "gone")
  try:
    again = [one for one in asked("alone") if not one.startswith("--init")]
    for words in (["train", *again], ["eval", "alone"]):
      done = commands(*words)
      assert done.returncode == 4
      assert "runs/alone compares its preferences with" in done.stderr
      assert "it is gone" in done.stderr
    assert commands("infer", "alone", "--prompt=a", "--no-chat").returncode == 0
  finally:
    (folder / "gone").rename(folder / "runs" / "base")


@pytest.mark.parametrize(
  ("words", "code", "told"),
  [
    ([], 2, "compares with the run that training begins from"),
    (["--model.family=encoder"], 2, "cannot learn data.objective=preference"),
    (["--training.label-smoothing=0.1"], 2, "is of tokens, not of preferences"),
    (["--data.deduplicate=exact"], 2, "is for documents"),
    (["--dpo.beta=0"], 2, "dpo.beta is 0"),
    (["--dpo.label-smoothing=0.5"], 2, "dpo.label_smoothing is 0.5"),
  ],
)
def test_what_cannot_be_learnt(
  in_process: Callable[..., Any], tmp_path: Path, words: list[str], code: int, told: str
):
  corpus = write_talks(tmp_path / "pairs.jsonl", preferences(20))
  knobs = {"data__objective": "preference"}
  done = in_process("train", *tiny(corpus, **knobs), *words)
  assert done.returncode == code and told in done.stderr
