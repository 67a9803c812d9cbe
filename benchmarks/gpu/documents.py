# SPDX-License-Identifier: Apache-2.0
"""Packed documents in cuDNN's kernel: by their offsets, and by a mask, side by side.

Attention with its gradients on each model's packed rows, of which every side must agree
with the plain mathematics; rows of one document say what a mask can cost at most. Then the
whole training step both ways, whose losses must agree.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gpu.cases import TrainCase, batches_of, train_cases, visible_share
from benchmarks.gpu.training import demand_of, run_flaxlm
from flaxlm.benchmark.measure import BenchOptions, Side, agree, measure, timed
from flaxlm.benchmark.report import Result, as_json, summarise, with_ratio
from flaxlm.benchmark.suites.attention import (
  TOLERANCES,
  AttentionShape,
  attention_demand,
  flattened,
  operands,
  with_gradients,
)
from flaxlm.benchmark.suites.train import LOSS_TOLERANCES, compare_losses
from flaxlm.errors import FlaxLMError, first_line
from flaxlm.nn.attention import attend
from flaxlm.nn.kernels.blocked import attend_blocked
from flaxlm.nn.kernels.cudnn import attend_cudnn
from flaxlm.nn.masks import Placement, Reach, Scoring, Sight, visible
from flaxlm.platform import fused_kernel, start_jax

Arrays = tuple[jax.Array, jax.Array, jax.Array]
WAYS = {"a mask": False, "offsets": True}
WINDOW = 1024  # what a layer with a window would see, where rows are longer


def main() -> None:
  """`OUTPUT SMOKE`: appends a line for each figure. A wrong result is said, not written."""
  output, smoke = sys.argv[1:]
  start_jax()
  cases = train_cases(bool(int(smoke)))
  options = BenchOptions(rounds=1 if int(smoke) else 5)
  parts = {
    f"{name}, window {window}": bench_attention(name, case, window, options)
    for name, case in cases.items()
    for window in (None, WINDOW)
    if window is None or window < case.cfg.data.seq_len
  }
  first = next(iter(cases))
  parts["a step"] = bench_step(first, cases[first])
  failed = []
  for name, results in parts.items():
    try:
      for result in results:
        with Path(output).open("a", encoding="utf-8") as out:
          print(as_json(result), file=out, flush=True)
    except (FlaxLMError, jax.errors.JaxRuntimeError, NotImplementedError) as e:
      failed.append(f"{name}: {first_line(e)}")
  if failed:
    sys.exit("; ".join(failed))


def bench_attention(
  name: str, case: TrainCase, window: int | None, options: BenchOptions
) -> Iterator[Result]:
  """Milliseconds of one layer's attention and its gradients, of each way in turn."""
  model, data, dtype = case.cfg.model, case.cfg.data, case.cfg.training.dtype
  heads = (model.num_heads, model.num_kv_heads, model.head_dim)
  shape = AttentionShape(data.batch_size, data.seq_len, *heads)
  arrays = operands(shape, dtype)
  segments_BT = jnp.asarray(batches_of(case, "packed")[0].segments_BT)
  sides = ways(segments_BT, model.attention_scale, window)
  plain = functools.partial(plain_rows, segments_BT, model.attention_scale, window)
  demand = attention_demand(shape, dtype, backward=True)
  share = visible_share(case, "packed")
  demand = dataclasses.replace(demand, flops=demand.flops * share)
  wanted = flattened(jax.jit(functools.partial(with_gradients, plain))(*arrays))
  text = f"{name} {shape.text} {dtype} {'' if window is None else f'window {window} '}by "
  for way, attention in sides.items():
    call = jax.jit(functools.partial(with_gradients, attention))
    timing = measure({way: Side(call, lambda: arrays, queued=True)}, options)[way]
    gate = "rows of one document"
    if way != "nothing":
      gate = agree("the result", flattened(timing.result), wanted, TOLERANCES[dtype])
    yield timed("attention", text + way, timing, "ms", gate, demand=demand)


def ways(
  segments_BT: jax.Array, scale: float, window: int | None
) -> dict[str, Callable[..., jax.Array]]:
  """Attention over packed rows by a mask and, where the device can, by offsets; `nothing`:
  as if each row were one document. On other devices it is XLA's operations."""
  kernel, scoring = fused_kernel(), Scoring(scale)
  attention = attend_cudnn if kernel.name == "cudnn" else attend_blocked
  packed = sight(segments_BT, window)
  whole = Sight(sight(None, window, segments_BT.shape).mask_BTS, reach=Reach(window, True))
  found: dict[str, Callable[..., jax.Array]] = {
    "nothing": lambda q, k, v: attention(q, k, v, whole, scoring),
    "a mask": lambda q, k, v: attention(q, k, v, packed, scoring),
  }
  if kernel.packed:
    from flaxlm.nn.kernels.cudnn_packed import Form, attend_packed

    form = Form(True, scale, window)
    found["offsets"] = lambda q, k, v: attend_packed(q, k, v, segments_BT, form)
  return found


def sight(
  segments_BT: jax.Array | None, window: int | None, shape: tuple[int, ...] = ()
) -> Sight:
  B, T = shape if segments_BT is None else segments_BT.shape
  slots_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
  where = Placement(slots_BT, segments_BT, segments_BT)
  return Sight(visible(where, T, window=window), reach=Reach(window))


def plain_rows(
  segments_BT: jax.Array, scale: float, window: int | None, q: Any, k: Any, v: Any
) -> jax.Array:
  """The plain mathematics, row by row, because the scores of all would not fit."""

  def row(arrays: tuple) -> jax.Array:
    q, k, v, segments_T = (x[None] for x in arrays)
    return attend(q, k, v, sight(segments_T, window), Scoring(scale))[0][0]

  return jax.lax.map(jax.checkpoint(row), (q, k, v, segments_BT))


def bench_step(name: str, case: TrainCase) -> Iterator[Result]:
  """Tokens/s of the training step of packed rows, by offsets beside by a mask."""
  kernel, runs = fused_kernel(), {}
  if kernel.packed:  # `auto` keeps the mask
    training = dataclasses.replace(case.cfg.training, attention="cudnn")
    cfg = dataclasses.replace(case.cfg, training=training)
    case = dataclasses.replace(case, cfg=cfg)
  for way, packed in WAYS.items():
    if packed and not kernel.packed:
      return
    runs[way] = run_flaxlm(case, "packed", dataclasses.replace(kernel, packed=packed))
  masked, ours = runs.values()
  tolerance = LOSS_TOLERANCES[case.cfg.training.dtype]
  gate = compare_losses(ours["losses"], masked["losses"], tolerance)
  text = f"{name} packed by offsets {case.cfg.data.batch_size}x{case.cfg.data.seq_len}"
  result = summarise(
    "train", text, ours["rates"], "tokens/s", gate, demand_of(case, "packed")
  )
  result.seconds = case.tokens / result.median
  seconds = lambda run: [case.tokens / rate for rate in run["rates"]]
  yield with_ratio(result, "by a mask", seconds(ours), seconds(masked), gate)


if __name__ == "__main__":
  main()
