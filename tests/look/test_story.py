# SPDX-License-Identifier: Apache-2.0
"""The story's numbers, as they stand in the page, against independent computations."""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from browser import with_chromium
from look_runs import HOSTILE, drive, log_softmax, make_run, page_of, save_run

from flaxlm.cli import main
from flaxlm.config import MoEConfig
from flaxlm.decoding.completions import complete
from flaxlm.decoding.loading import Run, load_run
from flaxlm.decoding.sampling import GREEDY, SamplingSettings
from flaxlm.errors import ConfigError
from flaxlm.look.page import save_view
from flaxlm.look.pieces import make_reading
from flaxlm.look.story import go_on, look_story
from flaxlm.look.story_chapters import Scene, costs, merges_of, tell_positions
from flaxlm.nn.base import Source
from flaxlm.nn.models import build_model
from flaxlm.nn.rnn import init_rnn_cache
from flaxlm.planning.planner import resolve
from flaxlm.sharding import make_mesh
from flaxlm.tokenizers import train_tokenizer

TEXT = "ab, a ba"


def story(run: Run, text: str | None = TEXT, source: str | None = None, **asked: Any):
  """The view, its chapters as the page has them, and the ids that the model read."""
  reading = make_reading(run.model.cfg, run.tokenizer, text, source, 99)
  view = look_story(run, reading, **asked)
  data = page_of(view).view["data"]
  chapters = {chapter["key"]: chapter for chapter in data["chapters"]}
  ids = [token["id"] for token in view.figures["tokens"]]
  # Behind the last layer the lens says what the model says, in every family.
  lens, softmax, at = chapters["lens"], chapters["softmax"], view.figures["at"]
  assert lens["ids"][-1][at] == softmax["best"][:3]
  chances_X = np.sort(np.exp(log_softmax(softmax["logits"])))[::-1][:3]
  np.testing.assert_allclose(lens["chances"][-1, at], chances_X, atol=1e-4)
  return view, chapters, np.array([ids], np.int32)


@pytest.fixture(scope="module")
def decoder() -> tuple[Run, Any]:
  run = make_run("decoder", num_kv_heads=2)
  return run, story(run, layer=0)


def apply(run: Run, tokens_BT: Any, capture: bool = False, **options: Any) -> Any:
  return applied(run.model, capture)(run.params, tokens_BT, options)


@functools.cache
def applied(model: Any, capture: bool) -> Any:
  how = {"capture": True} if capture else {}

  def compute(params: Any, tokens_BT: Any, options: Any) -> Any:
    return model.apply({"params": params}, tokens_BT, **options, **how)

  return jax.jit(compute)


def test_the_logits_and_what_each_layer_would_say(decoder: Any):
  run, (view, chapters, ids_BT) = decoder
  assert not chapters["ids"]["words"], "bytes do not merge"
  logits_TV = np.asarray(apply(run, ids_BT).value[0])
  at, num_ids = view.figures["at"], run.num_ids
  assert at == ids_BT.shape[1] - 1
  softmax = chapters["softmax"]
  np.testing.assert_allclose(softmax["logits"], logits_TV[at, :num_ids], atol=2e-5)
  order = np.argsort(-logits_TV[at, :num_ids])
  assert softmax["best"] == order[:40].tolist()
  lens = chapters["lens"]
  # A model that has only the first layer says what the lens says behind it.
  cfg = run.cfg.model
  for depth in (1, 2):
    short = build_model(type(cfg)(**vars(cfg) | {"depth": depth}))
    params = run.params | {
      "blocks": jax.tree.map(lambda x: x[:depth], run.params["blocks"])
    }
    logits = apply(run._replace(model=short, params=params), ids_BT).value[0, :, :num_ids]
    chances_TV = np.exp(log_softmax(logits))
    best_TX = np.argsort(-chances_TV, -1)[:, :3]
    np.testing.assert_array_equal(np.array(lens["ids"])[depth], best_TX)
    of_best = np.take_along_axis(chances_TV, best_TX, -1)
    np.testing.assert_allclose(lens["chances"][depth], of_best, atol=1e-4)
  table_VD, D = np.asarray(run.params["embedding"]["table"]), cfg.width
  x_TD = table_VD[ids_BT[0]]
  x_TD /= np.sqrt((x_TD**2).mean(-1, keepdims=True) + cfg.norm_epsilon)
  norm_D = np.asarray(run.params["final_norm"]["scale"])
  assert norm_D.shape == (D,)
  head_DV = np.asarray(run.params["head"]["kernel"]) if "head" in run.params else table_VD.T
  said_TV = (x_TD * norm_D) @ head_DV[:, :num_ids]
  np.testing.assert_array_equal(np.array(lens["ids"])[0, :, 0], said_TV.argmax(-1))


def test_the_opened_layer_by_hand(decoder: Any):
  run, (view, chapters, ids_BT) = decoder
  block, cfg = chapters["block"], run.cfg.model
  maps = apply(run, ids_BT, capture=True).attention["self"]
  weights_NTS = np.asarray(maps[0, 0])
  np.testing.assert_allclose(block["maps"][0]["weights"], weights_NTS, atol=1e-4)
  # The last query sees all keys, and RoPE is in the captured vectors already.
  at = view.figures["at"]
  softmax_NS = np.exp(log_softmax(block["scores"]))
  np.testing.assert_allclose(softmax_NS, weights_NTS[:, at], atol=1e-5)
  of = jax.tree.map(lambda x: np.asarray(x[0], np.float64), run.params["blocks"])

  def norm(x_TD: np.ndarray, name: str) -> np.ndarray:
    size = np.sqrt((x_TD**2).mean(-1, keepdims=True) + cfg.norm_epsilon)
    return x_TD / size * of[name]["scale"]

  x_TD = np.asarray(run.params["embedding"]["table"], np.float64)[ids_BT[0]]
  kernels = {name: of["attention"][name]["kernel"] for name in ("v", "o")}
  v_SKH = np.einsum("SD,DKH->SKH", norm(x_TD, "attention_norm"), kernels["v"])
  v_SNH = np.repeat(v_SKH, cfg.num_heads // cfg.num_kv_heads, 1)
  out_TNH = np.einsum("NTS,SNH->TNH", weights_NTS, v_SNH)
  added_TND = np.einsum("TNH,NHD->TND", out_TNH, kernels["o"])
  lengths_TN = np.linalg.norm(added_TND, axis=-1)
  np.testing.assert_allclose(block["heads"], lengths_TN, rtol=1e-4)
  h_TD = norm(x_TD + added_TND.sum(1), "ffn_norm")
  ffn = {name: kernel["kernel"] for name, kernel in of["ffn"].items()}
  gate_TF = h_TD @ ffn["gate"]
  h_TF = gate_TF / (1 + np.exp(-gate_TF)) * (h_TD @ ffn["up"])
  for t, few in enumerate(block["neurons"]):
    best = np.argsort(-np.abs(h_TF[t]))[: len(few)]
    assert [one["neuron"] for one in few] == best.tolist()
    for one in few:
      assert one["value"] == pytest.approx(h_TF[t, one["neuron"]], rel=1e-4)
      assert one["peak"] == np.abs(h_TF[:, one["neuron"]]).argmax()


@pytest.mark.parametrize(("family", "temperature"), [("decoder", 0.9), ("rnn", 0.0)])
def test_the_completion_is_that_of_infer(family: str, temperature: float):
  run = make_run(family, **(dict(num_kv_heads=2) if family == "decoder" else {}))
  settings = SamplingSettings(temperature=temperature, seed=3)
  view, chapters, _ = story(run, settings=settings)
  [done] = complete(run, [TEXT], [settings], 12)
  steps = view.figures["steps"]
  assert [step["id"] for step in steps] == done.tokens
  np.testing.assert_allclose([s["chance"] for s in steps], np.exp(done.logprobs), rtol=1e-4)
  assert view.figures["completion"] == done.completion
  # Its first candidates are the softmax of the page's own logits.
  chances_V = np.exp(log_softmax(chapters["softmax"]["logits"]))
  for best in steps[0]["best"]:
    assert best["chance"] == pytest.approx(chances_V[best["id"]], rel=1e-3)
  said = [best["id"] for best in steps[0]["best"]]
  assert said == chapters["softmax"]["best"][:5]
  if not temperature:
    assert said[0] == done.tokens[0]


def test_vectors_and_their_neighbours(decoder: Any):
  run, (_, chapters, _) = decoder
  one = chapters["vectors"]
  table_VD = np.asarray(run.params["embedding"]["table"], np.float64)[: run.num_ids]
  np.testing.assert_array_equal(one["vectors"], table_VD[one["known"]].astype("f4"))
  units_VD = table_VD / np.linalg.norm(table_VD, axis=1, keepdims=True)
  for id_, near in zip(one["known"], one["neighbours"], strict=True):
    cosines = np.sort(np.delete(units_VD @ units_VD[id_], id_))[::-1]
    found = [neighbour["cosine"] for neighbour in near]
    np.testing.assert_allclose(found, cosines[: len(found)], atol=1e-5)


def test_an_rnn_has_a_state_and_no_attention():
  run = make_run("rnn")
  _, chapters, ids_BT = story(run, layer=1)
  assert "block" not in chapters and "positions" not in chapters
  [chart] = chapters["state"]["charts"]
  states = []
  for count in range(1, ids_BT.shape[1] + 1):  # the cache after each prefix
    cache = init_rnn_cache(run.model.cfg, 1)
    cache = apply(run, jnp.asarray(ids_BT[:, :count]), cache=cache).cache
    states.append(np.asarray(cache.state[1][1, 0]))  # an LSTM's h of the second layer
  np.testing.assert_allclose(chart["values"].T, states, atol=1e-5)
  changes = np.linalg.norm(np.diff(np.array([0 * states[0], *states]), axis=0), axis=-1)
  np.testing.assert_allclose(chapters["state"]["changes"], changes, rtol=1e-4)


def test_an_encoder_fills_its_masks():
  run = make_run("encoder", depth=1)
  view, chapters, ids_BT = story(run, "a[MASK]b[MASK]")
  mask, steps = run.tokenizer.mask_id, view.figures["steps"]
  places = np.flatnonzero(ids_BT[0] == mask).tolist()
  assert [step["at"] for step in steps] == places and len(places) == 2
  logits_TV = np.asarray(apply(run, ids_BT).value[0])[:, : run.num_ids]
  for step in steps:
    chances_V = np.exp(log_softmax(logits_TV[step["at"]]))
    assert step["id"] == chances_V.argmax()
    assert step["chance"] == pytest.approx(chances_V.max(), rel=1e-3)
  assert view.figures["at"] == places[0]
  np.testing.assert_allclose(chapters["softmax"]["logits"], logits_TV[places[0]], atol=2e-5)
  plain, _, ids_BT = story(run, "abc")
  assert "its last token, c, is masked" in plain.cuts[0]
  assert ids_BT[0, plain.figures["at"]] == mask
  with pytest.raises(ConfigError, match="has no mask"):
    story(run._replace(tokenizer=train_tokenizer("byte", [], 0)), "abc")


@pytest.mark.slow
def test_an_encoder_decoder_reads_a_source():
  run = make_run("encoder_decoder", depth=1, encoder_depth=2, positions="relative")
  _, chapters, ids_BT = story(run, "ba", "abc")
  source = [*run.tokenizer.framed(run.tokenizer.encode("abc"), "source")]
  read = Source(np.array([source], np.int32))
  cross = apply(run, ids_BT, source=read, capture=True).attention["cross"]
  by_name = {one["cross"]: one["weights"] for one in chapters["block"]["maps"]}
  np.testing.assert_allclose(by_name[True], np.asarray(cross[0, 0]), atol=1e-4)
  # Without a text, the row is the answer, and the story is about its first token.
  view, chapters, ids_BT = story(run, None, "abc")
  [done] = complete(run, ["abc"], [GREEDY], 12)
  assert ids_BT[0, 1:].tolist() == done.tokens
  assert view.figures["at"] == 0 and "own answer" in view.cuts[0]
  assert chapters["softmax"]["best"][0] == done.tokens[0]


@pytest.mark.slow
def test_experts_that_no_token_chose_change_nothing():
  moe = MoEConfig(num_experts=8, experts_per_token=1)
  run = make_run("decoder", moe=moe, depth=1)
  _, chapters, ids_BT = story(run, "ab")
  chosen = {one for token in chapters["block"]["experts"]["ids"][0] for one in token}
  np.testing.assert_allclose(chapters["block"]["experts"]["shares"].sum(-1), 1, atol=1e-4)
  assert len(chosen) < 8 and chapters["block"]["neurons"] is None
  logits = np.asarray(apply(run, ids_BT).value)
  for expert in (min(chosen), min({*range(8)} - chosen)):
    experts = run.params["blocks"]["ffn"]["experts"]
    down = np.array(experts["down"]["kernel"])
    down[0, expert] = 0
    experts = experts | {"down": {"kernel": down}}
    ffn = run.params["blocks"]["ffn"] | {"experts": experts}
    params = run.params | {"blocks": run.params["blocks"] | {"ffn": ffn}}
    without = np.asarray(apply(run._replace(params=params), ids_BT).value)
    assert (np.abs(without - logits).max() > 1e-4) == (expert in chosen)


def test_merges_end_in_the_tokens_of_the_word():
  run = make_run(depth=1)
  bpe = train_tokenizer("bpe", ["abab abab ba"] * 20, 262)
  run = run._replace(tokenizer=bpe)
  view, chapters, ids_BT = story(run, "abab ba")
  words = [word[-1]["pieces"] for word in chapters["ids"]["words"]]
  labels = [token["label"] for token in view.figures["tokens"]][1:]
  assert [piece for word in words for piece in word] == labels and len(ids_BT[0]) > 1
  masked = train_tokenizer("bpe", ["abab abab ba MASK MASK"] * 20, 270, masked=True)
  scene = Scene(
    run._replace(tokenizer=masked), [], [], 0, 0, {}, ["abab[MASK]"], [], GREEDY
  )
  assert [word[-1]["pieces"] for word in merges_of(scene)] == [["abab"]]
  assert all(word[0]["rank"] is None for word in chapters["ids"]["words"])


def test_what_it_costs():
  run = make_run()
  cfg = resolve(run.cfg)
  found = costs(cfg)
  count = sum(leaf.size for leaf in jax.tree.leaves(run.params))
  assert found["parameters"] == count == sum(found["parts"].values())
  assert found["weight_bytes"] == 4 * count
  # keys and values of every layer, in float32
  assert found["cache_per_token"] == 4 * 2 * cfg.model.depth * cfg.model.width
  assert costs(resolve(make_run("rnn").cfg))["cache_per_token"] is None


def test_learned_positions_and_how_long_they_are():
  run = make_run("decoder", positions="learned", depth=1)
  _, chapters, ids_BT = story(run, "ab")
  table_TD = np.asarray(run.params["positions"]["table"])[: ids_BT.shape[1]]
  lengths_T = np.linalg.norm(table_TD, axis=-1)
  np.testing.assert_allclose(chapters["positions"]["lengths"][1], lengths_T, rtol=1e-4)
  assert [chart["title"] for chart in chapters["positions"]["charts"]] == [
    "Cosine of the vectors of two positions"
  ]


@pytest.mark.parametrize(
  ("positions", "title"), [("none", ""), ("alibi", "bias"), ("relative", "bias")]
)
def test_other_positions_have_their_chart(positions: str, title: str):
  run = make_run("decoder", positions=positions)
  scene = Scene(run, [], [], 0, 0, {}, [], [], GREEDY)
  told = tell_positions(scene)
  assert told["lengths"] is None and len(told["charts"]) == bool(title)
  assert all(title in chart["title"] for chart in told["charts"])


def test_a_text_as_long_as_the_context_is_told():
  run = make_run(depth=1)
  full, chapters, _ = story(run, "a" * 99)
  assert any("room for 0 more tokens" in cut for cut in full.cuts)
  assert full.figures["steps"] == [] and chapters["lens"]["ids"]
  reading = make_reading(run.model.cfg, run.tokenizer, "a" * 43, None, 99)
  told = go_on(run, reading, GREEDY)
  assert told.completion is not None and len(told.completion.tokens) == 4


@pytest.mark.slow
def test_on_a_mesh_as_on_one_device(decoder: Any, tmp_path: Path):
  run, (old, chapters, _) = decoder
  folder = save_run(run, tmp_path / "run")
  sharded = load_run(folder, make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
  new, found, _ = story(sharded, layer=0)
  assert [s["id"] for s in new.figures["steps"]] == [s["id"] for s in old.figures["steps"]]
  for key, name in (("softmax", "logits"), ("block", "heads"), ("block", "scores")):
    np.testing.assert_allclose(found[key][name], chapters[key][name], atol=1e-4)


@pytest.mark.slow
def test_a_page_of_a_large_model_is_below_3_mb(tmp_path: Path):
  run = make_run(depth=12, width=96, num_heads=12, context=300, positions="learned")
  text = "".join(np.random.default_rng(0).choice([*"abcdefgh ,.\n"], 255))
  reading = make_reading(run.model.cfg, run.tokenizer, text, None, 256)
  size = save_view(look_story(run, reading), tmp_path / "story.html")
  logits_of_gpt2 = 50_257 * 4 * 4 // 3  # the tokenizer of this test has 257 ids
  assert size + logits_of_gpt2 < 3e6


# -- The command, and browsers -------------------------------------------------------------


def test_the_command_writes_the_page(in_process: Any, tmp_path: Path):
  folder = save_run(make_run(depth=1), tmp_path / "runs" / "tiny")
  told = in_process("look", "story", folder, "--text", "ab", "--json")
  assert told.returncode == 0, told.stderr
  figures = json.loads(told.stdout)
  assert figures["output"] == str(folder / "look" / "story.html")
  assert [one["name"] for one in figures["costs"]][1:] == ["gpt3_175b", "bloom_176b"]
  assert 174.5e9 < figures["costs"][1]["parameters"] < 174.7e9
  assert figures["costs"][2]["parameters"] == 176_247_271_424
  asked = ("--prompt=ab", "--temperature=0", "--max-new-tokens=12", "--json")
  infer = in_process("infer", folder, *asked)
  assert json.loads(infer.stdout)["completion"] == figures["completion"]


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    ([], "there is no text"),
    (["--text="], "the text is empty"),
    (["--text=a", "--layer=2"], "layers are 0 to 1"),
    (["--text=a", "--temperature=-1"], "temperature is -1"),
    (["--text=a", "--source=b"], "leave --source out"),
  ],
)
def test_a_mistake_is_told_in_one_line(
  flags: list[str], words: str, tmp_path: Path, capsys: Any
):
  folder = save_run(make_run(), tmp_path / "tiny")
  shutil.rmtree(folder / "checkpoints")
  assert main(["look", "story", str(folder), *flags]) == 2
  out, err = capsys.readouterr()
  assert words in err and err.startswith("flaxlm: ") and not out
  assert not (folder / "look").exists()


def test_a_run_without_a_checkpoint_is_refused(tmp_path: Path, capsys: Any):
  folder = save_run(make_run(), tmp_path / "tiny")
  shutil.rmtree(folder / "checkpoints")
  assert main(["look", "story", str(folder), "--text=a"]) == 4
  assert "has no checkpoint yet" in capsys.readouterr().err


# Moves the sliders and walks as the keyboard does, and keeps what the page then shows.
DRIVER = """
  const body = document.getElementById("softmax");
  const [heat, k, p] = document.querySelectorAll("input[type=range]");
  const set = (range, value) => {
    range.value = value;
    range.dispatchEvent(new Event("input"));
  };
  set(heat, 0.5); found.cold = body.dataset.best;
  set(heat, 2); found.hot = body.dataset.best;
  set(k, 7); found.k = body.dataset.kept;
  set(heat, 1); set(p, 0.5); found.both = body.dataset.kept;
  set(k, k.max); found.p = body.dataset.kept;
  const rounds = document.getElementById("chapter-rounds");
  for (let i = 0; i < 20; i++) press(rounds, "ArrowRight");
  press(rounds, "ArrowLeft");
  found.written = [...rounds.querySelectorAll("mark")].map((one) => one.textContent);
"""


@with_chromium
@pytest.mark.parametrize(
  ("family", "text", "source"),
  [
    ("decoder", HOSTILE[:30], None),
    pytest.param("rnn", HOSTILE[:30], None, marks=pytest.mark.slow),
    pytest.param("encoder", "a[MASK]" + HOSTILE[:20], None, marks=pytest.mark.slow),
    pytest.param("encoder_decoder", None, HOSTILE[:20], marks=pytest.mark.slow),
  ],
)
def test_a_browser_tells_it_and_computes_the_softmax(
  family: str, text: str | None, source: str | None, tmp_path: Path
):
  view, chapters, _ = story(make_run(family, depth=1), text, source)
  found = drive(view, tmp_path / "story.html", DRIVER)
  logits_V = chapters["softmax"]["logits"]
  best = lambda T: np.exp(log_softmax(logits_V / T)).max()
  assert float(found["cold"]) == pytest.approx(best(0.5), rel=1e-5)
  assert float(found["hot"]) == pytest.approx(best(2), rel=1e-5)
  chances_V = np.sort(np.exp(log_softmax(logits_V)))[::-1]
  fewest = int(np.searchsorted(np.cumsum(chances_V), 0.5)) + 1
  assert found["k"] == "7" and found["p"] == str(fewest)
  seven = np.cumsum(chances_V[:7]) / chances_V[:7].sum()  # top-p of what top-k has left
  assert found["both"] == str(int(np.searchsorted(seven, 0.5)) + 1)
  labels = [step["label"] for step in view.figures["steps"]]
  if family != "encoder":
    assert found["written"] == labels[:-1]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["decoder", "rnn", "encoder"])
def test_a_story_as_a_png(family: str, tmp_path: Path):
  pytest.importorskip("matplotlib")
  text = "a" * 99 if family == "decoder" else HOSTILE[:30]  # no room for a completion
  view, _, _ = story(make_run(family, depth=1, num_heads=8), text)
  assert bool(view.figures["steps"]) == (family != "decoder")
  assert save_view(view, tmp_path / "story.png") > 20_000
