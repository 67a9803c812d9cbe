# SPDX-License-Identifier: Apache-2.0
"""The measurements in benchmarks/, for developers, run on tiny cases."""

import importlib.util
import math
import sys
from pathlib import Path

import pytest
from conftest import tiny

from benchmarks.families import FAMILIES, bench_families
from benchmarks.finetuning import bench_finetuning
from benchmarks.gpu import __main__ as gpu
from benchmarks.predictions.__main__ import bench_predictions
from benchmarks.quality import CHOICES, bench_quality
from benchmarks.reading import FORMATS, Case, bench_reading
from flaxlm import cli
from flaxlm.benchmark.compare import read_lines
from flaxlm.benchmark.measure import BenchOptions
from flaxlm.benchmark.training_case import gpt2_shape
from flaxlm.config import DataConfig, ResolvedConfig
from flaxlm.decoding.loading import load_run
from flaxlm.sharding import make_mesh
from tests.benchmark.test_suites import check_results

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_predictions():
  check_results("predictions", bench_predictions(BenchOptions("tiny", 1, 0.0)))


@pytest.mark.slow
def test_finetuning():
  options, model = BenchOptions("tiny", 1, 0.0), gpt2_shape(1, 16, 2, 8, 65)
  speed, memory = bench_finetuning(options, 1, model, batch_size=8)
  assert "agrees" in speed.correct
  assert memory.ratio > 3


@pytest.mark.slow
def test_reading(tmp_path: Path):
  pytest.importorskip("pyarrow")
  data = DataConfig(seq_len=8, batch_size=8)
  cfg = ResolvedConfig(model=gpt2_shape(1, 16, 2, 8, 4096), data=data)
  texts = [f"def f{n}(x):\n  return {n} * x\n" for n in range(200)]
  results = bench_reading(texts, tmp_path, [Case("tiny", cfg, 2)], rounds=1)
  cases = [result.case for result in results]
  assert cases == [
    *(f"{kind}, in preparing" for kind in FORMATS),
    *(
      f"{kind}, tiny: batch {what}"
      for kind in FORMATS
      for what in ("waited for", "if not made ahead")
    ),
  ]
  assert all(result.median > 0 for result in results)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "knobs"),
  [
    ("decoder", {"model__context": 128}),
    ("encoder", {"data__objective": "masked", "model__family": "encoder"}),
  ],
)
def test_families(name: str, knobs: dict, corpus: str, tmp_path: Path, monkeypatch):
  monkeypatch.setenv("FLAXLM_DATA_DIR", str(tmp_path))
  monkeypatch.setenv("PYTHONPATH", str(ROOT))
  monkeypatch.setitem(FAMILIES, name, ["stdlib_tiny", *tiny(corpus, **knobs)])
  results = bench_families([name], num_steps=5)
  assert [result.case for result in results] == [
    f"{name} {figure}"
    for figure in ("parameters", "tokens", "held-out loss", "training", "decoding")
  ]
  assert all(result.median > 0 for result in results)


@pytest.mark.slow
def test_quality(corpus: str, tmp_path: Path, monkeypatch):
  """int8 costs little; a model of bytes has a perplexity below their number."""
  monkeypatch.setenv("FLAXLM_DATA_DIR", str(tmp_path))
  arguments = tiny(corpus, training__num_steps=4, data__batch_size=8)
  assert cli.main(["train", *arguments, f"--runs_dir={tmp_path}", "--name=a"]) == 0
  run = load_run(tmp_path / "a", make_mesh({"data": -1}))
  results = bench_quality(run, ["3 times 4 is 12.\n" * 100])
  assert [result.case for result in results[::2]] == list(CHOICES)
  perplexities = {result.case: result.median for result in results[::2]}
  assert all(1 < perplexity < 300 for perplexity in perplexities.values())
  first, *others = perplexities.values()
  assert all(math.isclose(other, first, rel_tol=0.05) for other in others)
  shares = [result.median for result in results[1::2]]
  assert shares[0] == 1 and all(0 < share <= 1 for share in shares)


def in_process(table, what: str, module: str, *arguments: str) -> None:
  """A part of the table of a GPU, without a process of its own."""
  argv, sys.argv = sys.argv, [module, *arguments]
  try:
    importlib.import_module(module).main()
  finally:
    sys.argv = argv


@pytest.mark.slow
def test_a_gpu_table(tmp_path: Path, monkeypatch):
  """The whole script on tiny shapes: losses of both sides agree, tokens are likely."""
  monkeypatch.setattr(gpu.Table, "run", in_process)
  if importlib.util.find_spec("torch"):
    import torch

    torch.set_num_threads(1)  # more of them spin where other work needs the cores
  path = tmp_path / "gpu.jsonl"
  monkeypatch.setattr(sys, "argv", ["gpu", "--smoke", "--output", str(path)])
  gpu.main()
  results = read_lines(path)
  cases = {f"{result.suite} {result.case}" for result in results}
  kinds = ("float32", "int8", "int4")
  assert cases >= {f"decode tiny B{n} {kind}" for n in (1, 8) for kind in kinds}
  shape = "tiny B2 T8 N2 K1 H8 float32"
  ways = [result.case for result in results if result.suite == "attention"]
  assert ways == [f"{shape} by nothing", f"{shape} by a mask"]
  between = [result for result in results if result.suite == "neighbours"]
  assert len(between) == 4 and all(result.bytes and result.correct for result in between)
  assert [result.peer is not None for result in between] == [False, True, False, False]
  training = [result for result in results if result.suite == "train"]
  assert [result.case for result in training] == [
    f"tiny {layout} 2x8 float32" for layout in ("whole", "packed")
  ]
  whole, packed = training
  assert packed.flops < whole.flops, "a packed query sees fewer keys"
  if importlib.util.find_spec("torch"):
    assert all("agree" in result.correct and result.ratio > 0 for result in training)


def test_a_gpu_table_stops_in_time(tmp_path: Path):
  """What has no time left is skipped and said; a process is ended when its time is up."""
  said: list[str] = []
  table = gpu.Table(tmp_path, 0.0, True, said.append)
  table.measure_limits()
  table.train("tiny")
  assert said[0].startswith("skipped limits: 0 s are left") and len(said) == 3
  assert table.results() == []
  table.ends += gpu.LEAST_SECONDS + 1
  table.run("limits", "flaxlm.no_such_module")
  assert said[-1].startswith("  failed: ") and "no_such_module" in said[-1]
