# SPDX-License-Identifier: Apache-2.0
"""PyTorch's side: compiled, with the attention that is fastest on the device at hand.

Only what the device can run is tried; what fails says why. Of a deep model each block is
compiled, as torchtitan does, because its loop is unrolled by PyTorch's compiler.
"""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.attention import SDPBackend, flex_attention, sdpa_kernel, varlen

from benchmarks.gpu.cases import (
  PERIOD,
  Layout,
  TrainCase,
  batches_of,
  block_of_numbers,
  constant_of,
  offset_of,
)
from flaxlm.benchmark.peers.torch_training import (
  Attend,
  Decoder,
  Rows,
  attend_causal,
  train_step,
)
from flaxlm.benchmark.training_case import time_steps
from flaxlm.data.objectives import Batch
from flaxlm.errors import first_line

DEEP = 13  # blocks, from which on each is compiled by itself
TIMED_CALLS = 10


class Choice(NamedTuple):
  """A way to attend: what it asks about a batch's documents, and the function."""

  documents: Callable[[np.ndarray | None], Any]
  attend: Attend


def run_torch(case: TrainCase, layout: Layout) -> dict[str, Any]:
  """Losses, rates and the attention that was taken. Needs no GPU, but says nothing then."""
  device = "cuda" if torch.cuda.is_available() else "cpu"
  cfg = case.cfg
  name, choice, tried = fastest(case, layout, device)
  dtype = getattr(torch, cfg.training.param_dtype)
  with torch.device(device):
    model = Decoder(cfg.model, choice.attend).to(dtype)
  model.load(leaves(torch.from_numpy(block_of_numbers()).to(device)))
  step = train_step(model, compiled(model), cfg.training.dtype)
  place = lambda x: torch.from_numpy(np.asarray(x, np.int64)).to(device)

  def take(batch: Batch) -> torch.Tensor:
    tokens, targets, positions = map(
      place, (batch.tokens_BT, batch.targets_BT, batch.positions_BT)
    )
    documents = choice.documents(batch.segments_BT)
    return step(Rows(tokens, targets, positions, documents))

  found = time_steps(case, batches_of(case, layout), take, lambda loss: loss.item())
  peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
  version = f"PyTorch {torch.__version__}, {name} attention ({', '.join(tried)})"
  return found | {"peak_bytes": peak, "note": version}


def compiled(model: Decoder) -> Callable[[Rows], torch.Tensor]:
  """The model, compiled on a GPU; a CPU only tries it out."""
  if not torch.cuda.is_available():
    return model
  if len(model.blocks) < DEEP:
    return torch.compile(model)
  for block in model.blocks:
    block.compile()
  model.loss = torch.compile(model.loss)  # type: ignore[method-assign]
  return model


def leaves(block: torch.Tensor) -> Callable[..., torch.Tensor]:
  """The parameters by the rule of `cases`."""

  def leaf(name: str, shape: tuple[int, ...], layer: int = 0) -> torch.Tensor:
    if (constant := constant_of(name)) is not None:
      return torch.full(shape, constant, device=block.device)
    size = math.prod(shape)
    first = (offset_of(name) + layer * size) % PERIOD
    places = torch.arange(first, first + size, device=block.device) % PERIOD
    return block[places].view(shape)

  return leaf


# -- Attention -----------------------------------------------------------------------------


def choices(layout: Layout, on_gpu: bool) -> dict[str, Choice]:
  """The ways to attend that PyTorch has for a layout."""
  nothing = lambda segments_BT: None
  if layout == "whole":
    if not on_gpu:
      return {"own": Choice(nothing, attend_causal)}
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    return {name: Choice(nothing, with_backend(one)) for name, one in backends.items()}
  if not on_gpu:
    return {"own": Choice(visible_mask, attend_causal)}
  return {
    "varlen": Choice(document_ends, attend_varlen),
    "flex": Choice(block_mask, attend_flex),
  }


def with_backend(backend: SDPBackend) -> Attend:
  def attend(q: Any, k: Any, v: Any, mask: Any) -> torch.Tensor:
    with sdpa_kernel(backend):
      return attend_causal(q, k, v, mask)

  return attend


def visible_mask(segments_BT: np.ndarray | None) -> torch.Tensor:
  seen = segments_BT[:, :, None] == segments_BT[:, None]  # type: ignore[index]
  return torch.from_numpy(np.tril(seen))[:, None]


def document_ends(segments_BT: np.ndarray | None) -> tuple[torch.Tensor, int]:
  """Where documents begin in all rows one after the other, and the end; the longest."""
  segments = np.asarray(segments_BT)
  starts = np.flatnonzero(np.diff(segments, axis=1, prepend=0).ravel())
  ends = np.append(starts, segments.size)
  return torch.from_numpy(ends.astype(np.int32)).cuda(), int(np.diff(ends).max())


def attend_varlen(
  q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Any
) -> torch.Tensor:
  ends, longest = documents
  flat = [x.flatten(0, 1) for x in (q, k, v)]
  grouped = q.shape[2] != k.shape[2]
  options: Any = dict(window_size=(-1, 0), enable_gqa=grouped)
  out = varlen.varlen_attn(*flat, ends, ends, longest, longest, **options)
  return out.view(q.shape)


def block_mask(segments_BT: np.ndarray | None) -> Any:
  """Made anew for each batch, as training has to."""
  segments = torch.from_numpy(np.asarray(segments_BT)).cuda()

  def seen(b: Any, h: Any, query: Any, key: Any) -> Any:
    return (query >= key) & (segments[b, query] == segments[b, key])

  B, T = segments.shape
  return flex_attention.create_block_mask(seen, B, None, T, T, "cuda", _compile=True)


def attend_flex(
  q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Any
) -> torch.Tensor:
  grouped = q.shape[2] != k.shape[2]
  heads_first = [x.transpose(1, 2) for x in (q, k, v)]
  out = flex_attention.flex_attention(
    *heads_first, block_mask=documents, enable_gqa=grouped
  )
  return out.transpose(1, 2)


def fastest(case: TrainCase, layout: Layout, device: str) -> tuple[str, Choice, list[str]]:
  """The way that takes least for one layer, forward and backward, and what all took."""
  found, tried = {}, []
  options = choices(layout, device == "cuda")
  for name, choice in options.items():
    try:
      found[name] = layer_seconds(case, layout, choice, device)
      tried.append(f"{name} {1e3 * found[name]:.2f} ms a layer")
    except Exception as e:  # a kernel that this device lacks raises all kinds
      tried.append(f"{name}: {first_line(e)[:80]}")
  if not found:
    raise RuntimeError("; ".join(tried))
  best = min(found, key=lambda name: found[name])
  return best, options[best], tried


def layer_seconds(case: TrainCase, layout: Layout, choice: Choice, device: str) -> float:
  cfg = case.cfg
  model, data = cfg.model, cfg.data
  attend = torch.compile(choice.attend) if device == "cuda" else choice.attend
  documents = choice.documents(batches_of(case, layout)[0].segments_BT)
  shape = (data.batch_size, data.seq_len)
  q, k, v = (
    torch.randn(*shape, heads, model.head_dim, device=device, requires_grad=True)
    for heads in (model.num_heads, model.num_kv_heads, model.num_kv_heads)
  )
  dtype = getattr(torch, cfg.training.dtype)

  def call() -> None:
    out = attend(q.to(dtype), k.to(dtype), v.to(dtype), documents)
    out.backward(torch.ones_like(out))

  def wait() -> float:
    if device == "cuda":
      torch.cuda.synchronize()
    return time.perf_counter()

  call()
  started = wait()
  for _ in range(TIMED_CALLS):
    call()
  return (wait() - started) / TIMED_CALLS
