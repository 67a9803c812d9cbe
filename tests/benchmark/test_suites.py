# SPDX-License-Identifier: Apache-2.0
"""Every suite runs, tiny, and its gates hold. What they say of speed nobody reads here."""

import importlib.util
import json
import os

import jax.numpy as jnp
import numpy as np
import pytest

from flaxlm import cli
from flaxlm.benchmark import collectives, decode, loss, matmul, optimizer, suites
from flaxlm.benchmark.attention import Shape, operands, paths
from flaxlm.benchmark.measure import Setting
from flaxlm.benchmark.report import UNITS
from flaxlm.commands import bench
from flaxlm.decoding.generate import generate
from flaxlm.decoding.sampling import make_sampling
from flaxlm.errors import ConfigError, FlaxLMError
from flaxlm.sharding import make_mesh
from tests.benchmark.test_report import CONTRACT

TINY = Setting(size="tiny", rounds=1, round_seconds=0.0)


def test_the_command_knows_every_suite():
  assert list(bench.SUITES) == list(suites.SUITES)


@pytest.mark.parametrize(
  "name",
  [
    "matmul",
    "memory",
    "attention",
    "loss",
    "optimizer",
    "train",
    "decode",
    "data",
    "predictions",
  ],
)
def test_a_suite_runs_and_its_gates_hold(name: str):
  results = suites.SUITES[name](TINY)
  assert results
  for result in results:
    assert result.suite == name and result.unit in UNITS
    assert 0 < result.low <= result.median <= result.high
    assert result.correct, result.case
  assert len({result.case for result in results}) == len(results)


def test_lines_of_a_run(capsys):
  """Printed as JSON, judged by ceilings that were measured on the way."""
  assert cli.main(["bench", "loss", "--size=tiny", "--rounds=1", "--json"]) == 0
  lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert len(lines) == 2
  for line in lines:
    assert line.keys() >= CONTRACT
    assert line["peak_fraction"] is None  # a CPU's is not published


def test_the_suffix_decides_what_is_written(tmp_path):
  lines, page = tmp_path / "a.jsonl", tmp_path / "a.html"
  for path in (lines, page):
    assert (
      cli.main(["bench", "matmul", "--size=tiny", "--rounds=1", f"--output={path}"]) == 0
    )
  assert json.loads(lines.read_text("utf-8").splitlines()[0])["suite"] == "matmul"
  assert page.read_text("utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize(
  ("arguments", "error"),
  [
    (["nonsense"], "unknown suite 'nonsense'"),
    (["matmul", "--rounds=0"], "at least 1"),
    (["data", "--vs=torch"], "torch has no part in data"),
    (["matmul", "--vs=llama.cpp"], "llama.cpp has no part in matmul"),
    (["matmul", "--output=/nowhere/x"], "cannot be written"),
  ],
)
def test_mistakes_are_told(arguments: list[str], error: str, capsys):
  assert cli.main(["bench", *arguments, "--size=tiny"]) == 2
  assert error in capsys.readouterr().err


def test_what_is_not_installed_is_told(monkeypatch):
  find = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, "find_spec", lambda name: None if name == "torch" else find(name)
  )
  with pytest.raises(ConfigError, match="torch is not installed"):
    suites.check_peer(["matmul"], "torch")


def test_all_leaves_out_what_takes_minutes():
  assert set(suites.SUITES) - set(suites.APART) >= {"matmul", "decode", "compile"}


# -- What the figures mean -----------------------------------------------------------------


@pytest.mark.parametrize("kind", collectives.KINDS)
@pytest.mark.parametrize("axis", ["data", "tensor"])
def test_collectives_do_what_they_are_called(kind: str, axis: str):
  mesh = make_mesh({"data": 4, "tensor": 2})
  result = collectives.bench_collective(kind, axis, 256, mesh, TINY)
  assert result.correct == "every device agrees to 0.0e+00"


def test_a_gather_is_what_its_name_says():
  """The reference itself, by hand: two devices hold 0 1 and 2 3."""
  mesh = make_mesh({"data": 2, "tensor": 4})
  whole = np.repeat(np.array([[0, 1], [2, 3]]), 4, 0)
  of = lambda kind: collectives.reference(kind, whole, mesh, "data")[[0, 4]].tolist()
  assert of("all_gather") == [[0, 1, 2, 3]] * 2
  assert of("all_reduce") == [[2, 4]] * 2
  assert of("reduce_scatter") == [[2], [4]]
  assert of("all_to_all") == [[0, 2], [1, 3]]
  assert of("permute") == [[2, 3], [0, 1]]


def test_one_device_has_no_collectives(flaxlm):
  run = flaxlm("bench", "collectives", "--size=tiny")
  assert run.returncode == 2 and "--simulated-devices 8" in run.stderr


def test_flops_of_a_product():
  assert matmul.Product(2, 3, 4, batch=5).flops == 240
  assert matmul.Product(2, 3, 4, batch=5).elements == 5 * (6 + 12 + 8)


def test_a_wrong_product_is_not_timed(monkeypatch):
  monkeypatch.setattr(matmul, "multiply", lambda a, b: 1.01 * (a @ b))
  with pytest.raises(FlaxLMError, match="a speed without a result"):
    matmul.bench_product(matmul.Product(8, 8, 8), "float32", TINY)


def test_attention_does_half_of_the_square():
  from flaxlm.benchmark.attention import work_of

  work = work_of(Shape(B=1, T=100, N=2, K=1, H=8), "float32", backward=False)
  assert work.flops == 4 * 2 * 8 * 100 * 50
  assert work.bytes == 4 * 100 * 8 * (2 + 1 + 1 + 2)
  assert work_of(Shape(1, 100, 2, 1, 8), "float32", True).flops == 3 * work.flops


def test_paths_differ_from_attention_without_a_mask():
  """The gate can fail: a path that sees later tokens would not pass it."""
  shape = Shape(1, 16, 2, 1, 8)
  q, k, v, _ = operands(shape, "float32")
  causal = paths(shape, "float32")["plain"](q, k, v)
  full = jnp.einsum("BTNS,BSNH->BTNH", jnp.ones((1, 16, 2, 16)) / 16, jnp.repeat(v, 2, 2))
  assert not np.allclose(causal, full, atol=1e-1)


def test_loss_reference():
  """ln(1 + e) where the target is one of two and the other is higher by 1."""
  x, head = np.ones((3, 1)), np.array([[0.0, 1.0]])
  assert loss.reference(x, head, np.zeros(3, int)) == pytest.approx(np.log(1 + np.e))


def test_flops_of_muon():
  """5 iterations on (n, m) = (8, 32) and on its transpose, and on four of (8, 8)."""
  params = optimizer.make_params(1, 8)
  tall, square = 2 * 64 * 32 * 2 + 2 * 512, 2 * 64 * 8 * 2 + 2 * 512
  assert optimizer.muon_flops(params) == 5 * (2 * tall + 4 * square)


def test_an_update_up_the_hill_is_refused():
  with pytest.raises(FlaxLMError, match="without a result"):
    optimizer.shortens("sgd", {"x": jnp.ones(2)}, {"x": 2 * jnp.ones(2)})


def test_an_answer_that_is_not_the_likeliest_is_refused():
  cfg, prompt, new = decode.shape_of(TINY)
  model, params = decode.random_model(cfg)
  request = decode.random_request(cfg, 2, prompt, new)
  with pytest.raises(FlaxLMError, match="without a result"):
    decode.check(model, params, request, np.zeros((2, new), int))
  greedy = make_sampling(2, temperature=0.0)
  ours = decode.whole_answer(generate(model, params, request, greedy))
  theirs = ours.copy()
  assert "100.0%" in decode.check_both(model, params, request, ours, theirs)
  theirs[1, -1] = (ours[1, -1] + 1) % cfg.model.vocab_size
  for sides in ((ours, theirs), (theirs, ours)):
    with pytest.raises(FlaxLMError, match="without a result"):
      decode.check_both(model, params, request, *sides)


# -- Peers ---------------------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.skipif(
  importlib.util.find_spec("torch") is None and "FLAXLM_REQUIRE_PARITY" not in os.environ,
  reason="needs PyTorch",
)
@pytest.mark.parametrize("name", ["matmul", "attention", "train", "decode"])
def test_peers_do_the_same(name: str):
  results = suites.SUITES[name](Setting("tiny", 1, 0.0, peer="torch"))
  compared = [result for result in results if result.peer]
  assert compared
  for result in compared:
    assert result.ratio and result.correct


@pytest.mark.parity
@pytest.mark.skipif(
  # The extra does not bring it: it is compiled for a quarter of an hour.
  not all(map(importlib.util.find_spec, ("llama_cpp", "gguf"))),
  reason="needs llama-cpp-python and gguf",
)
def test_llama_cpp_does_the_same():
  results = suites.SUITES["decode"](Setting("tiny", 1, 0.0, peer="llama.cpp"))
  (compared,) = (result for result in results if result.peer)
  assert compared.peer == "llama.cpp" and compared.ratio and compared.correct
