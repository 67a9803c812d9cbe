# SPDX-License-Identifier: Apache-2.0
"""Jobs: results in order, as for each prompt alone, after kills and in any batches."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_completions import make_run

from flaxlm.decoding import jobs as jobs_module
from flaxlm.decoding.completions import Stopping, complete
from flaxlm.decoding.jobs import (
  PromptJob,
  batch_jobs,
  complete_jobs,
  measure_job,
  read_jobs,
)
from flaxlm.decoding.loading import Run
from flaxlm.decoding.sampling import SamplingSettings, same_settings
from flaxlm.decoding.speculative import Draft
from flaxlm.errors import ConfigError
from flaxlm.nn.models import build_model

DEFAULTS = PromptJob("", SamplingSettings(temperature=1.0, seed=5), Stopping(), 6)
LINES = [
  {"prompt": "a"},
  {"prompt": "b é and more", "max_new_tokens": 3, "seed": 77, "id": "mine"},
  {"prompt": "a b", "temperature": 0, "num_samples": 2},
  {"prompt": "é", "top_p": 0.7, "stop": " "},
  {"prompt": "ab", "banned_tokens": [97], "stop_tokens": [32]},
]


@pytest.fixture(scope="module")
def run() -> Run:
  return make_run(-30.0)


def as_text(lines: list[dict]) -> str:
  return "\n".join(map(json.dumps, lines)) + "\n\n"


def written(path: Path) -> list[dict]:
  return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_each_prompt_is_answered_as_if_alone(run, tmp_path):
  jobs, done = read_jobs(as_text(LINES), DEFAULTS), []
  complete_jobs(run, jobs, tmp_path / "out.jsonl", 3, on_done=done.append)
  found = written(tmp_path / "out.jsonl")
  assert [answer.get("id") for answer in found] == [None, "mine", None, None, None, None]
  assert [answer["prompt"] for answer in found] == [
    "a",
    "b é and more",
    "a b",
    "a b",
    "é",
    "ab",
  ]
  assert sum(done) == len(LINES)
  assert [*tmp_path.iterdir()] == [tmp_path / "out.jsonl"], "nothing else is left"
  settings: list[dict[str, Any]] = [
    dict(seed=5),
    dict(seed=77),
    dict(seed=5, row=2, temperature=0),
    dict(seed=5, row=2, sample=1, temperature=0),
    dict(seed=5, row=3, top_p=0.7),
    dict(seed=5, row=4, banned_tokens=[97]),
  ]
  stops = [Stopping()] * 4 + [Stopping(strings=[" "]), Stopping(tokens=[32])]
  for answer, of_row, stop in zip(found, settings, stops, strict=True):
    alike = [SamplingSettings(**{"temperature": 1.0} | of_row)]
    number = 3 if of_row["seed"] == 77 else 6
    (alone,) = complete(run, [answer["prompt"]], alike, number, stop)
    expected = alone.as_json()
    assert [answer[key] for key in ("completion", "tokens", "finish_reason")] == [
      expected[key] for key in ("completion", "tokens", "finish_reason")
    ]


def test_equal_prompts_have_different_answers(run, tmp_path):
  """Nine of nine: no sample of a row repeats one of the next row."""
  jobs = read_jobs(as_text([{"prompt": "a", "num_samples": 3}] * 3), DEFAULTS)
  jobs = [job._replace(max_new_tokens=20) for job in jobs]
  complete_jobs(run, jobs, tmp_path / "out.jsonl", 9)
  found = written(tmp_path / "out.jsonl")
  assert len({answer["completion"] for answer in found}) == 9


def test_a_killed_job_goes_on(run, tmp_path, monkeypatch):
  jobs = read_jobs(as_text(LINES), DEFAULTS)
  complete_jobs(run, jobs, tmp_path / "whole.jsonl", 2)
  answer_jobs = jobs_module.answer_jobs
  calls: list[list[int]] = []

  def killed(run: Run, jobs: Any, *arguments: Any) -> Any:
    calls.append([])
    for number, samples in answer_jobs(run, jobs, *arguments):
      if len(calls) == 1 and len(calls[0]) == 2:
        raise KeyboardInterrupt
      calls[-1].append(number)
      yield number, samples

  monkeypatch.setattr(jobs_module, "answer_jobs", killed)
  output, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
  with pytest.raises(KeyboardInterrupt):
    complete_jobs(run, jobs, output, 2)
  assert not output.exists()
  with partial.open("a") as file:
    file.write('{"index": 3, "sam')  # killed in the middle of a line
  with pytest.raises(ConfigError, match="belongs to other prompts or settings"):
    complete_jobs(run, jobs[1:], output, 2)
  complete_jobs(run, jobs, output, 2)
  # Other rows beside it may round a log-probability in another way.
  found, expected = written(output), written(tmp_path / "whole.jsonl")
  for answer, whole in zip(found, expected, strict=True):
    assert answer.pop("logprobs") == pytest.approx(whole.pop("logprobs"), abs=1e-5)
  assert found == expected
  assert not partial.exists()
  assert len(calls[0]) == 2 and sorted(calls[0] + calls[1]) == [*range(5)]


def test_an_output_has_one_writer(run, tmp_path):
  """Two would answer all prompts twice, and the second would find its file gone."""
  jobs = read_jobs(as_text(LINES), DEFAULTS)
  partial = tmp_path / "out.jsonl.partial"
  refused = pytest.raises(ConfigError, match="another process writes ")
  with jobs_module.opened_alone(partial), refused:
    complete_jobs(run, jobs, tmp_path / "out.jsonl", 2)
  complete_jobs(run, jobs, tmp_path / "out.jsonl", 2)
  assert len(written(tmp_path / "out.jsonl")) == 6 and not partial.exists()


def test_batches_are_of_like_length_and_fit(run):
  jobs = [
    PromptJob("a" * length, SamplingSettings(), Stopping(), 20)
    for length in (5, 90, 7, 80, 100)
  ]
  jobs[0] = jobs[0]._replace(max_new_tokens=140)
  sized = [measure_job(run, place, job) for place, job in enumerate(jobs)]
  found = [[sized.number for sized in batch] for batch in batch_jobs(sized, 2, 160)]
  assert found == [[2, 3], [1, 4], [0]]
  assert all(len(batch) == 1 for batch in batch_jobs(sized, 1, 160))


@pytest.mark.parametrize(
  ("line", "complaint"),
  [
    ("{", "line 1 of the prompts"),
    ("[]", "line 1 of the prompts"),
    ('{"text": "a"}', "'text' is not one of"),
    ('{"prompt": 3}', "there is no prompt"),
    ('{"prompt": "a", "top_k": 0}', "top-k is 0"),
    ('{"prompt": "a", "top_k": "many"}', "line 1 of the prompts"),
    ('{"prompt": "a", "max_new_tokens": 0}', "max_new_tokens is 0"),
    ('{"prompt": "a", "num_samples": "2"}', "num_samples is '2'"),
    ('{"prompt": "a", "num_samples": 1000000000}', "num_samples is 1000000000"),
    ('{"prompt": "a", "max_new_tokens": 1000000000}', "max_new_tokens is 1000000000"),
    ('{"prompt": "a", "stop": [""]}', "a stop string is empty"),
    ('{"prompt": "a", "logit_bias": [3]}', "logit_bias is [3]"),
    ('{"prompt": "a", "logit_bias": {"a": 3}}', "logit_bias has 'a'"),
    ('{"prompt": "a", "logit_bias": {"1_0": 3}}', "logit_bias has '1_0'"),
    ('{"prompt": "a", "logit_bias": {"1": "3"}}', "logit-bias of token 1 is '3'"),
    ('{"prompt": "a", "top_k": 2.5}', "top-k is 2.5"),
    ('{"prompt": "a", "top_k": true}', "top-k is True"),
    ('{"prompt": "a", "temperature": true}', "temperature is True"),
    ('{"prompt": "a", "temperature": "1"}', "temperature is '1'"),
    ('{"prompt": "a", "seed": 1.0}', "seed is 1.0"),
    ('{"prompt": "a", "row": 1}', "'row' is not one of"),
    ('{"prompt": "a", "stop": [5]}', "stop string 1 is 5"),
    ('{"prompt": "a", "stop": 5}', "stop is 5, not a list"),
    ('{"prompt": "a", "stop_tokens": "12"}', "stop_tokens is '12', not a list"),
    ('{"prompt": "a", "stop_tokens": [true]}', "stop-token is True"),
    ('{"prompt": "a", "banned_tokens": "12"}', "banned_tokens is '12', not a list"),
    ('{"prompt": "a", "banned_tokens": [1.5]}', "token id 1.5"),
    ('{"prompt": "a", "logit_bias": {"7": 1, "07": 2}}', "logit_bias has '07'"),
    ('{"prompt": "a", "max_seconds": "1"}', "max-seconds is '1'"),
    ('{"prompt": "a", "max_seconds": false}', "max-seconds is False"),
    ('{"prompt": "a", "max_new_tokens": 2.0}', "max_new_tokens is 2.0"),
    ('{"prompt": "a", "num_samples": true}', "num_samples is True"),
    ('{"prompt": "a", "regex": 5}', "regex is 5"),
    ('{"prompt": "a", "regex": "a", "json_schema": {}}', "regex with json_schema"),
    ('{"prompt": "a", "id": ["x"]}', "id is ['x']"),
    ('{"prompt": "a", "prompt": "b"}', "'prompt' appears twice"),
    ('{"prompt": "a", "top_p": NaN}', "NaN is not JSON"),
    ('{"prompt": "\\ud800"}', "prompt 1 is not UTF-8"),
    ("[" * 100_000, "nested too deeply"),
    ('{"prompt": "a", "id": ' + "[" * 100_000, "nested too deeply"),
  ],
)
def test_what_is_no_job_is_refused_by_its_line(line: str, complaint: str):
  with pytest.raises(ConfigError, match=re.escape(complaint)) as caught:
    read_jobs(line, DEFAULTS)
  assert caught.value.cause.startswith("line 1 of the prompts: ")
  assert len(str(caught.value).splitlines()) <= 2


def test_only_a_newline_ends_a_line():
  """Python's `splitlines` would cut at every one of these within a string."""
  ends = "\u2028\u2029\x85"
  lines = [{"prompt": f"a{ends}b", "id": 1}, {"prompt": "c"}]
  text = "\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
  jobs = read_jobs("\N{BYTE ORDER MARK}" + text, DEFAULTS)
  assert [job.prompt for job in jobs] == [f"a{ends}b", "c"]


def test_null_is_left_out():
  (job,) = read_jobs('{"prompt": "a", "top_k": null, "stop": null, "id": null}', DEFAULTS)
  assert job == DEFAULTS._replace(prompt="a", line=1)


@pytest.mark.parametrize("damage", ["{\n", "[]\n", '{"x": 1}\n{"x": 2}\n', "\0\0\n"])
def test_a_damaged_partial_file_is_named(run, tmp_path, damage: str):
  (tmp_path / "out.jsonl.partial").write_text(damage)
  jobs = read_jobs(as_text(LINES), DEFAULTS)
  with pytest.raises(ConfigError, match=r"out\.jsonl\.partial"):
    complete_jobs(run, jobs, tmp_path / "out.jsonl", 2)


def test_a_prompt_that_is_too_long_is_named(run, tmp_path):
  jobs = read_jobs(as_text([{"prompt": "a"}, {"prompt": "a" * 170}]), DEFAULTS)
  with pytest.raises(ConfigError, match="line 2 of the prompts: prompt of 171 tokens"):
    complete_jobs(run, jobs, tmp_path / "out.jsonl", 2)


@pytest.mark.parametrize(
  "line",
  [
    {"prompt": "a", "banned_tokens": [*range(257)]},
    {"prompt": "a", "logit_bias": {"257": 1}},
    {"prompt": "a", "stop_tokens": [257]},
  ],
)
def test_ids_past_the_vocabulary_are_refused_before_the_first_answer(run, tmp_path, line):
  jobs = read_jobs("\n\n" + as_text([{"prompt": "a"}, line]), DEFAULTS)
  with pytest.raises(ConfigError, match="line 4 of the prompts: "):
    complete_jobs(run, jobs, tmp_path / "out.jsonl", 2)
  assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
  ("line", "told"),
  [
    ({"regex": "a+"}, "line 2 of the prompts: a draft with a form"),
    ({"presence_penalty": 1}, "line 2 of the prompts: a draft with the rule presence"),
    ({"prompt": "a" * 60}, "line 2 of the prompts: prompt of 61 tokens"),
  ],
)
def test_what_a_draft_cannot_guess_is_refused_before_the_first_answer(
  run, tmp_path, line, told
):
  """The last one fits the model, and not the draft."""
  small = build_model(dataclasses.replace(run.cfg.model, context=64))
  guessing = run._replace(draft=Draft(small, None))
  jobs = read_jobs(as_text([{"prompt": "a"}, {"prompt": "a"} | line]), DEFAULTS)
  with pytest.raises(ConfigError, match=told):
    complete_jobs(guessing, jobs, tmp_path / "out.jsonl", 2)
  assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_batches_fit_a_draft_too(run, tmp_path):
  """A long prompt and a long answer, each of which alone fits its context."""
  cfg = dataclasses.replace(run.cfg.model, context=64)
  guessing = run._replace(draft=Draft(build_model(cfg), run.params, 2))
  lines = [{"prompt": "a" * 50}, {"prompt": "a", "max_new_tokens": 50}]
  for which in (run, guessing):
    jobs = read_jobs(as_text(lines), DEFAULTS)
    complete_jobs(which, jobs, tmp_path / f"{which is run}.jsonl", 2)
  tokens = [
    [one["tokens"] for one in written(tmp_path / f"{name}.jsonl")] for name in (True, False)
  ]
  assert tokens[0] == tokens[1]


def test_time_and_tokens_end_an_answer(run):
  settings = same_settings(2, 1.0)
  stops = [Stopping(max_tokens=4), Stopping(max_seconds=1e-9)]
  few, late = complete(run, ["a", "b"], settings, 40, stops)
  assert (len(few.tokens), few.finish_reason) == (4, "length")
  assert (len(late.tokens), late.finish_reason) == (1, "time")
  (whole,) = complete(run, ["a"], same_settings(1, 1.0), 40)
  token = whole.tokens[5]
  (ended,) = complete(run, ["a"], same_settings(1, 1.0), 40, Stopping(tokens=[token]))
  assert ended.tokens == whole.tokens[: whole.tokens.index(token) + 1]
  assert ended.finish_reason == "stop"


def test_top_logprobs_are_told_when_asked_for(run):
  (answer,) = complete(run, ["a"], same_settings(1, 0.0), 20, num_top=2)
  assert len(answer.top_logprobs) == len(answer.tokens) == 20
  for token, logprob, tops in zip(
    answer.tokens, answer.logprobs, answer.top_logprobs, strict=True
  ):
    assert len(tops) == 2
    assert tops[0] == (token, pytest.approx(logprob, abs=1e-5))
  assert "top_logprobs" not in complete(run, ["a"], same_settings(1), 2)[0].as_json()
