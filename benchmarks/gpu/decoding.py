# SPDX-License-Identifier: Apache-2.0
"""Decoding steps by batch, by how weights are kept and whether the loop is one CUDA graph.

The loop of `flaxlm infer` is timed over a cache of `SLOTS` slots, without a prompt: a step
reads all slots, whether they are filled or not. The first tokens of each answer must be the
likeliest of a forward pass without a cache over the same narrow weights.
"""

import dataclasses
import functools
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.cases import decode_models
from flaxlm.benchmark.measure import (
  BenchOptions,
  Side,
  measure_alone,
  timed,
  wrong_result,
)
from flaxlm.benchmark.report import Demand, Result, as_json
from flaxlm.benchmark.suites.decode import (
  CHECKED_TOKENS,
  LOGIT_TOLERANCE,
  largest_deficit,
  random_model,
)
from flaxlm.config import ResolvedConfig
from flaxlm.decoding.generate import DecodeState, StaticSampling, decode_block
from flaxlm.decoding.prefill import BLOCK_STEPS
from flaxlm.decoding.sampling import make_sampling
from flaxlm.decoding.weights import prepare_params
from flaxlm.nn.base import LanguageModel
from flaxlm.nn.kernels.int4 import FEW_ROWS
from flaxlm.nn.models import init_cache
from flaxlm.planning.decoding import Stored, decode_work
from flaxlm.platform import fused_kernel, start_jax

BATCHES = (1, 8, 64)
CHECKED_ROWS = 8
SLOTS = 1024
# How matrices are kept (None: as wide as the computation), and the kernel of products with
# them, which is for few rows, on GPUs.
KINDS: tuple[tuple[str | None, str | None], ...] = (
  (None, None),
  ("int8", None),
  ("int8", "pallas"),
  ("int4", None),
  ("int4", "pallas"),
)
GREEDY = StaticSampling()
# All steps of a block as one CUDA graph, where XLA by default makes one of each step's body
# and launches it from the host. One copy whose place depends on the step would cut it in
# two: that pass is off. Of the kinds of commands, DYNAMIC_SLICE_COPY_FUSION ended XLA's
# compiler (jaxlib 0.10.1, without a GPU).
ONE_GRAPH: Any = {
  "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,"
  "DYNAMIC_SLICE_FUSION,WHILE",
  "xla_gpu_graph_min_graph_size": 1,
  "xla_disable_hlo_passes": "fusion-dynamic-memcpy-rewriter",
}


class Loop(NamedTuple):
  """A program of `BLOCK_STEPS` steps, being compiled, and the one that checks it."""

  model: LanguageModel
  params: Any
  batch: int
  kind: str | None
  kernel: str | None
  steps: Future
  check: Future
  is_one_graph: bool = False

  @property
  def text(self) -> str:
    """How the weights are kept and read, for the name of a case."""
    dtype = str(self.model.execution.dtype)
    graph = "one graph" if self.is_one_graph else ""
    return " ".join(filter(None, (self.kind or dtype, self.kernel, graph)))


def main() -> None:
  """`MODEL OUTPUT SMOKE SECONDS`: appends a line for each figure, until time is up."""
  name, output, smoke, seconds = sys.argv[1:]
  ends = time.monotonic() + float(seconds)
  start_jax()
  cfg = decode_models(bool(int(smoke)))[name]
  options = BenchOptions(rounds=1 if int(smoke) else 5)
  with ThreadPoolExecutor() as pool:
    for loop in loops(cfg, BATCHES[:2] if int(smoke) else BATCHES, pool):
      if time.monotonic() > ends:
        pool.shutdown(wait=False, cancel_futures=True)
        break
      result = measure_loop(name, cfg, loop, options)
      with Path(output).open("a", encoding="utf-8") as out:
        print(as_json(result), file=out, flush=True)


def loops(
  cfg: ResolvedConfig, batches: Sequence[int], pool: ThreadPoolExecutor
) -> list[Loop]:
  """All programs, small batches first; they compile side by side."""
  model, params = random_model(cfg)
  by_kind = {kind: prepare_params(params, cfg.model, kind) for kind, _ in KINDS}
  rows = jax.ShapeDtypeStruct((CHECKED_ROWS, 1 + CHECKED_TOKENS), jnp.int32)
  check = lambda prepared: largest_deficit.lower(model, prepared, rows, CHECKED_TOKENS)
  checks = {
    kind: pool.submit(check(prepared).compile) for kind, prepared in by_kind.items()
  }
  found = []
  has_gpu = fused_kernel().name == "cudnn"
  for is_one_graph in (False, True) if has_gpu else (False,):
    for batch in batches:
      for kind, kernel in KINDS:
        if kernel and (batch > FEW_ROWS or not has_gpu):
          continue
        if is_one_graph and batch > FEW_ROWS:  # a step is long, and its launch is not
          continue
        execution = dataclasses.replace(model.execution, weights_kernel=kernel)
        with_kernel = model.clone(execution=execution)
        state = jax.eval_shape(functools.partial(first_state, model, batch))
        arguments = (make_sampling(batch, 0.0), np.int32(cfg.model.num_ids))
        lowered = decode_block.lower(with_kernel, by_kind[kind], state, *arguments, GREEDY)
        steps = pool.submit(lowered.compile, ONE_GRAPH if is_one_graph else None)
        loop = Loop(model, by_kind[kind], batch, kind, kernel, steps, checks[kind])
        found.append(loop._replace(is_one_graph=is_one_graph))
  return found


def first_state(model: LanguageModel, batch: int) -> DecodeState:
  """An empty cache; row r begins with token r + 1."""
  first_B = (jnp.arange(batch) % (model.cfg.num_ids - 1) + 1).astype(jnp.int32)
  return DecodeState(init_cache(model, batch, slots_of(model)), first_B, None)


def slots_of(model: LanguageModel) -> int:
  return min(SLOTS, model.cfg.context)


def measure_loop(
  name: str, cfg: ResolvedConfig, loop: Loop, options: BenchOptions
) -> Result:
  compiled = loop.steps.result()
  sampling, num_ids = make_sampling(loop.batch, 0.0), np.int32(cfg.model.num_ids)
  slots, filled = slots_of(loop.model), 0
  state = jax.jit(functools.partial(first_state, loop.model, loop.batch))()

  def call() -> Any:
    nonlocal state, filled
    if filled + BLOCK_STEPS > slots:  # begin again; the slots keep what they have
      empty = state.cache._replace(lengths_B=jnp.zeros_like(state.cache.lengths_B))
      state, filled = state._replace(cache=empty), 0
    state, block = compiled(loop.params, state, sampling, num_ids)
    filled += BLOCK_STEPS
    return block.tokens_BT

  first_B = np.asarray(state.token_B)
  timing = measure_alone(Side(call, queued=True), options)
  rows = np.concatenate([first_B[:, None], np.asarray(timing.result)], 1)
  gate = check(cfg, loop, rows[:, : 1 + CHECKED_TOKENS])
  stored = Stored(loop.kind)
  flops, weights, cache = decode_work(cfg, loop.batch, slots, stored)
  num_bytes = weights + cache
  demand = Demand(
    BLOCK_STEPS * flops, BLOCK_STEPS * num_bytes, cfg.training.dtype, num_bytes
  )
  case = f"{name} B{loop.batch} {loop.text}"
  tokens = loop.batch * BLOCK_STEPS
  return timed("decode", case, timing, "tokens/s", gate, tokens, demand)


def check(cfg: ResolvedConfig, loop: Loop, rows: np.ndarray) -> str:
  """Checks up to `CHECKED_ROWS` rows. Raises `FlaxLMError` if a token is not likely."""
  some = np.resize(rows[:CHECKED_ROWS], (CHECKED_ROWS, rows.shape[1])).astype(np.int32)
  deficit = float(loop.check.result()(loop.params, some))
  text = f"{CHECKED_TOKENS} tokens are the likeliest of an uncached forward pass"
  if not deficit <= LOGIT_TOLERANCE[cfg.training.dtype]:
    raise wrong_result(f"it is not true that {text}: {deficit:.1e} below")
  return text


if __name__ == "__main__":
  main()
