# SPDX-License-Identifier: Apache-2.0
"""The settings of rows: only what needs the past of a row keeps it."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
from test_completions import BYTES
from test_generate import model_of

from flaxlm.decoding.compile_counter import count_compilations
from flaxlm.decoding.requests import EngineRequest, few_shapes
from flaxlm.decoding.row_settings import RowSettings
from flaxlm.decoding.rows import draw_first
from flaxlm.decoding.sampling import SamplingSettings


@pytest.mark.parametrize(
  ("settings", "needs_it"),
  [
    ({"temperature": 0.0}, False),
    ({"temperature": 0.7, "top_p": 0.5, "logit_bias": {3: 1.0}}, False),
    ({"presence_penalty": 1.0}, True),
    ({"repetition_penalty": 1.1, "temperature": 0.0}, True),
    ({"regex": "a+"}, True),
  ],
)
@pytest.mark.parametrize("few", [False, True], ids=["all", "few"])
def test_a_history_is_kept_only_for_rules_that_read_it(
  settings: dict[str, Any], needs_it: bool, few: bool
):
  """With few shapes always: whether it is read is known when a program runs."""
  cfg = model_of("gqa")[0].cfg
  shapes = few_shapes(cfg, 4) if few else None
  request = EngineRequest(
    prompt=[1], max_new_tokens=3, settings=SamplingSettings(**settings)
  )
  assert RowSettings(cfg, 64, shapes, BYTES).needs_history(request) == needs_it or few


def test_a_level_draws_what_its_rules_alone_draw():
  """One program for all settings; tokens that a rule must know of are in the history."""
  num_ids = BYTES.vocab_size
  cfg = dataclasses.replace(model_of("gqa")[0].cfg, vocab_size=320, num_ids=num_ids)
  rng = np.random.default_rng(0)
  logits_BV, lengths_B = rng.normal(size=(3, cfg.vocab_size)), np.array([3, 1, 2], np.int32)
  kinds: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.8},
    {"top_k": 3, "logit_bias": {5: 2.0}},
    {"repetition_penalty": 2.0, "presence_penalty": 1.5},
    {"regex": "[a-c]+"},
  ]
  for kind, num_top in itertools.product(kinds, (0, 2)):
    asked = [
      EngineRequest(
        prompt=[*range(n + 1)],
        max_new_tokens=3,
        num_top=num_top,
        settings=SamplingSettings(**kind, row=n),
      )
      for n in range(3)
    ]
    steps, histories = [], []
    for shapes in (None, few_shapes(cfg, 4)):
      settings = RowSettings(cfg, num_ids, shapes, BYTES)
      settings.admit(asked, [])
      history = None
      if any(map(settings.needs_history, asked)):
        history = settings.history_of(asked)
      left_B = np.full(3, 3, np.int32)
      drawing, static = settings.sampling_of(asked)
      rows, step = draw_first(logits_BV, lengths_B, left_B, history, drawing, static)
      histories.append(rows.history)
      steps.append(step)
    one, other = steps
    np.testing.assert_array_equal(one.tokens_TB, other.tokens_TB)
    np.testing.assert_array_equal(one.logprobs_TB, other.logprobs_TB)
    np.testing.assert_array_equal(one.top_tokens_TBX, other.top_tokens_TBX[..., :num_top])
    if histories[0] is not None:
      np.testing.assert_array_equal(histories[0].counts_BV, histories[1].counts_BV)
      assert histories[0].counts_BV.sum() == 3


def test_the_settings_of_a_batch_run_no_program():
  """On a CPU the many small ones of their arrays would go before those of the model."""
  given = [
    EngineRequest(prompt=[1], max_new_tokens=3, settings=SamplingSettings(row=row))
    for row in range(37)
  ]
  settings = RowSettings(model_of("gqa")[0].cfg, 64, None, BYTES)
  with count_compilations() as counter:
    settings.sampling_of(given)
  assert not counter.names
