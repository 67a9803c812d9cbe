# SPDX-License-Identifier: Apache-2.0
"""What a line of results contains, and how times become figures."""

import io
import json
import subprocess

import pytest

from flaxlm.benchmark import provenance
from flaxlm.benchmark.measure import BenchOptions, Side, agree, measure
from flaxlm.benchmark.report import (
  as_json,
  figures,
  number,
  print_results,
  summarise,
  with_ratio,
)
from flaxlm.errors import FlaxLMError

CONTRACT = {
  *("suite", "case", "median", "low", "high", "unit", "peak_fraction"),
  *("measured_limit_fraction", "ratio", "peer", "versions", "device", "commit"),
}


def test_a_line_has_every_key():
  values = json.loads(as_json(summarise("s", "c", [1.0, 3.0, 2.0], "ms")))
  assert values.keys() >= CONTRACT
  assert (values["median"], values["low"], values["high"]) == (2.0, 1.0, 3.0)
  assert values["peak_fraction"] is values["ratio"] is values["peer"] is None
  assert values["versions"]["jax"] and "cores" in values["device"]


def test_a_ratio_is_the_median_of_paired_rounds():
  """A machine that halves its speed between rounds leaves the ratio alone."""
  ours, theirs = [1.0, 2.0, 4.0], [2.0, 4.0, 8.0]  # seconds: a ratio above 1 is our win
  result = with_ratio(summarise("s", "c", ours, "ms"), "p", ours, theirs, "gate")
  assert (result.ratio, result.ratio_low, result.ratio_high) == (2.0, 2.0, 2.0)
  assert (result.median, result.low, result.high) == (2.0, 1.0, 4.0)
  assert (result.peer, result.correct) == ("p", "gate")


def test_times_become_figures():
  assert figures([0.5, 0.25], "GFLOP/s", 1e9) == [2.0, 4.0]
  assert figures([0.5], "ms") == [500.0]
  assert figures([0.5], "ms per token", 10) == [50.0]
  assert figures([2.0], "tokens/s", 100) == [50.0]


def test_a_round_without_a_figure_is_refused():
  with pytest.raises(FlaxLMError, match="no figure"):
    summarise("s", "c", [1.0, float("nan")], "ms")


@pytest.mark.parametrize(
  ("value", "text"),
  [(0.012345, "0.0123"), (1.5, "1.50"), (123.4, "123"), (12345.6, "12,346"), (0, "0")],
)
def test_numbers_have_three_digits(value: float, text: str):
  assert number(value) == text


def test_the_table_prints_a_gate_with_every_ratio():
  result = summarise("train", "x", [10.0, 11.0], "tokens/s")
  gate = "losses agree to 1e-7"
  result = with_ratio(result, "torch eager", [1.0, 1.0], [2.0, 2.2], gate)
  out = io.StringIO()
  print_results([result], out)
  assert "2.10x torch eager (2.00-2.20)" in out.getvalue()
  assert "checked: train x vs torch eager: losses agree to 1e-7" in out.getvalue()


# -- Measuring -----------------------------------------------------------------------------


def test_rounds_take_turns_and_the_first_call_stands_apart():
  calls = []
  side = lambda name: Side(lambda n: calls.append(name) or n, lambda: (len(calls),))
  setting = BenchOptions(rounds=2, round_seconds=0)
  timings = measure({"a": side("a"), "b": side("b")}, setting)
  # First and warm-up of each; then a round each, and a round each in turned order.
  assert "".join(calls) == "aabb" + "ab" + "ba"
  assert timings["a"].result == 0 and timings["b"].result == 2
  assert len(timings["a"].rounds) == 2


def test_rounds_are_filled_with_calls():
  calls = []
  measure({"a": Side(lambda: calls.append(1))}, BenchOptions(rounds=1, round_seconds=1e9))
  assert len(calls) == 2 + 1000


def test_queued_calls_follow_each_other():
  """They are prepared once a round, and waited for at its end."""
  calls, prepared = [], []
  side = Side(lambda: calls.append(1), lambda: prepared.append(1) or (), queued=True)
  measure({"a": side}, BenchOptions(rounds=3, round_seconds=1e9))
  assert len(calls) == 2 + 3 * 1000
  assert len(prepared) == 2 + 3


def test_a_ratio_needs_a_gate_that_holds():
  with pytest.raises(FlaxLMError, match=r"a speed without a result: x agrees to 1\.0e-01"):
    agree("x", [1.0, 9.0], [1.0, 10.0], 0.05)
  with pytest.raises(FlaxLMError, match="without a result"):
    agree("x", [float("nan")], [1.0], 0.05)
  assert agree("x", [1.0, 10.1], [1.0, 10.0], 0.05) == "x agrees to 1.0e-02"


# -- Where a figure comes from -------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path):
  def git(*arguments: str, folder=tmp_path) -> str:
    settings = ("-c", "user.name=a", "-c", "user.email=a@b")
    command = ["git", *settings, *arguments]
    return subprocess.run(
      command, cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()

  git("init", "-q")
  git("commit", "-q", "--allow-empty", "-m", "x")
  git.folder = tmp_path
  return git


def test_the_commit_is_git_s_own_word(checkout, tmp_path):
  head = checkout("rev-parse", "HEAD")[:12]
  assert provenance.commit(checkout.folder) == head
  checkout("pack-refs", "--all")
  assert provenance.commit(checkout.folder) == head
  checkout("worktree", "add", "-q", "-b", "other", str(tmp_path / "other"))
  assert provenance.commit(tmp_path / "other") == head
  checkout("checkout", "-q", "--detach")
  assert provenance.commit(checkout.folder) == head


def test_outside_a_checkout_there_is_no_commit(tmp_path):
  assert provenance.commit(tmp_path) is None
  (tmp_path / ".git").write_text("gitdir: nowhere", "utf-8")
  assert provenance.commit(tmp_path) is None


def test_flags_are_those_that_were_set(monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--xla_foo=1")
  monkeypatch.setenv("JAX_BAR", "2")
  found = provenance.flags()
  assert found["XLA_FLAGS"] == "--xla_foo=1" and found["JAX_BAR"] == "2"
  assert "OMP_NUM_THREADS" not in found or found["OMP_NUM_THREADS"]
