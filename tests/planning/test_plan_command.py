# SPDX-License-Identifier: Apache-2.0
"""`flaxlm plan`, as scripts and users call it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flaxlm.cli import main
from flaxlm.config import load_config
from flaxlm.planning.planner import resolve

MESH = "data=2@dcn,fsdp=8"
CONFIG = """
from flaxlm.config import Config, DataConfig, ModelConfig, TrainingConfig
config = Config(
  model=ModelConfig(
    depth=32, width=4096, num_heads=32, num_kv_heads=8, ffn_width=14_336,
    vocab_size=128_256, context=8192, tied_embeddings=False,
  ),
  data=DataConfig(seq_len=2048, batch_size=16),
  training=TrainingConfig(dtype="bfloat16", scanned=True),
)
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
  path = tmp_path / "llama3_8b.py"
  path.write_text(CONFIG)
  return str(path)


@pytest.fixture
def plan(config: str, capsys: pytest.CaptureFixture):
  def run(*arguments: str) -> dict:
    code = main(["plan", config, *arguments, "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)

  return run


def test_the_contract_of_json(plan):
  result = plan("--mesh", "fsdp=8", "--device", "h200", "--training.remat=full")
  assert result["parameters"] == 8_030_261_248
  parts = dict(result["bytes_per_device"])
  assert parts.pop("total") == sum(parts.values())
  assert {"parameters", "optimizer_state", "activations"} <= set(parts)
  assert parts["parameters"] == 4 * 8_030_261_248 / 8 + 4 * (7 / 8) * 65 * 4096
  assert result["fits"] is True
  assert result["step_seconds"] > 0
  assert result["tokens_per_second"] == pytest.approx(16 * 2048 / result["step_seconds"])
  assert 0 < result["mfu"] < result["loose_mfu"] < 1
  assert result["limited_by"] == "compute"
  assert result["chinchilla_tokens"] == 20 * result["parameters"]
  assert "compiled" not in result and "search" not in result


def test_what_does_not_fit_gets_a_cure(plan, config, capsys):
  asked = ("--mesh", "data=2", "--device", "h200")
  result = plan(*asked)
  assert result["fits"] is False
  assert result["cheapest_fit"]["fits"] is True
  assert result["cheapest_fit"]["num_devices"] == 2  # another mesh is enough
  assert main(["plan", config, *asked]) == 0
  out = capsys.readouterr().out
  assert "DOES NOT FIT" in out and result["cheapest_fit"]["flags"] in " ".join(out.split())
  cure = result["cheapest_fit"]["flags"].split()
  assert plan("--device", "h200", *cure)["fits"] is True


def test_rewards_are_drawn_before_a_step(plan, config, capsys):
  asked = ("--data.objective=reward", "--mesh", "fsdp=8", "--device", "h200")
  result = plan(*asked, "--reward.max-new-tokens=512")
  assert result["bytes_by_moment"]["drawing"]["kv_cache"] > 0
  drawing = result["drawing"]
  assert (drawing["rows"], drawing["tokens"]) == (16, 512) and drawing["seconds"] > 0
  assert plan(*asked[1:])["bytes_by_moment"].keys().isdisjoint({"drawing"})
  assert main(["plan", config, *asked]) == 0
  assert "drawing before it, up to 64 tokens" in capsys.readouterr().out


def test_budget_and_price(plan):
  asked = ("--mesh", "fsdp=8", "--device", "h200")
  result = plan(*asked, "--tokens", "1e12", "--price", "3")
  hours = 8 * 1e12 / result["tokens_per_second"] / 3600
  assert result["budget"]["device_hours"] == pytest.approx(hours)
  assert result["budget"]["cost"] == pytest.approx(3 * hours)
  assert plan(*asked)["budget"]["cost"] is None


@pytest.mark.slow
def test_search_and_decoding(plan):
  asked = ("--device", "v5p", "--devices", "4", "--search", "--decode", "--batch", "2")
  result = plan(*asked, "--context", "100", "--context", "200")
  best = result["search"][0]
  assert best["step_seconds"] == result["step_seconds"] and best["fits"]
  assert best["mesh"] == result["mesh"]
  assert {(p["batch"], p["context"]) for p in result["decode"]} == {(2, 100), (2, 200)}


def test_narrow_weights_and_cache_are_for_decoding(plan, config, capsys):
  asked = ("--mesh", "tensor=8", "--device", "h200", "--training.remat=full")
  asked += ("--decode", "--batch", "1", "--context", "8192")
  [wide] = plan(*asked)["decode"]
  [narrow] = plan(*asked, "--weights", "int8", "--cache", "int8")["decode"]
  assert narrow["stored"] == {"weights": "int8", "cache": "int8"}
  assert narrow["tokens_per_second"] > wide["tokens_per_second"]
  assert narrow["bytes_per_device"] < 0.6 * wide["bytes_per_device"]
  assert main(["plan", config, "--weights", "int8"]) == 2
  assert "add --decode" in capsys.readouterr().err


def test_decoding_alone_asks_nothing_of_training(plan, config, capsys):
  """Three devices do not divide the batch of training; a row for each fits."""
  asked = ("--mesh", "data=3", "--device", "h200", "--decode", "--batch=3")
  asked += ("--context=100", "--no-training")
  result = plan(*asked)
  assert result["fits"] is True and result["mesh"] == {"data": 3}
  assert result["parameters"] == 8_030_261_248
  assert "bytes_per_device" not in result and "step_seconds" not in result
  [point] = result["decode"]
  assert (point["batch"], point["context"]) == (3, 100)
  assert main(["plan", config, *asked[:-1]]) == 2
  assert "data.batch_size=16" in capsys.readouterr().err
  assert main(["plan", config, *asked]) == 0
  text = capsys.readouterr().out
  assert text.splitlines()[-1].startswith("FITS: ") and "gradients" not in text
  assert main(["plan", config, "--no-training"]) == 2
  assert "add --decode" in capsys.readouterr().err
  for flag in ("--search", "--compile"):
    assert main(["plan", config, *asked, flag]) == 2
    assert f"{flag} is about training" in capsys.readouterr().err


def test_a_latency_is_answered_by_the_most_rows_that_keep_to_it(plan, config, capsys):
  asked = ("--mesh", "data=2,tensor=4", "--device", "h200", "--decode", "--no-training")
  asked += ("--model.context=131072",)
  lengths = ("--context=8192", "--context=131072")
  result = plan(*asked, *lengths, "--latency=9")
  assert result["latency_seconds"] == 9e-3 and result["keeps_latency"] is True
  points = result["decode"]
  for point in points:
    assert point["fits"] and point["seconds"] <= 9e-3 and point["batch"] % 2 == 0
    rows = f"--batch={point['batch'] + 2}"
    [more] = plan(*asked, rows, f"--context={point['context']}")["decode"]
    assert more["seconds"] > 9e-3 or not more["fits"]
  assert points[0]["batch"] > points[1]["batch"] > 2
  # A long one is bound by memory; a row for each device shows by how much a short one
  # fails.
  [slow] = plan(*asked, "--context=8192", "--latency=9000")["decode"]
  assert slow["fits"] and slow["batch"] > points[0]["batch"]
  [fast] = plan(*asked, "--context=8192", "--latency=0.01")["decode"]
  assert fast["batch"] == 2 and fast["seconds"] > 1e-5
  assert main(["plan", config, *asked, "--context=8192", "--latency=0.01"]) == 0
  text = capsys.readouterr().out
  assert "\nTOO SLOW: no row of 8,192 tokens gets a token within 0.01 ms" in text
  assert "FITS" not in text
  # Some do, some do not: each is told, and so is what fits.
  seconds = [plan(*asked, "--batch=2", one)["decode"][0]["seconds"] for one in lengths]
  between = f"--latency={1e3 * sum(seconds) / 2}"
  assert plan(*asked, *lengths, between)["keeps_latency"] is False
  assert main(["plan", config, *asked, *lengths, between]) == 0
  text = capsys.readouterr().out
  assert "TOO SLOW: no row of 131,072 tokens" in text
  assert text.splitlines()[-1].startswith("the others: FITS: ")
  assert main(["plan", config, *asked, "--latency=9", "--batch=4"]) == 2
  assert main(["plan", config, *asked, "--device=cpu", "--latency=9"]) == 2
  assert "name another --device" in capsys.readouterr().err
  assert main(["plan", config, "--latency=9"]) == 2
  assert "add --decode" in capsys.readouterr().err


def test_a_latency_that_only_memory_ends(capsys):
  """A small model's rows are millions; and a latency is told as it was asked."""
  asked = ("--decode", "--no-training", "--device=h200", "--context=16")
  result, _ = plan_of(capsys, "rnn_lstm", *asked, "--latency=1e9")
  (point,) = result["decode"]
  more = f"--batch={point['batch'] + 1}"
  assert point["fits"] and not plan_of(capsys, "rnn_lstm", *asked, more)[0]["fits"]
  assert "within 1e-06 ms" in plan_of(capsys, "rnn_lstm", *asked, "--latency=1e-6")[1]


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    (("bert_tiny",), "model.family=encoder decodes nothing"),
    (("rnn_lstm", "--weights=int4"), "an RNN has no narrow weights or cache"),
    (("rnn_lstm", "--cache=int8"), "an RNN has no narrow weights or cache"),
    (
      ("stdlib_tiny", "--model.ffn-width=99", "--weights=int4"),
      "even number of inputs, not 99",
    ),
    (
      [
        "moe_tiny",
        "--model.moe.num-shared-experts=1",
        "--model.moe.expert-width=99",
        "--weights=int4",
      ],
      "even number of inputs, not 99",
    ),
    (("gpt2_124m", "--context=1025"), "add --model.context=1025"),
    (("stdlib_tiny", "--context=1000"), "add --model.context=1000"),  # rope
  ],
)
def test_what_decoding_refuses_is_not_planned(arguments, said, capsys):
  assert main(["plan", *arguments, "--decode", "--device=h200"]) == 2
  assert said in capsys.readouterr().err


def test_fewer_watts_make_a_longer_step(plan):
  asked = ("--mesh", "fsdp=8", "--device", "h200", "--training.remat=full")
  full, held = plan(*asked)["seconds_by_part"], plan(*asked, "--power=350")
  assert held["seconds_by_part"]["compute"] == pytest.approx(2 * full["compute"])
  assert held["seconds_by_part"]["memory"] == full["memory"]


def test_an_axis_over_the_slow_network(plan, config, capsys):
  asked = ("--device", "v4", "--training.remat=full")
  near, far = (plan("--mesh", mesh, *asked) for mesh in ("data=2,fsdp=8", MESH))
  assert far["mesh"] == near["mesh"] and far["slow_axes"] == ["data"]
  assert near["slow_axes"] == [] and far["step_seconds"] is None  # v4's is not published
  assert near["not_published"] == [] and far["not_published"] == ["network:data"]
  assert near["least_step_seconds"] == near["step_seconds"]
  assert 0 < far["least_step_seconds"] <= near["step_seconds"]
  known = plan("--mesh", MESH, *asked, "--network", "6.25")
  times = [result["seconds_by_part"]["network:data"] for result in (near, known)]
  assert times[1] == pytest.approx(times[0] * 90 / 6.25)
  assert known["step_seconds"] > near["step_seconds"]
  assert main(["plan", config, "--mesh", MESH, *asked]) == 0
  text = capsys.readouterr().out
  assert f"mesh {MESH}" in text and "network, data (data-centre network)" in text
  assert "and more: network:data not published" in text


@pytest.mark.slow
def test_a_search_keeps_the_slices(plan):
  asked = ("--device", "v5p", "--devices", "16", "--search", "--training.remat=full")
  result = plan("--mesh", "data=2@dcn,fsdp=8", *asked)
  assert result["search"]
  for choice in result["search"]:
    assert choice["mesh"]["data"] == 2 and "data=2@dcn" in choice["flags"]


def test_without_a_device_there_are_bytes_and_no_times(plan):
  result = plan()
  assert result["num_devices"] == 1
  assert result["bytes_per_device"]["total"] > 16 * result["parameters"]
  for name in ("fits", "step_seconds", "tokens_per_second", "mfu", "limited_by"):
    assert result[name] is None


def test_a_network_names_no_device(config: str, capsys):
  assert main(["plan", config, "--network=10"]) == 0
  assert "name a --device to learn whether it fits" in capsys.readouterr().out


def test_the_text_has_a_verdict(config, capsys, tmp_path):
  output = tmp_path / "plan.txt"
  arguments = ["--mesh", "fsdp=16", "--device", "v5p", "--output", str(output)]
  assert main(["plan", config, *arguments]) == 0
  assert capsys.readouterr().out == ""
  text = output.read_text()
  assert "FITS" in text and "8,030,261,248" in text and "MFU" in text


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--device", "h20"], "did you mean h200"),
    (["--mesh", "fsdp=-1", "--device", "h200"], "--devices"),
    (["--mesh", "fsdp=4", "--devices", "8"], "needs 4 devices, 8 present"),
    (["--mesh", "tensor=24"], "tensor can be 1, 2, 4, 8, 16 or 32"),
    (["--mesh", "data=32"], "data.batch_size=16"),
    (["--mesh", "pipe=2"], "unknown mesh axis"),
    (["--devices", "0"], "more than 0"),
    (["--model.dept=3"], "model.depth"),
    (["--device", "h200", "--devices", "7", "--search"], "the nearest has 8, 1 more: --"),
    (["--device", "h200", "--power", "800"], "has no 800 W"),
    (["--device", "v5e", "--power", "100"], "not known"),
    (["--device", "l4", "--compile"], "use --compile with"),
  ],
)
def test_mistakes_are_named(config: str, capsys, arguments: list[str], message: str):
  assert main(["plan", config, *arguments]) == 2
  captured = capsys.readouterr()
  assert message in captured.err
  assert captured.out == ""


def test_an_untrained_tokenizer_counts_as_full():
  cfg = load_config("stdlib_tiny")
  assert resolve(cfg).model.vocab_size == 4096


def test_no_backend_is_started(flaxlm):
  """Planning for a GPU must not allocate three quarters of one that is present."""
  code = (
    "import sys\nfrom flaxlm.cli import main\n"
    "assert main(['plan', '--device', 'h200', '--model.dropout=0.1', '--json']) == 0\n"
    "from jax._src import xla_bridge\n"
    "assert not xla_bridge.backends_are_initialized()\n"
  )
  environment = os.environ | flaxlm.environment
  run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
  assert run.returncode == 0, run.stderr


@pytest.mark.slow
@pytest.mark.parametrize("device", [(), ("--device=cpu",)])
def test_compile_on_simulated_devices(in_process, device: tuple[str, ...]):
  """The whole way through the child process, with no extra installed."""
  small = ["--model.depth=2", "--model.width=64", "--training.scanned=true"]
  run = in_process("plan", *small, "--mesh=data=2,fsdp=2", *device, "--compile", "--json")
  assert run.returncode == 0, run.stderr
  compiled = json.loads(run.stdout)["compiled"]
  assert compiled["error"] is None
  for name in ("argument_bytes", "output_bytes", "temp_bytes", "peak_bytes"):
    assert compiled[name] > 0
  assert {one["axes"] for one in compiled["collectives"]} & {"data", "fsdp"}


def test_a_card_with_fewer_kv_heads_than_members_of_tensor(capsys: pytest.CaptureFixture):
  command = ["plan", "llama3_70b", "--device", "v5p", "--training.remat=full", "--mesh"]
  assert main([*command, "fsdp=4,tensor=16"]) == 0
  assert "kv heads: 8 on mesh tensor=16, each on 2 devices" in capsys.readouterr().out
  found = {}
  for mesh in ("fsdp=4,tensor=16", "fsdp=8,tensor=8"):
    assert main([*command, mesh, "--json"]) == 0
    found[mesh] = json.loads(capsys.readouterr().out)
  parameters = [one["bytes_per_device"]["parameters"] for one in found.values()]
  # Keys and values of 80 layers, in float32: 2/64 on each device and not 1/64.
  kv_bytes = 4 * 2 * 80 * 8192 * 8 * 128
  assert parameters[0] - parameters[1] == kv_bytes // 64
  assert main([*command, "fsdp=4,tensor=6"]) == 2
  assert "tensor can be 1, 2, 4, 8, 16, 32 or 64" in capsys.readouterr().err


def plan_of(capsys, *arguments: str) -> tuple[dict, str]:
  """What `flaxlm plan` says, as JSON and as text."""
  assert main(["plan", *arguments, "--json"]) == 0
  result = json.loads(capsys.readouterr().out)
  assert main(["plan", *arguments]) == 0
  return result, capsys.readouterr().out


def test_a_card_on_one_device_has_a_batch_that_fits(capsys):
  result, text = plan_of(capsys, "gpt2_124m", "--device", "h100")
  rows = result["batch_size"]
  assert result["fits"] is True and result["published_batch_size"] == 512
  assert (
    f"published with 512 rows of 1,024 tokens a batch, which do not fit; planned with "
    f"--data.batch-size={rows}" in text
  )
  flags = ("--device", "h100", f"--data.batch-size={2 * rows}")
  result, text = plan_of(capsys, "gpt2_124m", *flags)  # one's own batch is left alone
  assert result["fits"] is False and result["published_batch_size"] is None
  assert result["batch_size"] == 2 * rows and "published" not in text


def test_one_s_own_config_keeps_its_batch(plan):
  result = plan("--device", "h200")
  assert result["fits"] is False and result["batch_size"] == 16
  assert result["published_batch_size"] is None


def test_what_learns_is_told(plan, config, capsys):
  asked = ("--mesh", "fsdp=8", "--device", "h200")
  whole = plan(*asked)
  assert "fine_tuning" not in whole
  lora = ("--lora.rank=4", "--lora.base-weights=int8", *asked)
  found, text = plan_of(capsys, config, *lora)
  learns = found["fine_tuning"]
  assert learns["trained"] == found["adapter_parameters"] > 0
  assert learns["frozen"] == found["parameters"] and learns["base_dtype"] == "int8"
  assert learns["whole"]["total_bytes"] == whole["bytes_per_device"]["total"]
  assert learns["whole"]["step_seconds"] == whole["step_seconds"] > found["step_seconds"]
  assert "8,030,261,248 parameters in int8, without gradient or moments" in text
  assert "20 per parameter" not in text
  compares = plan("--data.objective=preference", *asked)["fine_tuning"]
  assert compares["reference"] == "a frozen copy of all parameters"
  assert compares["frozen"] == 0 and compares["trained"] == found["parameters"]


def test_a_step_that_waits_for_its_rows_says_so(plan, config, capsys):
  asked = ("--mesh", "fsdp=8", "--device", "h200")
  result, text = plan_of(capsys, config, *asked)
  assert result["data_seconds"] is None
  assert "not known: --data-tokens-per-second" in text
  for times, waits in ((0.5, True), (2.0, False)):
    rate = f"{times * result['tokens_per_second']}"
    found, text = plan_of(capsys, config, *asked, "--data-tokens-per-second", rate)
    assert found["data_seconds"] == pytest.approx(result["step_seconds"] / times)
    assert ("THE STEP WAITS FOR THEM 50% of the time" in text) is waits
    # What follows is with the waiting.
    share = min(1.0, times)
    for name in ("tokens_per_second", "tokens_per_day", "mfu", "loose_mfu"):
      assert found[name] == pytest.approx(result[name] * share), name
    hours = result["budget"]["device_hours"] / share
    assert found["budget"]["device_hours"] == pytest.approx(hours)
    assert found["limited_by"] == ("data" if waits else result["limited_by"])
    assert found["step_seconds"] == result["step_seconds"]
  assert main(["plan", config, "--data-tokens-per-second=0"]) == 2
  assert "data-tokens-per-second is 0" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("arguments", "offer"),
  [
    (["rnn_lstm", "--mesh", "stage=2"], "stage is for transformers\n  leave it out"),
    # 42 layers, LG in turn: 2, 3, 6 or 7 stages would not hold whole patterns.
    (["gemma2_9b", "--mesh", "stage=4"], "--mesh: stage can be 1"),
    (["gemma2_9b", "--mesh", "stage=2"], "whole patterns; stage can be 1\n"),
    # 4 divides the width, and 6 rows only into 1, 2, 3 and 6.
    (["stdlib_tiny", "--mesh", "fsdp=3", "--data.batch-size=6"], "fsdp can be 1 or 2\n"),
    (
      ["mixtral_8x7b", "--mesh", "fsdp=3,expert=3", "--data.batch-size=18"],
      "fsdp can be 1, 2 or 4, but then another check fails\n",
    ),
  ],
)
@pytest.mark.parametrize("command", ["plan", "shard"])
def test_sizes_that_are_offered_pass(command, arguments, offer, capsys):
  assert main([command, *arguments]) == 2
  assert offer in capsys.readouterr().err
