# SPDX-License-Identifier: Apache-2.0
"""What a run says of each layer, against sums by hand, and what it wrote as it learnt."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import slow, tiny
from flax.traverse_util import flatten_dict
from random_runs import make_run

from flaxlm.config import MoEConfig, OptimizerConfig, TrainingConfig
from flaxlm.data.objectives import Batch
from flaxlm.look.probe import probe
from flaxlm.nn.models import build_model
from flaxlm.training.layers import forward_with_loads, named_loads, named_sizes
from flaxlm.training.logprobs import forward
from flaxlm.training.optimizer import build_optimizer
from flaxlm.training.step import LAYERS, TrainState, train_step

MOE = MoEConfig(num_experts=4, experts_per_token=2, expert_width=8)


def batch_of(family: str = "decoder") -> Batch:
  """Two rows of two documents, of five tokens each, and padding."""
  rng = np.random.default_rng(0)
  ids_BT = rng.integers(0, 257, (2, 12)).astype(np.int32)
  segments_BT = np.array(2 * [[1] * 5 + [2] * 5 + [0] * 2], np.int32)
  positions_BT = np.array(2 * [[*range(5), *range(5), 0, 0]], np.int32)
  weights_BT = (segments_BT > 0).astype(np.float32)
  source = (ids_BT, positions_BT, segments_BT) if family == "encoder_decoder" else ()
  return Batch(ids_BT, ids_BT, positions_BT, segments_BT, weights_BT, *source)


def a_step(family: str, log_layers: bool) -> tuple[Any, Any, Any]:
  """(parameters before, the state after, metrics) of a step without clipping."""
  run = make_run(family)
  training = TrainingConfig(log_layers=log_layers)
  rule = OptimizerConfig(kind="sgd", learning_rate=0.5, warmup_steps=0, clip_norm=None)
  optimizer = build_optimizer(rule, 10)
  state = TrainState(np.int32(0), run.params, optimizer.init(run.params))
  step = jax.jit(lambda s, b: train_step(run.model, optimizer, training, s, b, 0))
  return run.params, *step(state, batch_of(family))


@pytest.mark.parametrize("family", ["decoder", slow("rnn"), slow("encoder_decoder")])
def test_sizes_of_layers_are_those_of_their_parameters(family: str):
  before, state, metrics = a_step(family, log_layers=True)
  named = named_sizes(jax.device_get(metrics[LAYERS]))
  parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
  new = flatten_dict(state.params)
  for path, x in flatten_dict(before).items():
    if "blocks" in path:
      prefix = "".join(f"{name}/" for name in path[: path.index("blocks")])
      for n in range(len(x)):
        parts.setdefault(f"{prefix}layer_{n}", []).append((x[n], new[path][n]))
    else:
      parts.setdefault("/".join(path[:-1]), []).append((x, new[path]))
  assert {name.removeprefix("gradient_norm/") for name in named} >= parts.keys()
  assert len(named) == 2 * len(parts), "each part has both figures, and nothing else has"
  length = lambda arrays: np.sqrt(sum((np.asarray(x, float) ** 2).sum() for x in arrays))
  for name, pairs in parts.items():
    moved = length([after - old for old, after in pairs])
    size = moved / length([old for old, _ in pairs])
    assert named[f"update_size/{name}"] == pytest.approx(size, rel=1e-3, abs=1e-7)
  norms = [x for name, x in named.items() if name.startswith("gradient_norm/")]
  assert length([np.array(norms)]) == pytest.approx(
    float(metrics["gradient_norm"]), rel=1e-5
  )


@pytest.mark.slow
def test_a_step_that_logs_layers_learns_the_same():
  _, plain, metrics = a_step("decoder", log_layers=False)
  assert LAYERS not in metrics
  _, logging, more = a_step("decoder", log_layers=True)
  assert more["loss"] == metrics["loss"]
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
    logging.params,
    plain.params,
  )


@pytest.mark.parametrize("family", ["decoder", slow("encoder_decoder")])
def test_loads_count_the_choices_of_real_tokens(family: str):
  run, batch = make_run(family, moe=MOE), batch_of(family)
  looped = build_model(run.cfg.model, TrainingConfig(scanned=True, remat="full"))
  output, loads_LE = jax.jit(lambda p, b: forward_with_loads(looped, p, b))(
    run.params, batch
  )
  num_layers = 4 if family == "encoder_decoder" else 2
  assert loads_LE.shape == (num_layers, 4)
  assert loads_LE.sum(1).tolist() == [2 * 20] * num_layers
  if family == "encoder_decoder":
    same = jax.jit(lambda p, b: forward(run.model, p, b))(run.params, batch)
    np.testing.assert_allclose(output.value, same.value, atol=1e-4)
  else:  # its documents can be read one by one
    counts_LE = np.zeros((2, 4))
    for ids in np.asarray(batch.tokens_BT)[:, :10].reshape(4, 1, 5):
      experts_LTA = probe(run.model, run.params, ids, None, 0, 257)["experts"]
      counts_LE += [np.bincount(np.ravel(x), minlength=4) for x in experts_LTA]
    np.testing.assert_array_equal(loads_LE, counts_LE)


def test_loads_have_names_and_very_many_their_extremes():
  cfg = make_run(moe=MOE).cfg.model
  loads_LE = np.array([[3.0, 1, 0, 0], [1, 1, 1, 1]])
  named = named_loads(cfg, loads_LE)
  assert [named[f"eval/expert_load/layer_0/expert_{n}"] for n in range(4)] == [3, 1, 0, 0]
  assert named["eval/expert_load/layer_1/expert_3"] == 1 and len(named) == 8
  many = named_loads(cfg, np.concatenate([[np.arange(600.0)], np.ones((1, 600))]))
  assert many["eval/expert_load/layer_0/most"] == pytest.approx(2, rel=0.01)
  assert many["eval/expert_load/layer_0/least"] == 0 and len(many) == 4


@pytest.mark.slow
def test_a_run_writes_its_layers_experts_and_samples(
  in_process: Any, corpus: Path, tmp_path: Path
):
  moe = dict(model__moe__num_experts=4, model__moe__expert_width=8)
  asked = dict(training__log_layers=True, training__sample_every_steps=2, name="m")
  knobs = moe | asked | {"training.eval_batches": 1}
  done = in_process("train", *tiny(corpus, training__num_steps=5, **knobs))
  assert done.returncode == 0, done.stderr
  lines = [json.loads(x) for x in Path("runs/m/metrics.jsonl").read_text().splitlines()]
  first = lines[0]
  for figure in ("gradient_norm", "update_size"):
    parts = [x.split("/")[-1] for x in first if x.startswith(f"train/{figure}/")]
    assert parts == ["embedding", "layer_0", "final_norm"]
  evaluated = [line for line in lines if "eval/loss" in line]
  loads = [x for x in evaluated[0] if x.startswith("eval/expert_load/")]
  assert len(evaluated) == 2 and len(loads) == 4

  def samples() -> list[int]:
    text = Path("runs/m/samples.jsonl").read_text()
    return [json.loads(line)["step"] for line in text.splitlines()]

  assert samples() == [2, 4, 5]
  done = in_process("train", *tiny(corpus, training__num_steps=7, **knobs))
  assert done.returncode == 0, done.stderr
  assert samples() == [2, 4, 5, 6, 7]
  assert in_process("ckpt", "verify", "runs/m").returncode == 0
  anew = knobs | {"checkpoint.resume": "never", "training__sample_every_steps": "none"}
  done = in_process("train", *tiny(corpus, training__num_steps=0, **anew))
  assert done.returncode == 0, done.stderr
  assert not Path("runs/m/samples.jsonl").exists(), "they were another run's"
