# SPDX-License-Identifier: Apache-2.0
"""Single operations in PyTorch, eager and compiled, on its GPU if it has one."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from flaxlm.benchmark.measure import Side


def torch_product(a: np.ndarray, b: np.ndarray, dtype: str) -> Side:
  """`a @ b` in `dtype`."""
  left, right = put(a, dtype), put(b, dtype)
  return Side(waited_for(torch.matmul), lambda: (left, right))


def torch_attention(
  arrays: Sequence[np.ndarray], dtype: str, backward: bool, compiled: bool
) -> dict[str, Side]:
  """`scaled_dot_product_attention`, which picks the best backend that it has.

  `arrays` are q, k, v and the output's gradient, all (B, T, heads, H), as the results are.
  """
  q, k, v, grad = (put(x, dtype).transpose(1, 2).contiguous() for x in arrays)
  grouped = q.shape[1] != k.shape[1]

  def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return functional.scaled_dot_product_attention(
      q, k, v, is_causal=True, enable_gqa=grouped
    )

  def run(attend: Callable) -> Callable:
    def call() -> list[torch.Tensor]:
      if not backward:
        with torch.no_grad():
          return [attend(q, k, v).transpose(1, 2)]
      inputs = [x.detach().requires_grad_() for x in (q, k, v)]
      out = attend(*inputs)
      gradients = torch.autograd.grad(out, inputs, grad)
      return [x.detach().transpose(1, 2) for x in (out, *gradients)]

    return waited_for(call)

  sides = {"torch eager": Side(run(forward))}
  if compiled:
    sides["torch compiled"] = Side(run(torch.compile(forward)))
  return sides


def put(x: np.ndarray, dtype: str) -> torch.Tensor:
  where = "cuda" if torch.cuda.is_available() else "cpu"
  return torch.from_numpy(np.array(x)).to(where, getattr(torch, dtype))


def waited_for(function: Callable) -> Callable:
  """The function, made to return only when the device is done."""

  def call(*args: Any) -> Any:
    result = function(*args)
    if torch.cuda.is_available():
      torch.cuda.synchronize()
    return result

  return call
