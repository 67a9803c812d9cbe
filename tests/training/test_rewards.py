# SPDX-License-Identifier: Apache-2.0
"""Learning from rewards: advantages, the loss, what is drawn, and what judges it."""

import functools
from pathlib import Path
from typing import Any

import hypothesis
import jax
import numpy as np
import pytest
from conftest import slow
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from meshes import mesh_of
from parameters import float64_params, random_state, reference_loss_and_norm

from flaxlm.chat.templates import Talk
from flaxlm.config import (
  Config,
  DataConfig,
  ModelConfig,
  OptimizerConfig,
  RewardConfig,
  TrainingConfig,
)
from flaxlm.data.objectives import Batch
from flaxlm.data.questions import Question
from flaxlm.decoding.loading import Run
from flaxlm.errors import ConfigError, DataError
from flaxlm.nn.base import LanguageModel
from flaxlm.nn.models import abstract_params, build_model
from flaxlm.tokenizers import train_tokenizer
from flaxlm.training.logprobs import forward, target_logprobs
from flaxlm.training.loop import check_alone
from flaxlm.training.optimizer import build_optimizer
from flaxlm.training.policy import advantages
from flaxlm.training.rewards import Judge, load_judge
from flaxlm.training.rollouts import AnswerEvaluator, Rollouts, Writer, rows_of
from flaxlm.training.step import abstract_batch, jit_train_step, put_batch, shardings_of

SIZES = dict(depth=1, width=8, num_heads=2, ffn_width=12, context=64, vocab_size=64)
CFG = ModelConfig(**SIZES).resolve()

# -- Advantages ----------------------------------------------------------------------------

REWARDS = hnp.arrays(
  np.float64,
  hnp.array_shapes(min_dims=2, max_dims=2, min_side=2),
  elements=st.floats(-9, 9),
)


def test_advantages_by_hand():
  rewards_PK = np.array([[1.0, 0, 0, 1], [0.1, 0.1, 0.1, 0.1], [3, 1, 1, -1]])
  found = advantages(rewards_PK)
  expected_PK = [[0.5, -0.5, -0.5, 0.5], [0, 0, 0, 0], [2, 0, 0, -2]]
  np.testing.assert_allclose(found.values_PK, expected_PK, atol=1e-7)
  assert found.is_telling_P.tolist() == [True, False, True]


@hypothesis.given(REWARDS, st.integers(-4, 4))
def test_advantages_compare_within_a_group(rewards_PK: np.ndarray, shift: int):
  """They add up to 0; a group whose rewards are all equal has none, whatever they are."""
  found = advantages(rewards_PK)
  np.testing.assert_allclose(found.values_PK.sum(1), 0, atol=1e-5)
  moved = advantages(rewards_PK + shift)
  np.testing.assert_allclose(moved.values_PK, found.values_PK, atol=1e-5)
  same = np.array([len(set(group)) == 1 for group in rewards_PK.tolist()])
  np.testing.assert_array_equal(found.is_telling_P, ~same)
  assert not found.values_PK[same].any()


# -- Rows and their loss -------------------------------------------------------------------


def drawn() -> tuple[list[list[int]], list[list[int]], np.ndarray]:
  """Prompts, completions and rewards of four groups of four, of which one tells nothing."""
  rng = np.random.default_rng(0)
  ids = lambda size: rng.integers(1, 64, size).tolist()
  prompts = [prompt for size in (1, 9, 4, 20) for prompt in [ids(size)] * 4]
  completions = [ids(rng.integers(1, 12)) for _ in prompts]
  rewards_PK = rng.normal(size=(4, 4))
  rewards_PK[2] = 0.3
  return prompts, completions, rewards_PK


def the_batch(seq_len: int = 32) -> Batch:
  prompts, completions, rewards_PK = drawn()
  values_PK, is_telling_P = advantages(rewards_PK)
  telling_B = np.repeat(is_telling_P, 4)
  return rows_of(prompts, completions, values_PK.reshape(-1), telling_B, seq_len)


def test_a_row_has_the_weights_of_its_completion():
  prompts, completions, _ = drawn()
  batch = the_batch()
  for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
    learnt_T = batch.weights_BT[row] > 0
    size = len(prompt) + len(completion) - 1
    if 8 <= row < 12:  # the group whose rewards are all equal
      assert not learnt_T.any() and not batch.segments_BT[row].any()
      continue
    assert batch.targets_BT[row][learnt_T].tolist() == completion
    assert batch.tokens_BT[row, :size].tolist() == [*prompt, *completion][:-1]
    assert batch.segments_BT[row].sum() == size
    assert batch.positions_BT[row, :size].tolist() == [*range(size)]


@functools.cache
def expected() -> tuple[float, float]:
  """(the loss, the norm of its gradient) in float64, each completion by itself."""
  prompts, completions, rewards_PK = drawn()
  count, batches = 0, []
  for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
    group = rewards_PK[row // 4]
    if len(set(group.tolist())) == 1:
      continue
    ids = np.array([[*prompt, *completion]], np.int32)
    T = ids.shape[1] - 1
    places = np.arange(T)[None], np.ones((1, T), np.int32)
    is_learnt_T = np.arange(T) >= len(prompt) - 1
    advantage = group[row % 4] - np.mean(group)
    weights_BT = advantage * is_learnt_T[None]
    batches.append(Batch(ids[:, :-1], ids[:, 1:], *places, weights_BT))
    count += len(completion)
  params = float64_params(build_model(CFG))
  return reference_loss_and_norm(params, CFG, batches, count)


@pytest.mark.parametrize(
  ("axes", "accumulation_steps", "chunks"),
  [
    ({}, 2, 2),
    slow({"data": 2, "fsdp": 2, "tensor": 2}, 1, 1),
    slow({"data": 4, "context": 2}, 2, 1),
    pytest.param({"data": 8}, 2, 4, marks=pytest.mark.fuzz),
  ],
)
def test_the_loss_is_the_mean_over_the_tokens_that_were_drawn(
  axes: dict[str, int], accumulation_steps: int, chunks: int
):
  """Of the groups that tell something together, whatever the mesh and the micro-batches."""
  training = TrainingConfig(accumulation_steps=accumulation_steps, loss_chunks=chunks)
  model, mesh = build_model(CFG, training), mesh_of(**axes)
  optimizer = build_optimizer(OptimizerConfig(), 1)
  state = random_state(model, optimizer, mesh, float64_params(model))
  step = jit_train_step(model, optimizer, training, mesh)
  batch = put_batch(the_batch(), mesh)
  data = DataConfig(objective="reward", seq_len=32, batch_size=16)
  shapes = lambda batch: jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), batch)
  assert shapes(abstract_batch(data, mesh)) == shapes(batch)
  _, metrics = step(state, batch, 0)
  loss, norm = expected()
  np.testing.assert_allclose(metrics["loss"], loss, rtol=2e-5, atol=1e-6)
  np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=2e-5)


# -- What is drawn -------------------------------------------------------------------------


def questions(count: int) -> list[Question]:
  tokenizer = byte_tokenizer()
  return [
    Question(
      {"prompt": text, "answer": "x"},
      Talk([], None, f"q.jsonl, line {n}"),
      tuple(tokenizer.framed(tokenizer.encode(text), "prompt")),
    )
    for n, text in enumerate((f"{n} + {'1' * n}" for n in range(count)), 1)
  ]


@functools.cache
def byte_tokenizer() -> Any:
  return train_tokenizer("byte", [], 257)


@functools.cache
def world(**axes: int) -> tuple[Run, Any]:
  """A run of a random model, and its parameters."""
  tokenizer = byte_tokenizer()
  sizes = SIZES | dict(vocab_size=264, num_ids=tokenizer.vocab_size)
  mesh = mesh_of(**axes)
  cfg = Config(
    name="drawn",
    seed=3,
    model=ModelConfig(**sizes),
    data=DataConfig(objective="reward", seq_len=40, batch_size=16),
    reward=RewardConfig(num_samples=4, max_new_tokens=20),
  ).resolve(tokenizer.vocab_size)
  model = build_model(cfg.model)
  rng = np.random.default_rng(2)
  abstract = abstract_params(model, mesh)
  params = jax.tree.map(lambda x: (0.3 * rng.normal(size=x.shape)).astype("f4"), abstract)
  params = jax.device_put(params, shardings_of(abstract))
  return Run(Path("drawn"), cfg, tokenizer, 0, model, None, mesh), params


def lengths(questions: Any, completions: list[str]) -> list[int]:
  return [len(text.encode("utf-8", "replace")) for text in completions]


JUDGE = Judge(lengths, "lengths")


def rolled(step: int = 5, **axes: int) -> tuple[Batch, dict[str, float]]:
  run, params = world(**axes)
  return Rollouts(Writer(run), JUDGE)(params, step, questions(4))


def test_what_is_learnt_is_what_was_drawn():
  """The training pass gives each token the log-probability with which it was drawn."""
  run, params = world()
  writer, seen = Writer(run), []

  class Watched:
    run = writer.run

    def __call__(self, *arguments: Any) -> Any:
      seen.extend(found := writer(*arguments))
      return found

  batch, figures = Rollouts(Watched(), JUDGE)(params, 5, questions(4))  # type: ignore
  model: LanguageModel = run.model
  output = forward(model, params, batch, method="hidden")
  logprobs_BT = target_logprobs(model, params, output.value, batch.targets_BT)
  for row, one in enumerate(seen):
    learnt_T = batch.weights_BT[row] > 0
    if learnt_T.any():
      np.testing.assert_allclose(logprobs_BT[row][learnt_T], one.logprobs, atol=2e-5)
  rewards_PK = np.array(lengths(None, [one.completion for one in seen])).reshape(4, 4)
  values_PK, is_telling_P = advantages(rewards_PK.astype(float))
  np.testing.assert_allclose(batch.advantages_BT[:, 0], values_PK.reshape(-1))
  assert figures == {
    "reward": rewards_PK.mean(),
    "telling_groups": is_telling_P.mean(),
    "completion_tokens": np.mean([len(one.tokens) for one in seen]),
    "ended_completions": np.mean([one.finish_reason == "stop" for one in seen]),
  }


def test_what_is_drawn_follows_from_the_seed_and_the_step():
  first, again, other = rolled(5)[0], rolled(5)[0], rolled(6)[0]
  jax.tree.map(np.testing.assert_array_equal, first, again)
  assert (first.targets_BT != other.targets_BT).any()
  rows = {row.tobytes() for row in first.targets_BT}
  assert len(rows) == 16  # the samples of a question differ too


@pytest.mark.slow
def test_what_is_drawn_is_the_same_on_a_mesh():
  whole, parts = rolled(5), rolled(5, data=2, fsdp=2, tensor=2)
  jax.tree.map(np.testing.assert_array_equal, whole[0], parts[0])
  assert whole[1] == parts[1]


def test_an_evaluation_asks_for_the_likeliest_answers():
  run, params = world()
  asked = questions(6)
  evaluator = AnswerEvaluator(Writer(run), JUDGE, asked)
  found = evaluator(params)
  assert found["eval/accuracy"] == 0 and found == evaluator(params)
  unknown = [q._replace(fields={"prompt": q.fields["prompt"]}) for q in asked]
  assert "eval/accuracy" not in evaluator._replace(questions=unknown)(params)
  assert len(AnswerEvaluator(Writer(run), JUDGE, asked * 9, 2).asked) == 32


# -- What judges ---------------------------------------------------------------------------


def judged(tmp_path: Path, code: str, name: str = "f") -> np.ndarray:
  path = tmp_path / "reward.py"
  path.write_text(code)
  judge = load_judge(f"{path}:{name}")
  return judge.rewards(questions(2), ["a", "b"])


def test_a_function_of_the_user_judges(tmp_path: Path):
  code = (
    "import numpy as np\n"
    "def f(questions, completions):\n"
    "  assert [q['answer'] for q in questions] == ['x', 'x']\n"
    "  sizes = np.array([len(q['prompt']) for q in questions])\n"
    "  return sizes + [10 * (c == 'a') for c in completions]"
  )
  assert judged(tmp_path, code).tolist() == [14.0, 5.0]
  assert judged(tmp_path, "f = lambda q, c: [x == 'a' for x in c]").tolist() == [1.0, 0.0]


def test_the_known_answer_is_exact():
  judge = load_judge("exact")
  assert judge.rewards(questions(3), ["x", " x\n", "xx"]).tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(
  ("body", "told"),
  [
    ("return [1.0]", "reward.py:f returned 1 rewards for 2 completions"),
    ("return None", "reward.py:f returned None, which is no list"),
    ("return [0.0, float('nan')]", "q.jsonl, line 2: .*completion 'b' the reward nan"),
    ("return [float('inf'), 0]", "q.jsonl, line 1: .*completion 'a' the reward inf"),
    ("return [0, '1']", "q.jsonl, line 2: .* the reward '1'"),
    ("return [0, None]", "q.jsonl, line 2: .* the reward None"),
    ("return [0, 10**400]", "q.jsonl, line 2"),
    ("return 1 // 0", "reward.py:2: .*reward.py:f failed: ZeroDivisionError"),
    ("raise ValueError('a\\nb')", "reward.py:2: .* failed: ValueError: a$"),
    ("raise SystemExit(0)", "reward.py:2: .* failed: SystemExit: 0$"),
    ("return (1 // 0 for _ in questions)", "reward.py:2: .* failed: ZeroDivisionError"),
    ("return (1 + 'a' for _ in questions)", "reward.py:2: .* failed: TypeError"),
  ],
)
def test_rewards_that_are_none(tmp_path: Path, body: str, told: str):
  with pytest.raises(DataError, match=told) as raised:
    judged(tmp_path, f"def f(questions, completions):\n  {body}\n")
  assert "\n" not in raised.value.cause


@pytest.mark.parametrize(
  ("function", "code", "told"),
  [
    ("reward.py:f", "g = 1", "reward.py defines no function f"),
    ("reward.py:f", "f = 1", "reward.py defines no function f"),
    ("reward.py:f", "1 / 0", "reward.py:1: .* failed: ZeroDivisionError"),
    ("reward.py:f", "def f(:", "reward.py:1: .* failed: SyntaxError"),
    ("reward.py:f", "raise SystemExit(3)", "failed: SystemExit"),
    ("none.py:f", "", "none.py cannot be read: No such file"),
    ("reward.py", "", "is not exact, nor FILE.py:NAME"),
    ("reward.txt:f", "", "is not exact, nor FILE.py:NAME"),
    ("exakt", "", "is not exact, nor FILE.py:NAME"),
  ],
)
def test_functions_that_are_none(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, code: str, told: str
):
  monkeypatch.chdir(tmp_path)
  Path("reward.py").write_text(code)
  with pytest.raises(ConfigError, match=told) as raised:
    load_judge(function)
  assert "\n" not in raised.value.cause


# -- What is refused before anything starts ------------------------------------------------


@pytest.mark.parametrize(
  ("knobs", "told"),
  [
    ([], "for a model that answers some questions rightly already"),
    (["--data.batch-size=20"], "reward.num_samples=8"),
    (["--reward.max-new-tokens=256"], "leaves no room for a prompt in data.seq_len=256"),
    (["--training.label-smoothing=0.1"], "label_smoothing=0.1 has no meaning for rewards"),
    (["--model.family=encoder"], "cannot learn data.objective=reward"),
    (["--data.deduplicate=exact"], "is for documents"),
    (["--reward.num-samples=1", "--reward.temperature=0"], "num_samples is 1"),
  ],
)
def test_configs_that_are_refused(in_process: Any, knobs: list[str], told: str):
  done = in_process("train", "--data.objective=reward", *knobs)
  assert done.returncode == 2, done.stderr
  assert told in done.stderr


def test_several_processes_are_refused():
  cfg = Config(data=DataConfig(objective="reward"))
  check_alone(cfg, 1)
  check_alone(Config(), 2)
  with pytest.raises(ConfigError, match="draws in one process, and the job has 2"):
    check_alone(cfg, 2)
