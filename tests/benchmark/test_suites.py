# SPDX-License-Identifier: Apache-2.0
"""Every suite runs on tiny cases, and what it computes is correct; no speed is tested."""

import argparse
import importlib.util
import io
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import slow

from flaxlm import cli
from flaxlm.benchmark import measure, repeat
from flaxlm.benchmark.ceilings import Ceilings
from flaxlm.benchmark.measure import BenchOptions
from flaxlm.benchmark.report import UNITS, Result, as_json
from flaxlm.benchmark.suites import collectives, decode, loss, matmul, optimizer, run
from flaxlm.benchmark.suites.attention import (
  AttentionShape,
  attention_demand,
  operands,
  paths,
)
from flaxlm.commands import bench
from flaxlm.decoding.generate import generate
from flaxlm.decoding.sampling import make_sampling
from flaxlm.errors import ConfigError, FlaxLMError
from flaxlm.sharding import make_mesh
from tests.benchmark.test_report import CONTRACT

TINY = BenchOptions(size="tiny", rounds=1, round_seconds=0.0)


def test_json_lines_come_from_several_processes(monkeypatch, tmp_path):
  """Of which this test starts none."""
  commands = []

  def run(*command: str) -> str:
    commands.append(command)
    output = next(a for a in command if a.startswith("--output=")).removeprefix("--output=")
    values = {"median": 1.0 + len(commands), "low": 1.0, "high": 9.0, "unit": "s"}
    result = Result("loss", "x", device="d", **values)
    Path(output).write_text(as_json(result) + "\n")
    return ""

  monkeypatch.setattr(repeat, "run_python", run)
  path = tmp_path / "a.jsonl"
  assert cli.main(["bench", "loss", "--size=tiny", "--rounds=2", f"--output={path}"]) == 0
  found = [json.loads(one) for one in path.read_text().splitlines()]
  (one,) = found
  assert (one["median"], one["low"], one["high"]) == (3, 1, 9)
  assert (one["processes"], one["drift"]) == (3, 1.0)
  assert all({"loss", "--size=tiny", "--rounds=2"} < {*c} for c in commands)
  assert len(commands) == 3
  assert cli.main(["bench", "loss", "--processes=2"]) == 2, "a table is of one process"


def test_the_command_knows_every_suite():
  assert list(bench.SUITES) == list(run.SUITES)


@pytest.mark.parametrize(
  "name",
  [
    "matmul",
    "memory",
    "attention",
    "loss",
    slow("optimizer"),
    slow("train"),
    slow("decode"),
    "data",
  ],
)
def test_a_suite_runs_and_its_gates_hold(name: str):
  check_results(name, run.SUITES[name](TINY))


def check_results(name: str, results: list[Result]) -> None:
  assert results
  for result in results:
    assert result.suite == name and result.unit in UNITS
    assert 0 < result.low <= result.median <= result.high
    assert result.correct, result.case
  assert len({result.case for result in results}) == len(results)


def test_lines_of_a_run(tmp_path, capsys):
  """Written to a file, with fractions of ceilings that were measured on the way."""
  path = tmp_path / "a.jsonl"
  asked = ["bench", "loss", "--size=tiny", "--rounds=1", "--processes=1"]
  assert cli.main([*asked, f"--output={path}"]) == 0
  assert capsys.readouterr().out == ""
  lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
  assert len(lines) == 2
  for line in lines:
    assert line.keys() >= CONTRACT
    assert line["peak_fraction"] is None  # a CPU's is not published


def test_a_process_that_fails_hands_on_its_exit_code():
  with pytest.raises(FlaxLMError, match="failed: told to") as error:
    measure.run_python("-c", "import sys; print('told to', file=sys.stderr); sys.exit(8)")
  assert error.value.exit_code == 8


@pytest.mark.parametrize(
  ("output", "as_json", "start"),
  [
    (None, False, "suite"),
    (None, True, '{"suite": "s"'),
    ("a.jsonl", False, '{"suite": "s"'),
    ("a.html", False, "<!doctype html>"),
  ],
)
def test_flag_and_suffix_decide_what_is_written(output, as_json, start):
  out, args = io.StringIO(), argparse.Namespace(output=output, json=as_json)
  bench.write([Result("s", "c", 1.0, 1.0, 1.0, "ms")], Ceilings({}, {}), args, out)
  assert out.getvalue().startswith(start)


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
    run.check_peer(["matmul"], "torch")


@pytest.mark.parametrize("name", bench.MOVED)
def test_what_moved_out_of_the_package_is_told(name: str, capsys):
  assert cli.main(["bench", name]) == 2
  assert f"python -m benchmarks.{name}" in capsys.readouterr().err
  assert importlib.util.find_spec(f"benchmarks.{name}")


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


def test_one_device_has_no_collectives(monkeypatch):
  one_device = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
  monkeypatch.setattr(collectives, "make_mesh", lambda _: one_device)
  with pytest.raises(ConfigError, match="--simulated-devices 8"):
    collectives.bench_collectives(TINY)


def test_flops_of_a_product():
  assert matmul.Product(2, 3, 4, batch=5).flops == 240
  assert matmul.Product(2, 3, 4, batch=5).elements == 5 * (6 + 12 + 8)


def test_a_wrong_product_is_not_timed(monkeypatch):
  monkeypatch.setattr(matmul, "multiply", lambda a, b: 1.01 * (a @ b))
  with pytest.raises(FlaxLMError, match="a speed without a result"):
    matmul.bench_product(matmul.Product(8, 8, 8), "float32", TINY)


def test_attention_does_half_of_the_square():
  demand = attention_demand(
    AttentionShape(B=1, T=100, N=2, K=1, H=8), "float32", backward=False
  )
  assert demand.flops == 4 * 2 * 8 * 100 * 50
  assert demand.bytes == 4 * 100 * 8 * (2 + 1 + 1 + 2)
  assert (
    attention_demand(AttentionShape(1, 100, 2, 1, 8), "float32", True).flops
    == 3 * demand.flops
  )


def test_paths_differ_from_attention_without_a_mask():
  """The gate can fail: a path that sees later tokens would not pass it."""
  shape = AttentionShape(1, 16, 2, 1, 8)
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


@pytest.mark.slow
def test_an_answer_that_is_not_the_likeliest_is_refused():
  cfg, prompt, new = decode.llama_shape(TINY)
  model, params = decode.random_model(cfg)
  request = decode.random_request(cfg, 2, prompt, new)
  with pytest.raises(FlaxLMError, match="without a result"):
    decode.check_likeliest(model, params, request, np.zeros((2, new), int))
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
  results = run.SUITES[name](BenchOptions("tiny", 1, 0.0, peer="torch"))
  compared = [result for result in results if result.peer]
  assert compared
  assert all(result.unit in UNITS for result in results)
  for result in compared:
    assert result.ratio and result.correct


@pytest.mark.parity
@pytest.mark.skipif(
  # The extra does not bring it: it is compiled for a quarter of an hour.
  not all(map(importlib.util.find_spec, ("llama_cpp", "gguf"))),
  reason="needs llama-cpp-python and gguf",
)
def test_llama_cpp_does_the_same():
  results = run.SUITES["decode"](BenchOptions("tiny", 1, 0.0, peer="llama.cpp"))
  (compared,) = (result for result in results if result.peer)
  assert compared.peer == "llama.cpp" and compared.ratio and compared.correct
