# SPDX-License-Identifier: Apache-2.0
"""Embeddings, positions and runs: what is drawn equals an independent computation."""

import dataclasses
import json
import shutil
import typing
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import slow
from look_runs import BYTES, make_run, page_of, save_run

from flaxlm.config import ModelConfig, RopeConfig, to_json
from flaxlm.errors import CheckpointError, ConfigError
from flaxlm.look.embeddings import (
  look_embeddings,
  nearest,
  principal,
  table_before,
  to_directions,
)
from flaxlm.look.pieces import sort_of
from flaxlm.look.positions import SAYS, look_positions
from flaxlm.look.runs import look_run
from flaxlm.nn.positions import (
  alibi_bias,
  relative_buckets,
  rotate,
  rotation,
  sinusoids,
  stretched_frequencies,
)
from flaxlm.origin import checkpoint_of, write_origin
from flaxlm.training.optimizer import build_optimizer
from flaxlm.training.step import init_state

# -- Embeddings ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 8), (5, 12), (2, 3), (6, 1)])
def test_the_plane_is_that_of_an_independent_pca(shape: tuple[int, int]):
  table = np.random.default_rng(1).normal(size=shape) @ np.diag(np.arange(shape[1]) + 1.0)
  points, shares = principal(table)
  u, s, _ = np.linalg.svd(table - table.mean(0), full_matrices=False)
  count = min(2, len(s))
  np.testing.assert_allclose(np.abs(points[:, :count]), np.abs(u * s)[:, :2], atol=1e-6)
  np.testing.assert_allclose(shares[:count], s[:2] ** 2 / (s**2).sum(), atol=1e-9)


def test_neighbours_are_by_cosine():
  table = np.random.default_rng(2).normal(size=(50, 6))
  ids, cosines = nearest(table)
  for n in (0, 17, 49):
    others = [m for m in range(50) if m != n]
    norm = np.linalg.norm
    of = {m: table[n] @ table[m] / norm(table[n]) / norm(table[m]) for m in others}
    best = sorted(of, key=lambda m: -of[m])[:10]
    assert ids[n].tolist() == best
    np.testing.assert_allclose(cosines[n], [of[m] for m in best], atol=1e-12)


@pytest.mark.parametrize(
  "family", ["decoder", slow("encoder"), slow("encoder_decoder"), slow("rnn")]
)
def test_the_embedding_of_every_family(family: str):
  run = make_run(family, depth=1)
  page = page_of(look_embeddings(run, 60)).view
  table = np.asarray(run.params["embedding"]["table"])[:60]
  after, before = page["data"]["moments"]
  np.testing.assert_allclose(after["norms"], np.linalg.norm(table, axis=1), rtol=1e-5)
  assert after["plane"].shape == (60, 2) and page["data"]["points"].shape == (60, 2)
  np.testing.assert_array_equal(after["nearest"], nearest(table.astype(float))[0])
  np.testing.assert_allclose(after["solid"].std(0), 1, rtol=1e-5)
  correlations = np.corrcoef(after["solid"].T)
  np.testing.assert_allclose(correlations, np.eye(3), atol=1e-5)
  first = initial_table(run)[:60]
  np.testing.assert_allclose(before["norms"], np.linalg.norm(first, axis=1), rtol=1e-5)
  np.testing.assert_array_equal(before["nearest"], nearest(first.astype(float))[0])
  assert len(page["data"]["tokens"]) == 60 == page["figures"]["num_tokens"]
  assert "60 of" in page["cuts"][0]
  whole = look_embeddings(run)
  assert whole.figures["num_tokens"] == run.tokenizer.vocab_size and not whole.cuts
  with pytest.raises(ConfigError, match="the tokenizer has"):
    look_embeddings(run, 1000)


def initial_table(run) -> np.ndarray:
  """The table with which training begins, made by training's own function."""
  optimizer = build_optimizer(run.cfg.optimizer, 10)
  state = init_state(run.model, optimizer, run.mesh, run.cfg.seed)
  return np.asarray(state.params["embedding"]["table"])


def test_before_training_is_what_it_began_from(tmp_path: Path):
  other = make_run(name="first")
  folder = save_run(other, tmp_path / "first")
  run = make_run(name="second")._replace(path=tmp_path / "second")
  run.path.mkdir()
  write_origin(run.path, checkpoint_of(folder, 7))
  table, name = table_before(run)
  np.testing.assert_array_equal(table, other.params["embedding"]["table"])
  assert name == "before, as first had it at step 7"
  shutil.rmtree(folder)
  table, why = table_before(run)
  assert table is None and "it is gone" in why
  imported = make_run()._replace(step=0)
  table, why = table_before(imported)
  assert table is None and why in look_embeddings(imported, 20).notes


def test_directions_have_no_mean_to_share_and_one_length():
  table = np.random.default_rng(3).normal(size=(30, 5)) * np.arange(1, 31)[:, None] + 4
  directions = to_directions(table)
  np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1)
  moved = to_directions(3 * table - 7)
  np.testing.assert_allclose(moved, directions, atol=1e-12)
  assert not to_directions(np.ones((3, 4))).any()


def test_sorts_of_tokens():
  sorts = {
    text: sort_of(BYTES, BYTES.encode(text)[0]) for text in (" ", "7", "!", "a", "é")
  }
  assert [*sorts.values()] == [
    *("blank", "number", "punctuation", "word without a blank", "part of a character")
  ]
  assert sort_of(BYTES, BYTES.eos_id) == "special"


# -- Positions -----------------------------------------------------------------------------


def model(**fields) -> ModelConfig:
  return ModelConfig(
    **dict(width=32, num_heads=4, context=40, vocab_size=64) | fields
  ).resolve()


def charts_of(cfg, params=None):
  page = page_of(look_positions(cfg, "a", "b", params)).view
  return {chart["title"]: chart for chart in page["data"]["charts"]}, page["figures"]


ROPES = {
  "plain": dict(),
  "partial": dict(fraction=0.5),
  "linear": dict(scaling="linear", factor=4),
  "yarn": dict(scaling="yarn", factor=4),
  "llama3": dict(scaling="llama3", factor=4, fast_turns=4.0),
}


@pytest.mark.parametrize("name", ROPES)
def test_rotations_are_the_models(name: str):
  cfg = model(rope=RopeConfig(**ROPES[name]))
  charts, figures = charts_of(cfg)
  num_dims = figures["G"]["rotated_dims"]
  speeds, _ = stretched_frequencies(num_dims, cfg.rope)
  np.testing.assert_allclose(
    figures["G"]["wavelengths"], 2 * np.pi / np.array(speeds), rtol=1e-4
  )
  cosines_PT = charts["The cosine of each pair's angle"]["values"]
  angles_PT = np.outer(speeds, np.arange(cfg.context))
  np.testing.assert_allclose(cosines_PT, np.cos(angles_PT), atol=1e-5)
  assert np.abs(cosines_PT).max() <= 1
  cos, _ = rotation(jnp.zeros((1, 1)), cfg.head_dim, cfg.rope, False)
  assert figures["G"]["attention_scale"] == pytest.approx(float(cos[0, 0, 0]))
  assert ("divided out" in str(charts)) == (name == "yarn")
  # The score of two vectors of ones at positions (d, 0), through the model's own rotation.
  at = figures["G"]["distances"]
  assert at == [*range(cfg.context)]
  cos_sin = rotation(jnp.array([at]), cfg.head_dim, cfg.rope, False)
  turned = rotate(jnp.ones((1, len(at), 1, num_dims)), cos_sin)[0, :, 0]
  scores = turned @ turned[0]
  np.testing.assert_allclose(figures["G"]["scores"], scores / scores[0], atol=1e-5)
  series = charts["Score of equal queries and keys, by distance"]["series"]
  assert len(series) == 1 + (name in ("linear", "yarn", "llama3"))


def test_local_layers_turn_by_themselves():
  rope = RopeConfig(theta=1e6, local_theta=1e4, scaling="linear", factor=8)
  cfg = model(rope=rope, window=8, layer_pattern="LG")
  charts, figures = charts_of(cfg)
  assert figures["L"]["theta"] == 1e4 and figures["L"]["scaling"] == "none"
  assert figures["G"]["theta"] == 1e6 and figures["G"]["scaling"] == "linear"
  assert len(charts) == 6 and "The cosine of each pair's angle (local layers)" in charts
  assert figures["G"]["wavelengths"][0] == pytest.approx(8 * figures["L"]["wavelengths"][0])


def test_no_pair_turns():
  charts, figures = charts_of(model(rope=RopeConfig(fraction=0.0)))
  assert not charts and figures["G"]["rotated_dims"] == 0


def test_sinusoids_are_the_models():
  cfg = model(positions="sinusoidal")
  charts, figures = charts_of(cfg)
  table = np.asarray(sinusoids(jnp.arange(cfg.context)[None], cfg.width))[0]
  np.testing.assert_array_equal(charts["The vector of each position"]["values"], table)
  norm = np.linalg.norm
  cosine = table[0] @ table[9] / norm(table[0]) / norm(table[9])
  assert figures["cosines"][9] == pytest.approx(cosine, abs=1e-5), "by distance alone"
  assert figures["cosines"][0] == pytest.approx(1)


def test_a_long_table_is_thinned_evenly():
  cfg = model(positions="sinusoidal", context=1000)
  charts, figures = charts_of(cfg)
  chart = charts["The vector of each position"]
  assert chart["rows"] == [*range(0, 1000, 4)] and figures["distances"][1] == 4
  table = np.asarray(sinusoids(jnp.array([chart["rows"]]), cfg.width))[0]
  np.testing.assert_array_equal(chart["values"], table)


@pytest.mark.parametrize("family", ["decoder", "encoder_decoder"])
def test_learned_vectors_are_the_runs(family: str):
  run = make_run(family, positions="learned")
  charts, _ = charts_of(run.model.cfg, run.params)
  stacks = ["encoder", "decoder"] if family == "encoder_decoder" else [""]
  for stack in stacks:
    table = (run.params[stack] if stack else run.params)["positions"]["table"]
    title = "The vector of each position" + (f" ({stack})" if stack else "")
    np.testing.assert_array_equal(charts[title]["values"], table)
  view = look_positions(run.model.cfg, "a", "b")
  assert "Untrained" in view.notes[-1]


@pytest.mark.parametrize("num_heads", [3, 32])
def test_alibi_is_the_models(num_heads: int):
  cfg = model(positions="alibi", num_heads=num_heads, width=96)
  charts, figures = charts_of(cfg)
  (chart,) = charts.values()
  bias_NTS = np.asarray(alibi_bias(jnp.arange(40)[None], 40, num_heads, True))[0]
  if num_heads > 16:
    drawn = chart["values"]
    distances = chart["columns"]
  else:
    drawn = [series["y"] for series in chart["series"]]
    distances = chart["series"][0]["x"]
  assert distances == [*range(40)]
  np.testing.assert_allclose(drawn, bias_NTS[:, 39, ::-1], rtol=1e-6)
  np.testing.assert_allclose(figures["slopes"], -bias_NTS[:, 1, 0], rtol=1e-6)


def test_relative_bias_is_the_runs():
  run = make_run("encoder_decoder", positions="relative", relative_buckets=8)
  cfg = run.model.cfg
  charts, _ = charts_of(cfg, run.params)
  for stack, causal in (("encoder", False), ("decoder", True)):
    chart = charts[f"The bias of each head ({stack})"]
    at = chart["series"][0]["x"]
    assert at == [*range(-47, 1 if causal else 48)]
    buckets = relative_buckets(jnp.array(at), 8, cfg.relative_distance, causal)
    table = run.params[stack]["relative_bias"]["table"]
    drawn = [series["y"] for series in chart["series"]]
    np.testing.assert_allclose(np.transpose(drawn), table[np.asarray(buckets)], rtol=1e-6)


def test_no_positions_say_so():
  view = look_positions(model(positions="none"), "a", "b")
  assert "has no positions" in view.notes[1] and not view.data["charts"]


def test_every_kind_of_positions_has_a_word():
  kinds = typing.get_args(typing.get_type_hints(ModelConfig)["positions"])
  assert set(SAYS) == set(kinds)


# -- Runs ----------------------------------------------------------------------------------


def test_a_runs_curves_are_its_metrics(tmp_path: Path):
  run = make_run()
  cfg = dataclasses.replace(run.cfg, seed=5)
  (tmp_path / "config.json").write_text(to_json(cfg))
  with pytest.raises(CheckpointError, match="no metrics"):
    look_run(tmp_path)
  lines = [{"step": n, "train/loss": 4.0 - n, "perf/other": n} for n in (1, 2, 3)]
  lines[1]["train/loss"] = float("nan")  # as older runs have it
  lines[2]["train/gradient_norm"] = None
  lines[0] |= {"perf/mfu": 0.4, "perf/goodput": 0.9, "perf/elapsed_seconds": 60.0}
  lines[0] |= {"perf/data_wait_fraction": 0.1, "perf/memory_gb": 70.5}
  lines.append({"step": 3, "eval/loss": 2.5, "eval/bits_per_byte": 1.5})
  text = "".join(f"{json.dumps(line)}\n" for line in lines)
  (tmp_path / "metrics.jsonl").write_text(text + '{"step": 4, "train/lo')
  (tmp_path / "log.txt").write_text("a line\nthe last </script>\n")
  (tmp_path / "sample.txt").write_text("def f():\n  pass\n")
  page = page_of(look_run(tmp_path)).view
  charts = {chart["title"]: chart["series"] for chart in page["data"]["charts"]}
  training, held_out = charts["Loss"]
  assert (training["x"], training["y"]) == ([1, 2, 3], [3, None, 1])
  assert (held_out["x"], held_out["y"]) == ([3], [2.5])
  assert charts["perf/other"][0]["y"] == [1, 2, 3], "nothing is left out"
  drawn = {
    name: [x["y"][0] for x in charts[name]] for name in ("MFU, strict", "Share of time")
  }
  assert drawn == {"MFU, strict": [0.4], "Share of time": [0.9, 0.1]}
  assert charts["Memory"][0]["y"] == [70.5] and "perf/elapsed_seconds" not in charts
  assert charts["Gradient norm"][0]["y"] == [None]
  assert page["figures"]["last"]["eval/bits_per_byte"] == 1.5
  assert page["figures"]["best"]["train/loss"] == 1
  assert page["figures"]["last_step"] == 3
  fields = {row["name"]: row for row in page["data"]["config"]}
  assert fields["seed"]["value"] == "5" and fields["seed"]["chosen"]
  assert fields["model.gated"]["value"] == "true" and not fields["model.gated"]["chosen"]
  assert page["data"]["sample"] == "def f():\n  pass"
  assert page["data"]["log"][-1] == "the last </script>"
