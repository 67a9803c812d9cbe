# SPDX-License-Identifier: Apache-2.0
"""The settings of rows: only what needs the past of a row keeps it."""

from typing import Any

import pytest
from test_completions import BYTES
from test_generate import model_of

from flaxlm.decoding.compile_counter import count_compilations
from flaxlm.decoding.requests import EngineRequest, few_shapes
from flaxlm.decoding.row_settings import RowSettings
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
  cfg = model_of("gqa")[0].cfg
  shapes = few_shapes(cfg, 4) if few else None
  request = EngineRequest(
    prompt=[1], max_new_tokens=3, settings=SamplingSettings(**settings)
  )
  assert RowSettings(cfg, shapes, BYTES).needs_history(request) == needs_it


def test_the_settings_of_a_batch_run_no_program():
  """On a CPU the many small ones of their arrays would go before those of the model."""
  given = [
    EngineRequest(prompt=[1], max_new_tokens=3, settings=SamplingSettings(row=row))
    for row in range(37)
  ]
  settings = RowSettings(model_of("gqa")[0].cfg, None, BYTES)
  with count_compilations() as counter:
    settings.sampling_of(given, False)
  assert not counter.names
