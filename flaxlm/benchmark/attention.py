# SPDX-License-Identifier: Apache-2.0
"""Causal self-attention by path, forward, and forward with the backward pass.

FLOPs are strict: 4 H per query, head and visible key, so half of the square, and twice as
many again for the backward pass. A path that computes the whole square, or the scores a
second time, pays for it in its fraction.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxlm.benchmark.measure import Setting, Side, against, agree, measure, timed
from flaxlm.benchmark.report import Result, Work
from flaxlm.nn.attention import (
  Placement,
  Reach,
  Scoring,
  Sight,
  attend,
  attend_blocked,
  attend_cudnn,
  visible,
)
from flaxlm.planning.cost import visible_keys
from flaxlm.platform import kernel_head_dim

Path = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Shape(NamedTuple):
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


def bench_attention(setting: Setting) -> list[Result]:
  """Milliseconds of each path on each shape, for training's two passes and for one."""
  shapes = setting.pick(
    [Shape(1, 16, 2, 1, 8)],
    [Shape(8, 256, 6, 6, 64), Shape(2, 1024, 8, 2, 64)],
    [Shape(8, 2048, 16, 16, 64), Shape(4, 4096, 32, 8, 128)],
  )
  dtype = setting.pick("float32", "float32", "bfloat16")
  results = []
  for shape in shapes:
    for backward in (False, True):
      results += bench_shape(shape, dtype, backward, setting)
  return results


def bench_shape(shape: Shape, dtype: str, backward: bool, setting: Setting) -> list[Result]:
  arrays = operands(shape, dtype)
  run = with_gradients if backward else forward_only
  sides = {
    name: Side(jax.jit(functools.partial(run, path)), lambda: arrays)
    for name, path in paths(shape, dtype).items()
  }
  if setting.peer == "torch":
    from flaxlm.benchmark.torch_pieces import torch_attention

    numpy = [np.asarray(x, np.float32) for x in arrays]
    sides |= torch_attention(numpy, dtype, backward, setting.size)
  timings = measure(sides, setting)
  work = work_of(shape, dtype, backward)
  results: dict[str, Result] = {}
  peers = [name for name in timings if name.startswith("torch")]
  wanted = leaves(timings["plain"].result)
  for name, timing in timings.items():
    gate = agree("the result", leaves(timing.result), wanted, TOLERANCES[dtype])
    if name in peers:
      continue
    passes = "forward+backward" if backward else "forward"
    case = f"{name} {shape.text} {dtype} {passes}"
    results[name] = timed(("attention", case), timing, "ms", work=work)
    results[name].correct = gate
  best = min(results, key=lambda name: timings[name].median)
  compared = [
    against(results[best], peer, timings[peer], timings[best], results[best].correct or "")
    for peer in peers
  ]
  kept = [result for name, result in results.items() if name != best or not compared]
  return [*kept, *compared]


def paths(shape: Shape, dtype: str) -> dict[str, Path]:
  """Every way to compute it here; the others are held against the first."""
  slots_BT = jnp.broadcast_to(jnp.arange(shape.T), (shape.B, shape.T))
  sight = Sight(visible(Placement(slots_BT), shape.T))
  reach = Reach(is_all=True)
  scoring = Scoring(shape.H**-0.5)
  library = functools.partial(jax.nn.dot_product_attention, is_causal=True)
  found: dict[str, Path] = {
    "plain": lambda q, k, v: attend(q, k, v, sight, scoring)[0],
    "blocked": lambda q, k, v: attend_blocked(q, k, v, sight, scoring, reach=reach),
    "jax.nn xla": functools.partial(library, implementation="xla"),
  }
  if dtype == "bfloat16" and kernel_head_dim() >= shape.H:
    masked = Reach()  # as packed documents are
    found["cudnn"] = lambda q, k, v: attend_cudnn(q, k, v, sight, scoring, reach)
    found["cudnn masked"] = lambda q, k, v: attend_cudnn(q, k, v, sight, scoring, masked)
  return found


def forward_only(path: Path, q: Any, k: Any, v: Any, grad: Any) -> tuple[jax.Array, ...]:
  return (path(q, k, v),)


def with_gradients(path: Path, q: Any, k: Any, v: Any, grad: Any) -> tuple[jax.Array, ...]:
  out, pull = jax.vjp(path, q, k, v)
  return (out, *pull(grad))


def operands(shape: Shape, dtype: str) -> list[jax.Array]:
  """q, k, v, and a gradient of the output."""
  B, T, N, K, H = shape
  rng = np.random.default_rng(0)
  array = lambda heads: jnp.asarray(
    rng.standard_normal((B, T, heads, H), np.float32), dtype
  )
  return [array(heads) for heads in (N, K, K, N)]


def work_of(shape: Shape, dtype: str, backward: bool) -> Work:
  """The least there is to do: read q, k, v, write the output, and likewise gradients."""
  B, T, N, K, H = shape
  flops = 4.0 * B * N * H * T * visible_keys(T, None, causal=True)
  item = jnp.dtype(dtype).itemsize
  touched = float(item * B * T * H * (2 * N + 2 * K))
  return Work(flops * (3 if backward else 1), touched * (2 if backward else 1), dtype)


def leaves(results: Any) -> np.ndarray:
  """Output and gradients as one array of float32."""
  flat = [np.asarray(getattr(x, "float", lambda x=x: x)(), np.float32) for x in results]
  return np.concatenate([x.ravel() for x in flat])
