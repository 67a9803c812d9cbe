# SPDX-License-Identifier: Apache-2.0
"""What a run says at its start about what it will not reach, and about what has changed."""

import dataclasses
from typing import Any

import pytest

from flaxlm.config import Config, ModelConfig, OptimizerConfig, TrainingConfig, override
from flaxlm.errors import ConfigError
from flaxlm.training.loop import changes, report_start, train, unreached, unread
from flaxlm.training.optimizer import build_schedule


def resolved(num_steps: int, warmup_steps: int = 0, log_every_steps: int = 1):
  return Config(
    name="a",
    model=ModelConfig(vocab_size=64),
    optimizer=OptimizerConfig(warmup_steps=warmup_steps, learning_rate=0.5),
    training=TrainingConfig(num_steps=num_steps, log_every_steps=log_every_steps),
  ).resolve()


class Lines(list):
  log = list.append


def said(cfg, before=None, first_step=0) -> list[str]:
  lines = Lines()
  report_start(lines, cfg, before, first_step, [], None)
  return [line for line in lines if "vocab" not in line]


@pytest.mark.parametrize(("num_steps", "share"), [(1, "0%"), (5, "40%"), (10, "90%")])
def test_a_warm_up_that_does_not_end(num_steps: int, share: str):
  cfg = resolved(num_steps, warmup_steps=10)
  (line,) = unreached(cfg)
  assert f"num_steps={num_steps}: the learning rate ends at {share} of" in line
  last = float(build_schedule(cfg.optimizer, num_steps)(num_steps - 1))
  assert f"{last / 0.5:.0%}" == share
  assert said(cfg) == [line]


def test_a_run_that_is_long_enough_says_nothing():
  assert said(resolved(11, warmup_steps=10)) == []
  assert said(resolved(1)) == []


def test_no_line_of_metrics_is_ever_due():
  (line,) = unreached(resolved(9, log_every_steps=10))
  assert "no train/loss will be written" in line


def test_no_sample_is_due_before_the_last():
  cfg = resolved(9)
  for every, is_told in ((None, False), (8, False), (9, True), (50, True)):
    training = dataclasses.replace(cfg.training, sample_every_steps=every)
    lines = [*unreached(dataclasses.replace(cfg, training=training))]
    assert ["no sample but the last" in line for line in lines] == [True] * is_told


@pytest.mark.parametrize(
  ("cfg", "said"),
  [
    ("stdlib_tiny", "the config is 'stdlib_tiny'"),
    (None, "the config is None"),
    (Config, "the config is <class"),
    (Config(), "name is none"),
  ],
)
def test_what_is_no_config_of_a_run_is_not_trained(cfg: Any, said: str):
  with pytest.raises(ConfigError, match=said):
    train(cfg)


def test_a_run_at_its_end():
  (line,) = said(resolved(9, warmup_steps=50), resolved(9), 9)
  assert "already finished at step 9" in line and "--training.num-steps=18" in line
  (line,) = said(resolved(5), resolved(9), 9)
  assert "already finished at step 9" in line
  (line,) = said(resolved(0))
  assert line.endswith("training.num_steps=0: nothing to train")


def test_a_longer_run_follows_another_schedule():
  before, after = resolved(9, warmup_steps=2), resolved(18, warmup_steps=2)
  resuming, changed = said(after, before, 9)
  assert "resuming" in resuming and "training.num_steps was 9, now 18" in changed
  assert list(changes(before, before)) == []


@pytest.mark.parametrize(
  ("arguments", "line"),
  [
    ([], None),
    (
      ["--lora.base-weights=int8", "--lora.alpha=4"],
      "not read with lora.rank=0: lora.alpha, lora.base_weights",
    ),
    (["--lora.base-weights=int8", "--lora.rank=2"], None),
    (["--dpo.beta=0.5"], "not read with data.objective=next_token: dpo.beta"),
    (["--dpo.beta=0.5", "--data.objective=preference"], None),
    (
      ["--reward.num-samples=2", "--data.objective=chat"],
      "not read with data.objective=chat: reward.num_samples",
    ),
    (
      ["--data.text-field=body", "--data.objective=chat"],
      "not read with data.objective=chat: data.text_field",
    ),
    (["--data.text-field=body"], None),
    (
      ["--data.mask-fraction=0.3"],
      "not read with data.objective=next_token: data.mask_fraction",
    ),
    (
      ["--tokenizer.path=a.json", "--tokenizer.kind=byte"],
      "not read with tokenizer.path: tokenizer.kind",
    ),
    (["--tokenizer.path=a.json"], None),
  ],
)
def test_settings_that_nothing_reads(arguments: list[str], line: str | None):
  assert [*unread(override(Config(name="a"), arguments))] == ([line] if line else [])
