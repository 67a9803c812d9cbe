# SPDX-License-Identifier: Apache-2.0
"""The measurements in benchmarks/, for developers, run on tiny cases."""

import math
from pathlib import Path

import pytest
from conftest import tiny

from benchmarks.families import FAMILIES, bench_families
from benchmarks.finetuning import bench_finetuning
from benchmarks.predictions.__main__ import bench_predictions
from benchmarks.quality import CHOICES, bench_quality
from benchmarks.reading import FORMATS, Case, bench_reading
from flaxlm import cli
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
  assert [result.case for result in results] == list(CHOICES)
  perplexities = [result.median for result in results]
  assert all(1 < perplexity < 300 for perplexity in perplexities)
  assert all(math.isclose(x, perplexities[0], rel_tol=0.05) for x in perplexities)
