# SPDX-License-Identifier: Apache-2.0
"""What counts as slower, what counts as noise, and which files are refused."""

import dataclasses
import json
from pathlib import Path

import pytest

from flaxlm import cli
from flaxlm.benchmark.compare import compare_files, print_verdicts, read_lines
from flaxlm.benchmark.repeat import of_processes
from flaxlm.benchmark.report import Result, as_json
from flaxlm.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]
STEADY = (100.0, 98.0, 102.0)


def line(case: str, figures: tuple[float, float, float], unit: str = "tokens/s", **rest):
  return Result("train", case, *figures, unit, device="d", **rest)


@pytest.fixture
def files(tmp_path):
  """Writes results to two files and returns their paths."""

  def write(before: list[Result], after: list[Result]):
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path, results in zip(paths, (before, after), strict=True):
      path.write_text("".join(as_json(result) + "\n" for result in results), "utf-8")
    return paths

  return write


@pytest.mark.parametrize(
  ("after", "word", "change"),
  [
    ((80.0, 78.0, 82.0), "slower", 0.8),
    ((120.0, 118.0, 121.0), "faster", 1.2),
    ((97.0, 96.5, 97.5), "same", 0.97),  # apart, but by less than the threshold
    ((80.0, 78.0, 99.0), "noise", 0.8),  # one of its rounds was as fast
    ((101.0, 90.0, 110.0), "same", 1.01),
  ],
)
def test_a_rate(files, after, word, change):
  (verdict,) = compare_files(*files([line("x", STEADY)], [line("x", after)]))
  assert (verdict.word, verdict.change) == (word, pytest.approx(change))


@pytest.mark.parametrize("unit", ["ms", "s", "ms per token"])
def test_of_times_less_is_better(files, unit):
  slow = (125.0, 124.0, 126.0)
  paths = files([line("x", STEADY, unit)], [line("x", slow, unit)])
  (verdict,) = compare_files(*paths)
  assert (verdict.word, verdict.change) == ("slower", pytest.approx(0.8))
  (verdict,) = compare_files(*reversed(paths))
  assert (verdict.word, verdict.change) == ("faster", pytest.approx(1.25))


def test_what_is_neither_better_nor_worse_only_changes(files):
  paths = files([line("x", STEADY, "parameters")], [line("x", (50.0,) * 3, "parameters")])
  (verdict,) = compare_files(*paths)
  assert (verdict.word, verdict.change) == ("changed", None)


def test_the_threshold_moves(files):
  paths = files([line("x", STEADY)], [line("x", (90.0, 89.0, 91.0))])
  assert compare_files(*paths)[0].word == "slower"
  assert compare_files(*paths, threshold=0.2)[0].word == "same"


def test_one_round_has_no_band(files):
  paths = files([line("x", (100.0,) * 3)], [line("x", (94.0,) * 3)])
  assert compare_files(*paths)[0].word == "slower"


def test_repeated_lines_widen_the_band(files):
  """Other runs of the same case, or other peers of it, in one file."""
  again = line("x", (80.0, 78.0, 82.0), peer="torch eager")
  (verdict,) = compare_files(*files([line("x", STEADY), again], [line("x", (79.0,) * 3)]))
  assert verdict.word == "noise"
  assert verdict.before is not None
  assert (verdict.before.median, verdict.before.low, verdict.before.high) == (90, 78, 102)


def of_three(case: str, *medians: float) -> Result:
  """Rounds that are steady within each process."""
  return of_processes([line(case, (m, 0.99 * m, 1.01 * m)) for m in medians])


def test_of_several_processes_there_is_one_line():
  first = line("x", (2.0, 1.0, 3.0), ratio=0.5, ratio_low=0.4, ratio_high=0.6)
  other = line("x", (4.0, 2.0, 5.0), ratio=0.7, ratio_low=0.6, ratio_high=0.9)
  both = of_processes([first, other])
  assert (both.median, both.low, both.high, both.processes) == (3, 1, 5, 2)
  assert (both.ratio, both.ratio_low, both.ratio_high) == (pytest.approx(0.6), 0.4, 0.9)
  assert both.drift == 1.0 and both.peak_fraction is None
  assert of_processes([first]).drift is None


def test_processes_that_differ_are_no_finding(files, capsys):
  """As two runs of one program, each of which is steady in itself."""
  before = [of_three("x", 100, 103, 102), of_three("y", 100, 120, 110)]
  after = [of_three("x", 93, 93.5, 94), of_three("y", 94, 94.5, 95)]
  verdicts = {v.case: v for v in compare_files(*files(before, after))}
  assert verdicts["y"].word == "noise" and verdicts["y"].drift == pytest.approx(0.2)
  # Those of x agree by chance: what is usual in the suite counts.
  assert verdicts["x"].word == "noise" and verdicts["x"].drift == pytest.approx(0.115)
  slow = [of_three("x", 70, 71, 72), of_three("y", 60, 61, 62)]
  paths = files(before, slow)
  assert [v.word for v in compare_files(*paths)] == ["slower"] * 2
  assert cli.main(["bench", "compare", *map(str, paths)]) == 1
  assert "one process" not in capsys.readouterr().err


def test_one_process_does_not_say_how_much_they_differ(files, capsys):
  paths = files([line("x", STEADY)], [of_three("x", 80, 81, 82)])
  assert cli.main(["bench", "compare", *map(str, paths)]) == 1
  err = capsys.readouterr().err
  assert f"{paths[0]} is of one process" in err and f"{paths[1]} is" not in err


def test_cases_of_one_file_only_are_told(files, capsys):
  paths = files(
    [line("both", STEADY), line("old", STEADY)], [line("both", STEADY), line("new", STEADY)]
  )
  words = {verdict.case: verdict.word for verdict in compare_files(*paths)}
  assert words == {"both": "same", "old": "missing", "new": "new"}
  assert cli.main(["bench", "compare", *map(str, paths)]) == 0
  out = capsys.readouterr().out
  assert "only in the first file" in out and "only in the second file" in out


def test_other_devices_are_refused_unless_told(files):
  other = dataclasses.replace(line("x", STEADY), device="e")
  paths = files([line("x", STEADY)], [other])
  with pytest.raises(ConfigError, match="is of d"):
    compare_files(*paths)
  assert compare_files(*paths, any_device=True)[0].word == "same"


def test_nothing_in_common_is_an_error(files):
  with pytest.raises(ConfigError, match="no case in common"):
    compare_files(*files([line("x", STEADY)], [line("y", STEADY)]))


def test_other_units_are_refused(files):
  with pytest.raises(DataError, match=r"in ms in one file"):
    compare_files(*files([line("x", STEADY, "ms")], [line("x", STEADY, "s")]))


GOOD = json.loads(as_json(line("x", STEADY)))


@pytest.mark.parametrize(
  ("text", "match"),
  [
    ("", "has no results"),
    ("not json\n", r":1 is not JSON"),
    ("[1]\n", "not a JSON object"),
    ("[" * 100_000, "is not JSON"),
    (json.dumps({"suite": "x"}), "has no case"),
    (json.dumps(GOOD | {"median": None}), "median is None"),
    (json.dumps(GOOD | {"median": True}), "median is True"),
    (json.dumps(GOOD | {"median": float("nan")}), "median is nan"),
    (json.dumps(GOOD | {"low": 101.0}), "low <= median"),
    (json.dumps(GOOD | {"low": 0.0}), "above 0"),
    (json.dumps(GOOD | {"unit": "furlongs"}), "not known"),
    (json.dumps(GOOD) + "\n\n" + json.dumps(GOOD)[:-9], r":3 is not JSON"),
  ],
)
def test_broken_files_are_told(tmp_path, text, match):
  path = tmp_path / "broken.jsonl"
  path.write_text(text, "utf-8")
  with pytest.raises(DataError, match=match):
    read_lines(path)


def test_bytes_and_absent_files_are_told(tmp_path):
  (tmp_path / "bytes").write_bytes(b"\xff\xfe")
  for name in ("bytes", "absent"):
    with pytest.raises(DataError, match="cannot be read"):
      read_lines(tmp_path / name)


def test_keys_of_other_versions_do_no_harm(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_text(json.dumps(GOOD | {"of the future": 1}), "utf-8")
  assert read_lines(path) == [line("x", STEADY)]


def test_figures_against_a_peer_can_be_compared():
  """Every unit that a suite writes is known; shares of the time once were not."""
  path = ROOT / "docs/benchmarks/2026-11-27-decode-1-vs-transformers-xeon-2-cores.jsonl"
  verdicts = compare_files(path, path)
  assert {verdict.word for verdict in verdicts} == {"same"}
  assert "of the time" in {line.unit for line in read_lines(path)}


def test_exit_status(files, capsys):
  paths = [*map(str, files([line("x", STEADY)], [line("x", (50.0,) * 3)]))]
  assert cli.main(["bench", "compare", *paths]) == 1
  assert "0.50x" in capsys.readouterr().out
  assert cli.main(["bench", "compare", *paths, "--threshold", "0.6"]) == 0
  assert cli.main(["bench", "compare", *reversed(paths), "--json"]) == 0
  printed = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert printed["verdict"] == "faster" and printed["change"] == 2.0
  assert cli.main(["bench", "compare", paths[0]]) == 2
  assert cli.main(["bench", "compare", *paths, "--threshold", "-1"]) == 2
  assert cli.main(["bench", "compare", paths[0], "absent"]) == 3


def test_the_worst_comes_first(files, capsys):
  paths = files(
    [line("a", STEADY), line("b", STEADY), line("c", STEADY)],
    [line("a", STEADY), line("b", (90.0,) * 3), line("c", (50.0,) * 3)],
  )
  import sys

  print_verdicts(compare_files(*paths), sys.stdout)
  lines = capsys.readouterr().out.splitlines()
  assert [text.split()[3] for text in lines[:3]] == ["c", "b", "a"]
  assert lines[-1] == "2 slower; 1 same"
