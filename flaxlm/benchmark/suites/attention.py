# SPDX-License-Identifier: Apache-2.0
"""Causal self-attention by path: forward alone, and forward with backward.

FLOPs are strict: 4 H per query, head and visible key, which is half of the square, and
twice as many again for the backward pass. A path that computes the whole square, or
computes the scores a second time, gets a lower fraction of the limit.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxlm.benchmark.measure import BenchOptions, Side, agree, measure, timed
from flaxlm.benchmark.report import Demand, Result, with_ratio
from flaxlm.cost import visible_keys
from flaxlm.nn.attention import attend
from flaxlm.nn.kernels.blocked import attend_blocked
from flaxlm.nn.kernels.cudnn import attend_cudnn
from flaxlm.nn.kernels.tiled import attend_tiled
from flaxlm.nn.masks import Pattern, Placement, Reach, Scoring, Sight, visible
from flaxlm.platform import fused_kernel

AttentionPath = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class AttentionShape(NamedTuple):
  """Rows, tokens, query heads, kv heads, head dim."""

  B: int
  T: int
  N: int
  K: int
  H: int

  @property
  def text(self) -> str:
    return f"B{self.B} T{self.T} N{self.N} K{self.K} H{self.H}"


TOLERANCES = {"float32": 2e-3, "bfloat16": 4e-2}


def bench_attention(options: BenchOptions) -> list[Result]:
  """Milliseconds of each path on each shape, forward, and forward with backward."""
  shapes = options.pick(
    [AttentionShape(1, 16, 2, 1, 8)],
    [AttentionShape(8, 256, 6, 6, 64), AttentionShape(2, 1024, 8, 2, 64)],
    [AttentionShape(8, 2048, 16, 16, 64), AttentionShape(4, 4096, 32, 8, 128)],
  )
  results = []
  for shape in shapes:
    for backward in (False, True):
      results += bench_shape(shape, options.float_dtype, backward, options)
  return results


def bench_shape(
  shape: AttentionShape, dtype: str, backward: bool, options: BenchOptions
) -> list[Result]:
  arrays = operands(shape, dtype)
  run = with_gradients if backward else forward_only
  ours = paths(shape, dtype)
  sides = {
    name: Side(jax.jit(functools.partial(run, path)), lambda: arrays)
    for name, path in ours.items()
  }
  if options.peer == "torch":
    from flaxlm.benchmark.peers.torch_operations import torch_attention

    host = [np.asarray(x, np.float32) for x in arrays]
    sides |= torch_attention(host, dtype, backward, compiled=options.size != "tiny")
  timings = measure(sides, options)
  wanted = flattened(timings["plain"].result)
  demand = attention_demand(shape, dtype, backward)
  passes = "forward+backward" if backward else "forward"
  results: dict[str, Result] = {}
  for name, timing in timings.items():
    gate = agree("the result", flattened(timing.result), wanted, TOLERANCES[dtype])
    if name in ours:
      case = f"{name} {shape.text} {dtype} {passes}"
      results[name] = timed("attention", case, timing, "ms", gate, demand=demand)
  peers = [name for name in timings if name not in ours]
  if peers:  # they are compared with our fastest path, which then has a line for each
    best = min(ours, key=lambda name: timings[name].median)
    fastest, rounds = results.pop(best), timings[best].rounds
    for peer in peers:
      theirs, gate = timings[peer].rounds, fastest.correct or ""
      results[peer] = with_ratio(fastest, peer, rounds, theirs, gate)
  return list(results.values())


def paths(shape: AttentionShape, dtype: str) -> dict[str, AttentionPath]:
  """Every path that works here; the results of the others must agree with the first."""
  slots_BT = jnp.broadcast_to(jnp.arange(shape.T), (shape.B, shape.T))
  masked = Sight(visible(Placement(slots_BT), shape.T), reach=Reach())  # as packed rows are
  sight = masked._replace(reach=Reach(is_all=True))
  scoring = Scoring(shape.H**-0.5)
  library = functools.partial(jax.nn.dot_product_attention, is_causal=True)
  found: dict[str, AttentionPath] = {
    "plain": lambda q, k, v: attend(q, k, v, sight, scoring)[0],
    "blocked": lambda q, k, v: attend_blocked(q, k, v, sight, scoring),
    "jax.nn xla": functools.partial(library, implementation="xla"),
  }
  kernel = fused_kernel()
  if kernel.name == "cudnn" and dtype == "bfloat16" and kernel.head_dim >= shape.H:
    found["cudnn"] = lambda q, k, v: attend_cudnn(q, k, v, sight, scoring)
    found["cudnn masked"] = lambda q, k, v: attend_cudnn(q, k, v, masked, scoring)
  if kernel.name == "tiled":
    found["tiled"] = lambda q, k, v: attend_tiled(q, k, v, sight, scoring)
  if kernel.name == "splash" and shape.T % 128 == 0:
    from flaxlm.nn.kernels.splash import attend_splash

    causal = sight._replace(pattern=Pattern(causal=True))
    found["splash"] = lambda q, k, v: attend_splash(q, k, v, causal, scoring)
  return found


def forward_only(path: AttentionPath, q: Any, k: Any, v: Any, grad: Any) -> Any:
  return (path(q, k, v),)


def with_gradients(path: AttentionPath, q: Any, k: Any, v: Any, grad: Any) -> Any:
  out, pull = jax.vjp(path, q, k, v)
  return (out, *pull(grad))


def operands(shape: AttentionShape, dtype: str) -> list[jax.Array]:
  """q, k, v, and a gradient of the output."""
  B, T, N, K, H = shape
  rng = np.random.default_rng(0)
  array = lambda heads: jnp.asarray(
    rng.standard_normal((B, T, heads, H), np.float32), dtype
  )
  return [array(heads) for heads in (N, K, K, N)]


def attention_demand(shape: AttentionShape, dtype: str, backward: bool) -> Demand:
  """Read q, k and v and write the output; backward, as much again for the gradients."""
  B, T, N, K, H = shape
  flops = 4.0 * B * N * H * T * visible_keys(T, None, causal=True)
  item = jnp.dtype(dtype).itemsize
  touched = float(item * B * T * H * (2 * N + 2 * K))
  return Demand(flops * (3 if backward else 1), touched * (2 if backward else 1), dtype)


def flattened(results: Any) -> np.ndarray:
  """Output and gradients, JAX's or PyTorch's, as one array of float32."""
  flat = [np.asarray(getattr(x, "float", lambda x=x: x)(), np.float32) for x in results]
  return np.concatenate([x.ravel() for x in flat])
