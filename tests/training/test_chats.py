# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning: the loss is that of answers alone, and a model learns them."""

import functools
import itertools
import json
import random
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import slow, tiny
from meshes import mesh_of
from parameters import float64_params, random_state, reference_loss_and_norm

from flaxlm.chat.templates import PLAIN, load_chat
from flaxlm.config import DataConfig, ModelConfig, OptimizerConfig, TrainingConfig
from flaxlm.data.batches import Batches
from flaxlm.data.objectives import Batch
from flaxlm.data.stores import TokenStore
from flaxlm.nn.models import build_model
from flaxlm.training.optimizer import build_optimizer
from flaxlm.training.step import jit_train_step, put_batch

ANSWERS = {"sky": "blue", "grass": "green", "snow": "white", "coal": "black"}


def write_talks(path: Path, talks: Iterable[dict[str, Any]]) -> str:
  """The corpus of a file of conversations."""
  path.parent.mkdir(exist_ok=True)
  path.write_text("".join(f"{json.dumps(talk)}\n" for talk in talks), "utf-8")
  return f"files:{path}"


def questions(count: int) -> list[dict[str, Any]]:
  """Conversations of one to three turns; half of those of one are prompts."""
  draw = random.Random(0)
  talks: list[dict[str, Any]] = []
  for _ in range(count):
    things = draw.sample([*ANSWERS], draw.choice([1, 1, 2, 3]))
    turns = [(f"{thing}?", ANSWERS[thing]) for thing in things]
    if len(turns) == 1 and draw.random() < 0.5:
      talks.append({"prompt": turns[0][0], "completion": turns[0][1]})
      continue
    roles = ("user", "assistant")
    messages = [
      {"role": role, "content": text}
      for turn in turns
      for role, text in zip(roles, turn, strict=True)
    ]
    talks.append({"messages": messages})
  return talks


def metrics(run: Path, name: str) -> list[float]:
  lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
  return [line[name] for line in lines if name in line]


# -- The loss ------------------------------------------------------------------------------

SIZES = dict(depth=1, width=8, num_heads=2, ffn_width=12, context=64, vocab_size=64)
CFG = ModelConfig(**SIZES).resolve()
# (tokens, how many of the last ones are an answer): from one token in 30 to nearly all.
SHAPES = [(30, 1), (6, 4), (28, 26), (3, 1), (9, 7), (25, 2), (4, 3), (12, 1), (31, 30)]


def random_store(shapes: Sequence[tuple[int, int]] = SHAPES) -> TokenStore:
  """Conversations of so many tokens, of which the last ones are an answer."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(1, 64, sum(size for size, _ in shapes)).astype(np.uint16)
  weights = np.concatenate([np.arange(size) >= size - last for size, last in shapes])
  bounds = np.cumsum([0, *(size for size, _ in shapes)])
  about = (bounds, 0, 64, len(tokens), None)
  return TokenStore(tokens, *about, weights=weights.astype(np.uint8))


@functools.cache
def expected_loss() -> tuple[float, float]:
  """(the loss, the norm of its gradient) in float64, each conversation by itself."""
  store, batches = random_store(), []
  for start, end in itertools.pairwise(store.bounds.tolist()):
    ids = store.tokens[None, start:end].astype(np.int32)
    places = np.arange(end - start - 1)[None], np.ones((1, end - start - 1), np.int32)
    weights = store.weights[None, start + 1 : end].astype(np.float64)
    batches.append(Batch(ids[:, :-1], ids[:, 1:], *places, weights))
  count = sum(batch.weights_BT.sum() for batch in batches)
  params = float64_params(build_model(CFG))
  return reference_loss_and_norm(params, CFG, batches, count)


@pytest.mark.parametrize(
  ("axes", "accumulation_steps", "seq_len", "batch_size"),
  [
    ({}, 1, 31, 8),
    slow({"data": 2}, 2, 63, 4),
    slow({"fsdp": 2, "data": 2}, 2, 40, 8),
    slow({"data": 8}, 1, 30, 16),
  ],
)
def test_the_loss_is_the_mean_over_the_answers_tokens(
  axes: dict[str, int], accumulation_steps: int, seq_len: int, batch_size: int
):
  """Of all rows together, though some have one such token and others thirty, and rows of
  padding none; whatever the packing, the mesh and the micro-batches."""
  data = DataConfig(objective="chat", seq_len=seq_len, batch_size=batch_size)
  batches = Batches(random_store(), data, vocab_size=64)
  assert batches.num_batches == 1
  batch = batches[0]
  assert len({*batch.weights_BT.sum(1).tolist()}) > 2 and not batch.weights_BT[-1].any()
  training = TrainingConfig(num_steps=1, accumulation_steps=accumulation_steps)
  model, mesh = build_model(CFG, training), mesh_of(**axes)
  optimizer = build_optimizer(OptimizerConfig(), 1)
  state = random_state(model, optimizer, mesh, float64_params(model))
  step = jit_train_step(model, optimizer, training, mesh)
  _, metrics = step(state, put_batch(batch, mesh), 0)
  loss, norm = expected_loss()
  np.testing.assert_allclose(metrics["loss"], loss, rtol=2e-5)
  np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=2e-5)


# -- Runs ----------------------------------------------------------------------------------

CHAT = {"data__objective": "chat", "model__context": 128, "data__seq_len": 96}


LONG = {"prompt": "x" * 200, "completion": "y"}


@pytest.mark.slow
def test_a_run_says_what_it_learns_and_keeps_the_template(
  in_process: Callable[..., Any], tmp_path: Path
):
  write_talks(tmp_path / "talks" / "train.jsonl", [*questions(60), LONG, LONG])
  write_talks(tmp_path / "talks" / "validation.jsonl", [*questions(5), LONG])
  corpus = f"files:{tmp_path / 'talks'}"
  knobs = CHAT | {"training__num_steps": 1, "training__eval_batches": 1}
  knobs |= {"training__sample_prompt": ""}
  done = in_process("train", *tiny(corpus, name="taught", **knobs))
  assert done.returncode == 0, done.stderr
  for split, count in (("train", 2), ("validation", 1)):
    dropped = f"{split}: conversations of more than 97 tokens: {count} dropped, for no"
    assert dropped in done.stderr
  # Without a prompt of its own it asks what was held out first.
  first = json.loads((tmp_path / "talks/validation.jsonl").read_text().splitlines()[0])
  asked = first["prompt"] if "prompt" in first else first["messages"][0]["content"]
  assert "carry loss" in done.stderr and f"{asked}\nassistant:" in done.stdout
  assert "--interactive" in done.stderr and "bits per byte" not in done.stderr
  chat = load_chat(tmp_path / "runs" / "taught")
  assert chat is not None and chat.templates == {"default": PLAIN}
  assert in_process("ckpt", "verify", "runs/taught").returncode == 0


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_killed(in_process: Callable[..., Any], tmp_path: Path):
  """Bit for bit; it is evaluated and asked by its template."""
  corpus = write_talks(tmp_path / "talks.jsonl", [*questions(60), LONG, LONG])
  knobs = CHAT | {"training__num_steps": 4, "checkpoint__every_steps": 2}
  done = in_process("train", *tiny(corpus, name="whole", **knobs))
  assert done.returncode == 0, done.stderr
  run, killed = tmp_path / "runs" / "whole", tmp_path / "runs" / "killed"
  shutil.copytree(run, killed)
  shutil.rmtree(killed / "checkpoints" / "4")
  done = in_process("train", *tiny(corpus, name="killed", **knobs))
  assert done.returncode == 0 and "resuming runs/killed at step 2" in done.stderr
  for name in ("train/loss", "train/gradient_norm", "eval/loss"):
    assert metrics(killed, name) == metrics(run, name)
  done = in_process("eval", "runs/whole", "--json")
  found = json.loads(done.stdout)
  assert found["eval/loss"] == pytest.approx(metrics(run, "eval/loss")[-1], rel=1e-6)
  # The end of a text has no bytes.
  assert "eval/bits_per_byte" not in found and 0 < found["bytes"] < found["tokens"]
  asks = ("infer", "runs/whole", "--interactive", "--max-new-tokens=4", "--system=x")
  done = in_process(*asks, input="a?")
  assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
  ("knobs", "code", "told"),
  [
    ({"model__family": "encoder"}, 2, "cannot learn data.objective=chat"),
    ({"data__deduplicate": "exact"}, 2, "is for documents"),
    ({"data__seq_len": 8}, 3, "no conversation has an answer in its first 9 tokens"),
  ],
)
def test_what_cannot_be_learnt(
  in_process: Callable[..., Any], tmp_path: Path, knobs: dict, code: int, told: str
):
  corpus = write_talks(tmp_path / "talks.jsonl", questions(20))
  done = in_process("train", *tiny(corpus, **CHAT | knobs))
  assert done.returncode == code and told in done.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_for_users")
def test_a_tiny_model_is_taught_to_answer(
  flaxlm: Callable[..., Any], in_process: Callable[..., Any], tmp_path: Path
):
  corpus = write_talks(tmp_path / "talks.jsonl", questions(200))
  knobs: dict[str, Any] = CHAT | {
    "model__width": 64,
    "model__depth": 2,
    "training__num_steps": 100,
    "training__eval_every_steps": 50,
    "training__sample_prompt": "snow?",
    "optimizer__learning_rate": 5e-3,
    "checkpoint__every_steps": 100,
  }
  done = flaxlm("train", *tiny(corpus, name="taught", **knobs))
  assert done.returncode == 0, done.stderr
  run = tmp_path / "runs" / "taught"
  losses = metrics(run, "eval/loss")
  assert losses[-1] < 0.05 < losses[0]
  assert not metrics(run, "eval/bits_per_byte")
  assert "snow? => white\n" in done.stdout
  talk = "".join(f"{thing}?\n" for thing in ANSWERS)
  done = in_process("infer", "runs/taught", "--interactive", "--temperature=0", input=talk)
  assert done.stdout.split() == [*ANSWERS.values()], done.stderr
