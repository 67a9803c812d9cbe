# SPDX-License-Identifier: Apache-2.0
"""Predicted times against hand-worked examples, and what is not guessed."""

import dataclasses
import io
import json
from pathlib import Path

import pytest

from benchmarks.predictions.models import for_decoding, models
from flaxlm.config import (
  Config,
  DataConfig,
  ModelConfig,
  ResolvedMoE,
  TrainingConfig,
  load_config,
  mesh_shape,
)
from flaxlm.cost import forward_work, kv_cache_bytes
from flaxlm.devices import ANY, Device, find_device
from flaxlm.errors import ConfigError
from flaxlm.planning.decoding import (
  AS_COMPUTED,
  OPERATIONS,
  Stored,
  decode_work,
  plan_decoding,
  read_parameters,
)
from flaxlm.planning.network import axis_bandwidth, far_axes, network_bytes
from flaxlm.planning.planner import resolve
from flaxlm.planning.report import Report, print_report
from flaxlm.planning.roofline import EXPOSED, StepTimes, plan_training

ROOT = Path(__file__).parents[2]
LLAMA3_8B = ModelConfig(
  depth=32,
  width=4096,
  num_heads=32,
  num_kv_heads=8,
  ffn_width=14_336,
  vocab_size=128_256,
  context=8192,
  tied_embeddings=False,
).resolve()
N = 8_030_261_248
CFG = Config(
  model=LLAMA3_8B,
  data=DataConfig(seq_len=4096, batch_size=16),
  training=TrainingConfig(dtype="bfloat16", scanned=True, remat="full"),
)


def sent(mesh: dict[str, int], cfg: Config = CFG) -> dict[str, float]:
  return network_bytes(cfg, mesh_shape(mesh))


def test_fsdp_gathers_twice_and_reduces_once():
  assert sent(dict(fsdp=8)) == {"fsdp": pytest.approx(3 * 2 * N * 7 / 8, rel=1e-3)}


def test_data_sums_float32_gradients():
  assert sent(dict(data=4)) == {"data": pytest.approx(2 * 4 * N * 3 / 4)}


def test_tensor_sums_activations_six_times_a_layer_under_full_remat():
  """Shoeybi et al. (2019): two sums forward, two backward; two more computed again."""
  vectors = 16 * 4096 * 4096 * 2
  assert sent(dict(tensor=8))["tensor"] == 2 * vectors * (32 * 6 + 2) * 7 / 8


def test_tensor_sums_int8_products_in_int32():
  """Of the layers, not of embedding and head; those of q, k, v, up and gate apart. libtpu
  has 7,587,364,864 bytes of a LLaMA of 1.1B with fsdp=4,tensor=2 for 7,583,301,632."""
  training = dataclasses.replace(CFG.training, matmul="int8")
  narrow = dataclasses.replace(CFG, training=training)
  vectors = 16 * 4096 * 4096 * 2
  found = sent(dict(tensor=8), narrow)["tensor"]
  assert found == 2 * vectors * (2 * 32 * 9 + 2) * 7 / 8


def test_norms_on_shares_of_a_row_gather_the_inputs_of_products_once_more():
  """Korthikanti et al. (2022): a sum is scattered and gathered again, at the same cost."""
  training = dataclasses.replace(CFG.training, sequence_parallel=True)
  vectors = 16 * 4096 * 4096 * 2
  found = sent(dict(tensor=8), dataclasses.replace(CFG, training=training))["tensor"]
  assert found == 2 * vectors * (32 * 7 + 2) * 7 / 8


def test_accumulation_gathers_every_time():
  training = dataclasses.replace(CFG.training, accumulation_steps=2)
  twice = sent(dict(fsdp=8), dataclasses.replace(CFG, training=training))
  assert twice["fsdp"] == 2 * sent(dict(fsdp=8))["fsdp"]


def test_a_pipeline_hands_on_a_microbatch_at_every_tick():
  training = dataclasses.replace(CFG.training, pipeline_microbatches=8, pipeline_repeats=2)
  cfg = dataclasses.replace(CFG, training=training)
  rows = 16 * 4096 * 4096 * 2  # bytes of the residual stream
  blocks = 4 * (N - 2 * 128_256 * 4096 - 4096)
  there, back = 2 * rows * (8 * 2 + 3) / 8, 4 * rows * 3 / 4
  dealt, summed = 2 * blocks / 4 * 3 / 4, 2 * (4 * N - blocks) * 3 / 4
  found = sent(dict(stage=4), cfg)
  assert found == {"stage": pytest.approx(there + back + dealt + summed)}
  plan = plan_training(cfg, mesh_shape(dict(stage=4)), find_device("v5p"))
  assert plan.times.bubble == pytest.approx(3 / 19)
  busy = (plan.times.compute or 0) + (plan.times.memory or 0)
  assert plan.times.waiting == pytest.approx(busy * 3 / 16)
  assert plan.times.seconds == pytest.approx(busy * 19 / 16 + plan.times.network["stage"])


def test_bandwidth_of_an_axis():
  h100 = find_device("h100")
  inside, across = mesh_shape(dict(fsdp=8)), mesh_shape(dict(data=4, fsdp=8))
  reached = 366 / 450  # of what is published; a TPU's links are listed at what they reach
  assert axis_bandwidth(h100, inside, "fsdp") == pytest.approx(reached * 450e9)
  # Four nodes: eight GPUs each, so eight network cards side by side for `fsdp`'s 64, but
  # one alone for each `data` group, whose members all sit in other nodes.
  outside = axis_bandwidth(h100, mesh_shape(dict(fsdp=64)), "fsdp")
  assert outside == pytest.approx(reached * 400e9)
  assert axis_bandwidth(h100, across, "data") == pytest.approx(reached * 50e9)
  v5p = find_device("v5p")
  assert axis_bandwidth(v5p, mesh_shape(dict(fsdp=64)), "fsdp") == 3 * 180e9
  assert axis_bandwidth(v5p, mesh_shape(dict(data=8, fsdp=8)), "fsdp") == 180e9
  assert axis_bandwidth(find_device("l4"), mesh_shape(dict(data=16)), "data") is None


def test_a_slow_axis_moves_at_the_rate_of_the_network():
  v5e, sizes = find_device("v5e"), mesh_shape({"data": "2@dcn", "fsdp": 8})
  assert axis_bandwidth(v5e, sizes, "data") == 90e9, "one slice: its own links"
  assert axis_bandwidth(v5e, sizes, "data", ["data"]) == 3.125e9
  # It takes no axis of the torus from the others, nor any of their neighbours.
  assert axis_bandwidth(v5e, sizes, "fsdp", ["data"]) == 2 * 90e9
  last = mesh_shape({"fsdp": 8, "tensor": "2@dcn"})
  h200 = dataclasses.replace(find_device("h200"), link_fraction=1.0)
  assert axis_bandwidth(h200, last, "fsdp") == 4 * 50e9
  assert axis_bandwidth(h200, last, "fsdp", ["tensor"]) == 450e9
  assert axis_bandwidth(find_device("v4"), sizes, "data", ["data"]) is None


def test_a_hybrid_mesh_is_priced_slower():
  device, sizes = find_device("v5p"), mesh_shape({"data": 2, "fsdp": 8})
  near, far = (
    plan_training(dataclasses.replace(CFG, mesh=mesh), sizes, device)
    for mesh in ({"data": 2, "fsdp": 8}, {"data": "2@dcn", "fsdp": 8})
  )
  assert far.times.network["data"] == pytest.approx(
    near.times.network["data"] * 180 / 6.25, rel=1e-9
  )
  rings = near.times.network["fsdp"] / far.times.network["fsdp"]
  assert rings == pytest.approx(3), "the torus is fsdp's alone"
  assert far.mesh == "data=2@dcn,fsdp=8" and far.memory == near.memory


def test_overlap_is_as_documented():
  times = StepTimes(2.0, 1.0, {"fsdp": 4.0, "tensor": 0.5})
  assert times.seconds == 4.5
  assert times.limited_by == "network:fsdp"
  hidden = StepTimes(2.0, 1.0, {"fsdp": 2.5, "data": 0.4})
  assert hidden.seconds == 3.0
  assert hidden.limited_by == "network:fsdp"
  beside = StepTimes(2.0, 1.0, {"fsdp": 2.0, "data": 0.4}, contention=0.15)
  assert beside.seconds == pytest.approx(3.0 + 0.15 * 2.4)
  after = StepTimes(2.0, 1.0, {"fsdp": 2.0, "data": 0.4}, exposed=(*EXPOSED, "data"))
  assert after.seconds == pytest.approx(3.4)
  assert StepTimes(2.0, 1.0, {"fsdp": None}).seconds is None
  assert StepTimes(None, 1.0, {}).limited_by is None


def test_llama3_8b_on_eight_h200():
  """Published: 49-51 % strict MFU in bfloat16 by three stacks (with fused attention)."""
  plan = plan_training(CFG, mesh_shape(dict(fsdp=8)), find_device("h200"))
  assert plan.fits
  assert plan.times.limited_by == "compute"
  assert plan.mfu is not None and plan.tokens_per_second is not None
  assert 0.35 < plan.mfu < 0.6
  by_hand = plan.cost.strict_flops * plan.tokens_per_second / plan.cost.tokens
  assert plan.mfu == pytest.approx(by_hand / (8 * 989.4e12))
  assert plan.optimal_tokens == 20 * N
  hours = plan.device_hours(1e9)
  assert hours == pytest.approx(8 * 1e9 / plan.tokens_per_second / 3600)


def test_what_is_not_known_is_not_timed():
  plan = plan_training(CFG, mesh_shape(dict(fsdp=8)), find_device("cpu"))
  assert plan.times.seconds is plan.mfu is plan.fits is plan.tokens_per_second is None
  assert plan.memory.total > 0
  turing = plan_training(CFG, mesh_shape(dict(fsdp=8)), find_device("t4"))
  assert turing.times.compute is None  # no bfloat16 there
  assert turing.fits is False


@pytest.mark.parametrize(("fraction", "rate"), [(1.0, 320), (0.896, 286)])
def test_decoding_llama3_8b_on_one_h200(fraction: float, rate: float):
  """15.0 GB of weights without the input table: 320 tokens/s at 4.8 TB/s, 286 at 4.3."""
  device = dataclasses.replace(
    find_device("h200"), bandwidth_fraction=fraction, operation_seconds=0.0
  )
  point = plan_decoding(CFG, mesh_shape({}), device, batch=1, context=1)
  assert point.tokens_per_second == pytest.approx(rate, rel=5e-3)
  assert point.limited_by == "weights"
  assert point.min_devices == 1


def test_a_kernel_takes_time_however_little_it_reads():
  model = ModelConfig(depth=3, width=64, num_heads=2, vocab_size=128).resolve()
  cfg = Config(model=model, training=TrainingConfig(dtype="bfloat16"))
  device = dataclasses.replace(find_device("h100"), operation_seconds=1e-5)
  point = plan_decoding(cfg, mesh_shape({}), device, 1, 1)
  of_layer, of_step = OPERATIONS["gpu"]
  assert of_layer > 7, "the products are among them"
  num_bytes = 2 * read_parameters(cfg, 1) + kv_cache_bytes(model, 1, 1, 2)
  reading = num_bytes / (0.87 * 3350e9)
  assert point.seconds == pytest.approx(1e-5 * (3 * of_layer + of_step) + reading)


def test_attention_in_a_kernel_runs_at_its_own_rate():
  device = find_device("h100")
  slow = dataclasses.replace(device, attention_rate=1e12)
  times = [plan_training(CFG, mesh_shape({}), d).times.compute for d in (device, slow)]
  work = forward_work(CFG.model, CFG.data.batch_size, CFG.data.seq_len)
  # Forward, five products backward for two, and forward again; slower in short rows.
  passes, ramp = 1 + 2.5 + 1, 1 + device.attention_ramp / CFG.data.seq_len
  by_hand = passes * work.attention * ramp * (1 / 1e12 - 1 / device.attention_rate)
  assert times[1] - times[0] == pytest.approx(by_hand)


def test_attention_reaches_what_was_measured_in_rows_of_two_lengths():
  """111 and 153 TFLOP/s, counted as three passes where the kernel computes three and a
  half."""
  h100 = find_device("h100")
  assert h100.attention_flops(1024) == pytest.approx(111e12 * 3.5 / 3, rel=5e-3)
  assert h100.attention_flops(2048) == pytest.approx(153e12 * 3.5 / 3, rel=5e-3)
  assert find_device("v5e").attention_flops(1024) is None


def test_fewer_watts_slow_products_but_not_memory():
  h100 = find_device("h100")
  held = h100.at_power(350)
  assert held.attainable_flops("bfloat16") == pytest.approx(0.5 * 0.8 * 989.4e12)
  assert held.attention_flops(4096) == pytest.approx(0.5 * h100.attention_flops(4096))
  assert held.attainable_bandwidth == h100.attainable_bandwidth
  assert held.flops("bfloat16") == h100.flops("bfloat16"), "MFU is of the published peak"
  with pytest.raises(ConfigError, match="no 800 W"):
    h100.at_power(800)
  with pytest.raises(ConfigError, match="power of v5e is not known"):
    find_device("v5e").at_power(100)


def test_gradients_between_hosts_are_summed_after_everything_else():
  h100, v5e = find_device("h100"), find_device("v5e")
  inside, across = mesh_shape(dict(fsdp=8)), mesh_shape(dict(data=2, fsdp=8))
  assert far_axes(h100, inside) == ()
  assert far_axes(h100, across) == ("data",)
  assert far_axes(v5e, across) == ()
  assert far_axes(v5e, across, ["data"]) == ("data",)
  assert far_axes(h100, mesh_shape(dict(fsdp=16))) == ("fsdp",)
  one, two = (plan_training(CFG, sizes, h100).times for sizes in (inside, across))
  assert "data" not in one.exposed and "data" in two.exposed
  assert two.seconds == pytest.approx(
    two.compute + two.memory + 20 / 132 * two.network["fsdp"] + two.network["data"]
  )


@pytest.mark.parametrize("name", ["h100", "h200"])
def test_the_data_sheet_and_a_gpu_agree(name):
  """Within 13 % of what `benchmarks.predictions` timed on one training, 15 % decoding."""
  path = ROOT / f"docs/benchmarks/2026-11-27-predictions-{name}.jsonl"
  lines = map(json.loads, path.read_text().splitlines())
  seconds = {line["case"]: line["seconds"] for line in lines}
  device, sizes = find_device(name), mesh_shape({})
  for case, cfg in models("large").items():
    predicted = plan_training(cfg, sizes, device).times.seconds
    assert predicted == pytest.approx(seconds[f"train {case}"], rel=0.13)
    cfg = for_decoding(cfg)
    predicted = plan_decoding(cfg, sizes, device, 1, 128).seconds
    assert predicted == pytest.approx(seconds[f"decode {case}"], rel=0.15)


def test_a_measured_cache_is_read_at_its_own_rate():
  device = find_device("h100")
  slow = dataclasses.replace(device, pass_bandwidths={"cache": 1e9})
  near, far = (
    plan_decoding(CFG, mesh_shape({}), d, 1, 1000).seconds for d in (device, slow)
  )
  cache = kv_cache_bytes(CFG.model, 1, 1000, 2)
  assert far - near == pytest.approx(cache * (1 / 1e9 - 1 / (0.87 * 3350e9)))


def test_decoding_turns_from_weights_to_cache():
  device = find_device("h200")
  point = lambda batch, context: plan_decoding(CFG, mesh_shape({}), device, batch, context)
  few, many = point(1, 128), point(64, 8192)
  assert few.limited_by == "weights" and many.limited_by == "cache"
  assert few.seconds and many.seconds and few.seconds < many.seconds
  cache = 64 * 8192 * 131_072
  assert many.bytes_per_device == pytest.approx(2 * N + cache, rel=2e-3)
  assert point(64, 8192 * 16).fits is False


def test_decoding_has_a_verdict_of_its_own_and_it_comes_last():
  device, int8 = find_device("h100"), Stored("int8", "int8")
  training = plan_training(CFG, mesh_shape({}), device)
  assert training.fits is False

  def said(*batches: int, stored: Stored = AS_COMPUTED, device=device) -> list[str]:
    points = [
      plan_decoding(CFG, mesh_shape({}), device, batch, 8192, stored) for batch in batches
    ]
    plan = dataclasses.replace(training, device=device)
    out = io.StringIO()
    print_report(Report(plan=plan, decoding=points), out)
    text = out.getvalue()
    return text[text.index("\ntraining: ") + 1 :].splitlines()

  first, last = said(1)
  assert first.startswith("training: DOES NOT FIT")
  assert last == "decoding: FITS: 15.96 GiB of 79.65 GiB per device for 1 x 8,192 tokens"
  *_, verdict, most, smaller = said(1, 128)
  assert verdict.startswith("decoding: DOES NOT FIT: 143.0")
  assert verdict.endswith("for 128 x 8,192 tokens; it takes at least 2 devices")
  assert most == "  it fits up to 1 x 8,192 tokens (15.96 GiB)"
  assert smaller == "  smaller: --weights int8 --cache int8"
  assert said(1, 128, stored=int8)[-1] == (
    "decoding: FITS: 74.04 GiB of 79.65 GiB per device for 128 x 8,192 tokens"
  )
  assert said(1, device=ANY)[-1].endswith("name a --device to learn whether it fits")


def test_gemma3_27b_decodes_128k_tokens_on_one_h100():
  """54 GB of weights and 11 GB of cache, which would be 67 if all layers kept all slots."""
  cfg = resolve(load_config("gemma3_27b"))
  point = plan_decoding(cfg, mesh_shape({}), find_device("h100"), 1, 131_072)
  cache = 2 * 16 * 128 * 2 * (10 * 131_072 + 52 * 1664)
  expected = 2 * 27_009_346_304 + cache + 4 * 262_208
  assert point.bytes_per_device == pytest.approx(expected, rel=1e-6)
  assert point.fits and point.min_devices == 1


def test_a_decoding_step_attends_to_the_slots_that_its_layers_keep():
  model = dict(depth=3, width=64, num_heads=2, vocab_size=128, context=4096)
  windowed = dict(window=8, layer_pattern="LLG")
  flops = {}
  for name, fields in (("all", {}), ("some", windowed)):
    cfg = dataclasses.replace(CFG, model=ModelConfig(**model | fields).resolve())
    flops[name], _, num_bytes = decode_work(cfg, rows=5, context=4096)
    assert num_bytes == kv_cache_bytes(cfg.model, 5, 4096, 2)
  ring = 640  # 8 + 512 + 64 - 1, in whole lanes
  assert flops["all"] - flops["some"] == 5 * 4 * 64 * 2 * (4096 - ring)


def test_decoding_on_a_mesh():
  """`tensor` halves what is read; `fsdp` makes the weights travel instead."""
  device = find_device("h200")
  point = lambda **mesh: plan_decoding(CFG, mesh_shape(mesh), device, 8, 1024)
  one, tensor, fsdp = point(), point(tensor=2), point(fsdp=2)
  assert one.seconds and tensor.seconds and fsdp.seconds
  assert one.seconds / 2 < tensor.seconds < one.seconds < fsdp.seconds
  assert fsdp.limited_by == "network"
  assert tensor.bytes_per_device == pytest.approx(one.bytes_per_device / 2, rel=1e-3)


def test_decoding_reads_the_experts_that_are_asked():
  moe = ResolvedMoE(num_experts=8, experts_per_token=2, expert_width=14_336)
  model = dataclasses.replace(LLAMA3_8B, moe=moe)
  cfg = dataclasses.replace(CFG, model=model)
  one, many = read_parameters(cfg, 1), read_parameters(cfg, 1000)
  expert = 32 * 3 * 4096 * 14_336
  assert many - one == 6 * expert
  assert many == read_parameters(CFG, 1) + 7 * expert + 32 * 4096 * 8


def test_measured_limits_take_the_place_of_a_data_sheet():
  cpu = Device(
    name="cpu",
    kind="cpu",
    peak_flops={"float32": 200e9},
    memory_bytes=None,
    usable_bytes=None,
    memory_bandwidth=20e9,
  )
  cfg = dataclasses.replace(CFG, training=TrainingConfig())
  plan = plan_training(cfg, mesh_shape({}), cpu)
  assert plan.times.compute == pytest.approx(plan.cost.executed_flops / 200e9)
  assert plan.mfu is not None and 0 < plan.mfu < 1
