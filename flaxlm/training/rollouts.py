# SPDX-License-Identifier: Apache-2.0
"""Rollouts: completions that the model draws as it is now, and what they are worth.

The package's own decoder draws them, with the parameters of the step on the mesh of the
step. What is drawn is a function of the parameters, the seed and the step's number alone,
so that a run that was killed goes on as if it had not been.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from flaxlm.data.objectives import Batch
from flaxlm.data.questions import Question
from flaxlm.decoding.completions import Completion, complete_request
from flaxlm.decoding.loading import Run
from flaxlm.decoding.prefill import Request
from flaxlm.decoding.sampling import SamplingSettings
from flaxlm.nn.lora import jit_merge
from flaxlm.nn.models import abstract_params
from flaxlm.training.policy import advantages
from flaxlm.training.rewards import Judge, is_exact


class Writer:
  """Writes completions of questions with parameters that may change from call to call."""

  def __init__(self, run: Run):
    """The parameters of `run` are not read."""
    self.run = run
    self._merge: Callable[[Any], Any] = lambda params: params
    if run.cfg.lora.rank:
      self._merge = jit_merge(abstract_params(run.model, run.mesh))

  def __call__(
    self,
    params: Any,
    questions: Sequence[Question],
    settings: Sequence[SamplingSettings],
  ) -> list[Completion]:
    """A completion of each question, which ends with the end of text or is cut.

    `params` are those with which the model runs in training, adapters beside their base.
    """
    run = self.run._replace(params=self._merge(params))
    ids, most = [question.ids for question in questions], run.cfg.reward.max_new_tokens
    request = Request(ids, most, run.num_ids)
    wheres = [question.where for question in questions]
    return complete_request(run, request, wheres, settings)


class Rollouts(NamedTuple):
  """Makes the batch of a step of questions: asks, and has the answers judged."""

  writer: Writer
  judge: Judge

  def __call__(
    self, params: Any, step: int, questions: Sequence[Question]
  ) -> tuple[Batch, dict[str, float]]:
    """(the batch of the step after `step` steps, figures of what was drawn).

    Of each question a group of `reward.num_samples` is drawn. Raises `DataError` for what
    is wrong with a reward, and `NonFiniteError` if the logits are not finite.
    """
    cfg = self.writer.run.cfg
    K = cfg.reward.num_samples
    asked = [question for question in questions for _ in range(K)]
    settings = SamplingSettings(temperature=cfg.reward.temperature, seed=cfg.seed)
    first = step * len(questions)  # no draw of a run is that of another step
    drawn = self.writer(
      params,
      asked,
      [
        dataclasses.replace(settings, row=first + p, sample=k)
        for p in range(len(questions))
        for k in range(K)
      ],
    )
    rewards_B = self.judge.rewards(asked, [one.completion for one in drawn])
    values_PK, is_telling_P = advantages(rewards_B.reshape(-1, K))
    batch = rows_of(
      [question.ids for question in asked],
      [one.tokens for one in drawn],
      values_PK.reshape(-1),
      np.repeat(is_telling_P, K),
      cfg.data.seq_len,
    )
    return batch, {
      "reward": rewards_B.mean(),
      "telling_groups": is_telling_P.mean(),
      "completion_tokens": np.mean([len(one.tokens) for one in drawn]),
      "ended_completions": np.mean([one.finish_reason == "stop" for one in drawn]),
    }


def rows_of(
  prompts: Sequence[Sequence[int]],
  completions: Sequence[Sequence[int]],
  advantages_B: np.ndarray,
  is_telling_B: np.ndarray,
  seq_len: int,
) -> Batch:
  """A row for each completion after its prompt, of which its tokens are learnt.

  Groups whose rewards are all equal teach nothing: their rows are padding, and do not count
  in the mean.
  """
  shape = (len(prompts), seq_len)
  ids_BX = np.zeros((len(prompts), seq_len + 1), np.int32)
  segments_BT, weights_BT = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
  for row in np.flatnonzero(is_telling_B).tolist():
    prompt, completion = prompts[row], completions[row]
    start, end = len(prompt), len(prompt) + len(completion)
    ids_BX[row, :start], ids_BX[row, start:end] = prompt, completion
    segments_BT[row, : end - 1] = 1
    weights_BT[row, start - 1 : end - 1] = 1
  positions_BT = np.arange(seq_len, dtype=np.int32) * segments_BT
  return Batch(
    tokens_BT=ids_BX[:, :-1] * segments_BT,  # the last token is only predicted
    targets_BT=ids_BX[:, 1:],
    positions_BT=positions_BT,
    segments_BT=segments_BT,
    weights_BT=weights_BT,
    advantages_BT=np.broadcast_to(advantages_B[:, None], shape).astype(np.float32),
  )


class AnswerEvaluator(NamedTuple):
  """How good a model's likeliest answers to held-out questions are."""

  writer: Writer
  judge: Judge
  questions: Sequence[Question]
  num_batches: int | None = None  # of data.batch_size questions; None: all

  def __call__(
    self, params: Any, progress: Callable[[], None] = lambda: None
  ) -> dict[str, float]:
    """The mean reward and, where all answers are known, the share of right ones."""
    rewards, right = [], []
    for some in self._batches():
      greedy = [SamplingSettings(temperature=0)] * len(some)
      texts = [one.completion for one in self.writer(params, some, greedy)]
      rewards += self.judge.rewards(some, texts).tolist()
      right += [is_exact(q.answer, text) for q, text in zip(some, texts, strict=True)]
      progress()
    figures = {"eval/reward": float(np.mean(rewards))}
    if all(question.answer is not None for question in self.asked):
      figures["eval/accuracy"] = float(np.mean(right))
    return figures

  @property
  def asked(self) -> Sequence[Question]:
    size = self.writer.run.cfg.data.batch_size
    return self.questions[: self.num_batches and self.num_batches * size]

  def _batches(self) -> Iterator[Sequence[Question]]:
    size = self.writer.run.cfg.data.batch_size
    for start in range(0, len(self.asked), size):
      yield self.asked[start : start + size]
