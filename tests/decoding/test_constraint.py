# SPDX-License-Identifier: Apache-2.0
"""Constrained decoding: the automaton accepts what `re` does, and every draw obeys it."""

import json
import re
import resource

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_completions import BYTES, make_run

from flaxlm.decoding.completions import Stopping, complete
from flaxlm.decoding.constraint import FREE, NEVER, build_automaton, check_expressions
from flaxlm.decoding.jobs import PromptJob, complete_jobs, read_jobs
from flaxlm.decoding.loading import Run
from flaxlm.decoding.sampling import SamplingSettings, make_sampling, stack_settings
from flaxlm.decoding.schemas import regex_of_schema
from flaxlm.errors import ConfigError
from flaxlm.tokenizers import train_tokenizer

BPE = train_tokenizer("bpe", ["the cat sat on the mat 123 456 "] * 20, 300)
EXPRESSIONS = (
  r"[0-9]{1,3}(\.[0-9]+)?",
  r"(the cat|the mat)( sat)*",
  r"[é漢a-c ]*b",
  r"(?s).{0,5}",
)
SCHEMA = {
  "type": "object",
  "properties": {"name": {"type": "string", "maxLength": 4}, "age": {"type": "integer"}},
  "required": ["name", "age"],
}


@pytest.fixture(scope="module")
def run() -> Run:
  return make_run(0.0)


def accepts(ids: list[int], number: int, tokenizer=BPE) -> bool:
  """Whether the automaton accepts a text and returns to `FREE` after its end."""
  automaton, initial = build_automaton(EXPRESSIONS, tokenizer)
  state = initial[number]
  for token in [*ids, tokenizer.eos_id]:
    if state == FREE:
      return False
    kind = automaton.kinds_EV[automaton.expressions_X[state], token]
    state = automaton.next_XY[state, kind]
    if state == NEVER:
      return False
  return bool(state == FREE)


@given(st.integers(0, 3), st.text("the catmsn12.é漢b", max_size=9), st.booleans())
@settings(max_examples=300)
def test_the_automaton_says_what_re_says(number, text, in_bytes):
  tokenizer = BYTES if in_bytes else BPE
  fits = re.fullmatch(EXPRESSIONS[number], text) is not None
  assert accepts(tokenizer.encode(text), number, tokenizer) == fits


@pytest.mark.parametrize("number", range(4))
def test_what_fits_is_accepted_however_it_is_cut(number):
  text = ("123.45", "the cat sat sat", "éca漢 b", "\n12é\0")[number]
  assert re.fullmatch(EXPRESSIONS[number], text)
  assert accepts(BPE.encode(text), number)
  assert accepts([token for letter in text for token in BPE.encode(letter)], number)


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_the_end_can_come_after_every_token_that_is_allowed(expression):
  """Single bytes cannot spell what stands for it, so none may begin to."""
  automaton, (initial,) = build_automaton((expression,), BYTES)
  reached, waiting, ends = {initial}, [initial], {FREE}
  while waiting:
    following = {*automaton.next_XY[waiting.pop()].tolist()} - {NEVER} - reached
    reached |= following
    waiting += following - {FREE}
  while more := {
    state for state in reached - ends if ends & {*automaton.next_XY[state].tolist()}
  }:
    ends |= more
  assert reached <= ends


def test_many_tokens_are_of_few_kinds():
  automaton, _ = build_automaton((r"[0-9]+",), BPE)
  assert len(np.unique(automaton.kinds_EV[0])) <= 6  # digits by number, the end, all others
  assert len(set(automaton.kinds_EV[0][BPE.encode("7") + BPE.encode("8")])) == 1


def answers(run: Run, rows: list[SamplingSettings], count: int = 40) -> list:
  return complete(run, ["a"] * len(rows), rows, count)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_answer_has_the_form(run, temperature):
  """Of letters that the model would hardly write; the other rows do not change."""
  expression = r"[0-9]{2,4}|xyz+"
  rows = [
    SamplingSettings(temperature=temperature, regex=expression, seed=n) for n in range(6)
  ]
  free = SamplingSettings(temperature=temperature, seed=9)
  *formed, beside = answers(run, [*rows, free])
  for answer in formed:
    if answer.finish_reason == "stop":
      assert re.fullmatch(expression, answer.completion), answer
    else:
      assert re.fullmatch("xyz*", answer.completion), answer
  if temperature:
    assert len({answer.completion for answer in formed}) > 1
  (alone,) = answers(run, [free])
  assert beside.completion == alone.completion
  np.testing.assert_allclose(beside.logprobs, alone.logprobs, atol=1e-5)


def test_a_form_of_anything_changes_nothing(run):
  texts = "(?s).*"
  rows = [SamplingSettings(temperature=1.0, seed=n) for n in range(3)]
  formed = [SamplingSettings(temperature=1.0, seed=n, regex=texts) for n in range(3)]
  for free, within in zip(answers(run, rows, 8), answers(run, formed, 8), strict=True):
    if "\N{REPLACEMENT CHARACTER}" not in free.completion:
      assert within.completion == free.completion
      np.testing.assert_allclose(within.logprobs, free.logprobs, atol=1e-5)


def test_jobs_answer_in_json(run, tmp_path):
  lines = [{"prompt": "a", "json_schema": SCHEMA}, {"prompt": "b", "regex": "(no|yes)"}]
  text = "\n".join(map(json.dumps, lines))
  jobs = read_jobs(
    text, PromptJob("", SamplingSettings(temperature=0.0), Stopping(), 80, 2)
  )
  complete_jobs(run, jobs, tmp_path / "out.jsonl", 4)
  found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
  for answer in found[:2]:
    assert answer["finish_reason"] == "stop", answer
    assert isinstance(json.loads(answer["completion"])["age"], int)
  assert {answer["completion"] for answer in found[2:]} <= {"no", "yes"}


@pytest.mark.parametrize(
  "expression",
  [
    "a{99999999}",
    pytest.param("(a|b)*a(a|b){30}", marks=pytest.mark.slow),
    "x" * 200_000,
    pytest.param("(.{0,500}){500}", marks=pytest.mark.slow),
    pytest.param("(?:(?:(?:a{99}){99}){99}){99}", marks=pytest.mark.slow),
    pytest.param(r"\w{2000}", marks=pytest.mark.slow),
  ],
)
def test_large_automata_are_refused_without_a_tokenizer(expression, monkeypatch):
  """In bounded time and memory, and the process that finds out is not ours."""
  monkeypatch.setattr("flaxlm.decoding.constraint.MOST_SECONDS", 1)
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  with pytest.raises(ConfigError, match="cannot be used") as caught:
    check_expressions(["a+", expression, "b+"])
  assert len(str(caught.value)) < 300
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_what_a_large_vocabulary_makes_too_large_is_refused(monkeypatch):
  monkeypatch.setattr("flaxlm.decoding.constraint.MOST_LINKS", 10)
  with pytest.raises(ConfigError, match="it has more than 10 links"):
    build_automaton(("abcdefghijklmnopq.{3}",), BYTES)


def test_a_job_is_refused_before_a_run_is_opened():
  line = json.dumps({"prompt": "a", "regex": "a{99999999}"})
  with pytest.raises(ConfigError, match=r"'a\{99999999\}' cannot be used"):
    read_jobs(line, PromptJob("", SamplingSettings(), Stopping(), 80, 2))


@pytest.mark.parametrize(
  "make, cause",
  [
    (lambda: stack_settings([SamplingSettings(regex="(")], BYTES), "cannot be used"),
    (
      lambda: stack_settings([SamplingSettings(regex="a", banned_tokens=[3])], BYTES),
      "banned",
    ),
    (lambda: stack_settings([SamplingSettings(regex=3)], BYTES), "regex is 3"),  # type: ignore[arg-type]
    (lambda: make_sampling(1, regex="a"), "needs the tokenizer"),
    (lambda: regex_of_schema("{"), "schema cannot be used"),
    (lambda: regex_of_schema({"type": "nonsense"}), "nonsense"),
    (lambda: regex_of_schema(["a"]), "schema cannot be used"),  # type: ignore[arg-type]
  ],
)
def test_errors(make, cause):
  with pytest.raises(ConfigError, match=cause):
    make()
