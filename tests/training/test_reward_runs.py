# SPDX-License-Identifier: Apache-2.0
"""Runs that learn from rewards: a model taught small sums gets better at them by itself."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import commands_started, tiny

pytestmark = pytest.mark.slow

SUMS = [(f"{a}+{b}", str(a + b)) for a in range(8) for b in range(8)]
LEARNS = {
  "data__objective": "reward",
  "data__seq_len": 32,
  "data__batch_size": 32,
  "reward__max_new_tokens": 4,
  "training__num_steps": 4,
  "training__eval_every_steps": 2,
  "checkpoint__every_steps": 2,
  "optimizer__schedule": "constant",
  "optimizer__warmup_steps": 1,
  "optimizer__weight_decay": 0.0,
}


def write(folder: Path, key: str, **more: Any) -> str:
  """The corpus of all sums, of which the held out ones are the same."""
  folder.mkdir(exist_ok=True)
  lines = [json.dumps({"prompt": p, key: a, **more}) + "\n" for p, a in SUMS]
  for split in ("train", "validation"):
    (folder / f"{split}.jsonl").write_text("".join(lines))
  return f"files:{folder}/*.jsonl"


def metrics(run: Path, name: str) -> list[float]:
  lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
  return [line[name] for line in lines if name in line]


@pytest.fixture(scope="module")
def taught(cache_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A folder with `runs/taught`, which knows some of the sums, and the questions."""
  folder = tmp_path_factory.mktemp("taught")
  corpus = write(folder / "lessons", "completion")
  write(folder / "asked", "answer")
  knobs: dict[str, Any] = {
    "data__objective": "chat",
    "data__seq_len": 64,
    "model__context": 64,
    "model__width": 64,
    "model__depth": 2,
    "training__num_steps": 60,
    "training__eval_every_steps": 60,
    "training__sample_prompt": "1+1",
    "optimizer__learning_rate": 4e-3,
    "optimizer__warmup_steps": 10,
    "checkpoint__every_steps": 60,
  }
  run = commands_started(folder, cache_root)
  done = run("train", *tiny(corpus, name="taught", **knobs))
  assert done.returncode == 0, done.stderr
  return folder


def learning(name: str, *arguments: str, **knobs: Any) -> list[str]:
  """Trains from `taught` by rewards."""
  sizes = tiny("files:asked/*.jsonl", name=name, **LEARNS | knobs)
  sizes = [size for size in sizes if not size.startswith(("--model.", "--tokenizer."))]
  return ["train", "--init=taught", *sizes, *arguments]


@pytest.fixture
def learn(
  taught: Path, in_process: Callable[..., Any], tmp_path: Path
) -> Callable[..., Any]:
  """Runs `learning`; the current folder has what that needs."""
  shutil.copytree(taught, tmp_path, dirs_exist_ok=True)
  return lambda *arguments, **knobs: in_process(*learning(*arguments, **knobs))


@pytest.mark.usefixtures("learn", "compiled_for_users")
def test_the_accuracy_rises(flaxlm: Any, tmp_path: Path):
  """That of the likeliest answers to all sums; an evaluation afterwards finds the same.
  From 0.31 to between 0.77 and 0.91 for three seeds: rounding, which differs between
  processors, changes what is drawn as a seed does."""
  knobs: dict[str, Any] = {
    "data__batch_size": 128,
    "optimizer__learning_rate": 2e-3,
    "training__num_steps": 150,
    "training__eval_every_steps": 50,
    "training__log_every_steps": 50,
    "checkpoint__every_steps": 150,
  }
  done = flaxlm(*learning("rewarded", **knobs))
  assert done.returncode == 0, done.stderr
  run = tmp_path / "runs" / "rewarded"
  accuracy = metrics(run, "eval/accuracy")
  assert accuracy[-1] >= accuracy[0] + 0.25, accuracy
  rewards = metrics(run, "train/reward")
  assert rewards[-1] > rewards[0] and "reward " in done.stderr
  assert "64 prompts to learn from, 64 held out" in done.stderr
  assert "asked in the chat template" in done.stderr and " => " in done.stdout
  for name in ("telling_groups", "completion_tokens", "ended_completions"):
    assert len(metrics(run, f"train/{name}")) == 3
  found = json.loads(flaxlm("eval", "runs/rewarded", "--json").stdout)
  assert found["eval/accuracy"] == found["eval/reward"] == accuracy[-1]
  assert found["questions"] == 64
  told = flaxlm("eval", "runs/rewarded", "--corpus=files:asked/train.jsonl").stdout
  assert "of the answers right; 64 questions" in told


def test_a_run_goes_on_where_it_was_killed(learn: Callable[..., Any], tmp_path: Path):
  """Bit for bit, also in what is drawn."""
  assert learn("whole").returncode == 0
  run, killed = tmp_path / "runs" / "whole", tmp_path / "runs" / "killed"
  shutil.copytree(run, killed)
  shutil.rmtree(killed / "checkpoints" / "4")
  done = learn("killed")
  assert done.returncode == 0 and "resuming runs/killed at step 2" in done.stderr
  names = ("loss", "gradient_norm", "reward", "completion_tokens")
  for name in (*(f"train/{name}" for name in names), "eval/accuracy"):
    assert metrics(killed, name) == metrics(run, name) and metrics(run, name)
  asked = tmp_path / "asked" / "train.jsonl"
  asked.write_text(asked.read_text() + '{"prompt": "8+8", "answer": "16"}\n')
  done = learn("whole", training__num_steps=5)
  assert done.returncode == 4 and "is not what runs/whole was trained on" in done.stderr


def test_a_function_judges_on_a_mesh_with_adapters(
  learn: Callable[..., Any], in_process: Any, tmp_path: Path
):
  write(tmp_path / "asked", "hint", weight=2)
  (tmp_path / "short.py").write_text(
    "def short(questions, completions):\n"
    "  pairs = zip(questions, completions)\n"
    "  return [-q['weight'] * abs(len(c) - 1) for q, c in pairs]\n"
  )
  judged = ("--reward.function=short.py:short", "--lora.rank=2")
  judged += ("--mesh=data=2,fsdp=2,tensor=2",)
  done = learn("short", *judged, training__accumulation_steps=2)
  assert done.returncode == 0, done.stderr
  run = tmp_path / "runs" / "short"
  assert not metrics(run, "eval/accuracy")
  assert max(metrics(run, "eval/reward")) <= 0
  done = in_process("eval", "runs/short", "--json")
  assert json.loads(done.stdout)["eval/reward"] == metrics(run, "eval/reward")[-1]
  code = (tmp_path / "short.py").read_text().replace("- 1", "- 2")
  (tmp_path / "short.py").write_text(code)
  done = learn("short", *judged, training__accumulation_steps=2, training__num_steps=5)
  assert done.returncode == 4 and "is not what runs/short was trained on" in done.stderr


@pytest.mark.parametrize(
  ("body", "told"),
  [
    ("return [float('nan')] * len(c)", "validation.jsonl, line 1: bad.py:f gives"),
    ("return q[0]['level']", "bad.py:2: bad.py:f failed: KeyError: 'level'"),
  ],
)
def test_a_bad_reward_ends_a_run_with_one_line(
  learn: Callable[..., Any], tmp_path: Path, body: str, told: str
):
  (tmp_path / "bad.py").write_text(f"def f(q, c):\n  {body}\n")
  done = learn("bad", "--reward.function=bad.py:f")
  assert done.returncode == 3 and told in done.stderr
  assert "Traceback" not in done.stderr
