# SPDX-License-Identifier: Apache-2.0
"""The peer of the suite `train`: the same transformer as a plain PyTorch module."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from flaxlm.benchmark.training_case import OPTIMIZER, Case, time_steps
from flaxlm.config import ResolvedModel

# Attention of q (B, T, N, H) over k and v (B, T, K, H); the rest is its own business.
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Any], torch.Tensor]
# A parameter of our tree: its name, the shape it gets, and the layer, if it is stacked.
Leaf = Callable[..., torch.Tensor]


def attend_causal(
  q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
  """PyTorch's own attention; `mask` (B, 1, T, T) says what is seen, None: all before."""
  grouped = q.shape[2] != k.shape[2]
  q, k, v = (x.transpose(1, 2) for x in (q, k, v))
  out = functional.scaled_dot_product_attention(
    q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
  )
  return out.transpose(1, 2)


class Rows(NamedTuple):
  """A batch: tokens and targets (B, T), places in their documents, and what `Attend` asks
  about documents."""

  tokens: torch.Tensor
  targets: torch.Tensor
  positions: torch.Tensor
  documents: Any = None


class Block(nn.Module):
  """Pre-norm attention and feed-forward, as nanoGPT writes them; or LLaMA's, with RMSNorm,
  rotations, fewer kv heads and a gate."""

  def __init__(self, cfg: ResolvedModel, attend: Attend):
    super().__init__()
    D, F, linear = cfg.width, cfg.ffn_width, _linear
    self.cfg, self.attend = cfg, attend
    self.attention_norm, self.ffn_norm = build_norm(cfg), build_norm(cfg)
    queries, keys = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    self.qkv, self.o = linear(D, queries + 2 * keys), linear(queries, D)
    self.up, self.down = linear(D, F * (2 if cfg.gated else 1)), linear(F, D)

  def forward(self, x: torch.Tensor, cos_sin: Any, documents: Any) -> torch.Tensor:
    cfg = self.cfg
    B, T, _ = x.shape
    N, K, H = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    heads = self.qkv(self.attention_norm(x)).view(B, T, N + 2 * K, H)
    q, k, v = heads.split((N, K, K), 2)
    if cos_sin is not None:
      q, k = rotated(q, cos_sin), rotated(k, cos_sin)
    x = x + self.o(self.attend(q, k, v, documents).reshape(B, T, N * H))
    h = self.up(self.ffn_norm(x))
    if cfg.gated:
      gate, h = h.chunk(2, -1)
      return x + self.down(functional.silu(gate) * h)
    return x + self.down(functional.gelu(h))


class Decoder(nn.Module):
  """GPT-2 or LLaMA; the mean next-token loss of a batch."""

  def __init__(self, cfg: ResolvedModel, attend: Attend = attend_causal):
    super().__init__()
    self.cfg = cfg
    self.embedding = nn.Embedding(cfg.vocab_size, cfg.width)
    learned = cfg.positions == "learned"
    self.positions = nn.Embedding(cfg.context, cfg.width) if learned else None
    self.blocks = nn.ModuleList(Block(cfg, attend) for _ in range(cfg.depth))
    self.final_norm = build_norm(cfg)
    self.head = None if cfg.tied_embeddings else _linear(cfg.width, cfg.vocab_size)

  def forward(self, rows: Rows) -> torch.Tensor:
    x, cos_sin = self.embedding(rows.tokens), None
    if self.positions is None:
      cos_sin = rotation(rows.positions, self.cfg)
    else:
      x = x + self.positions(rows.positions)
    for block in self.blocks:
      x = block(x, cos_sin, rows.documents)
    return self.loss(x, rows.targets)

  def loss(self, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    head = self.embedding if self.head is None else self.head
    logits = functional.linear(self.final_norm(x), head.weight)
    return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

  @torch.no_grad()
  def load(self, leaf: Leaf) -> None:
    """Copies the parameters that both sides begin with."""
    cfg, D = self.cfg, self.cfg.width
    same = lambda to, name: to.weight.copy_(leaf(name, to.weight.shape))
    same(self.embedding, "embedding/table")
    if self.positions is not None:
      same(self.positions, "positions/table")
    if self.head is not None:
      self.head.weight.copy_(leaf("head/kernel", (D, cfg.vocab_size)).T)
    load_norm(self.final_norm, "final_norm", leaf)
    N, K = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    projections = {
      "qkv": {"attention/q": (D, N), "attention/k": (D, K), "attention/v": (D, K)},
      "o": {"attention/o": (N, D)},
      "up": {f"ffn/{name}": (D, cfg.ffn_width) for name in ["gate"] * cfg.gated + ["up"]},
      "down": {"ffn/down": (cfg.ffn_width, D)},
    }
    for layer, block in enumerate(self.blocks):
      for to, parts in projections.items():
        found = [leaf(f"blocks/{of}/kernel", s, layer).T for of, s in parts.items()]
        getattr(block, to).weight.copy_(torch.cat(found))
      for name in ("attention_norm", "ffn_norm"):
        load_norm(getattr(block, name), f"blocks/{name}", leaf, layer)


def _linear(inputs: int, outputs: int) -> nn.Linear:
  return nn.Linear(inputs, outputs, bias=False)


def build_norm(cfg: ResolvedModel) -> nn.Module:
  kind = nn.LayerNorm if cfg.norm == "layernorm" else nn.RMSNorm
  return kind(cfg.width, cfg.norm_epsilon)


def load_norm(norm: Any, name: str, leaf: Leaf, *layer: int) -> None:
  norm.weight.copy_(leaf(f"{name}/scale", norm.weight.shape, *layer))
  if isinstance(norm, nn.LayerNorm):
    norm.bias.copy_(leaf(f"{name}/bias", norm.weight.shape, *layer))


def rotation(positions: torch.Tensor, cfg: ResolvedModel) -> tuple[torch.Tensor, ...]:
  """RoPE's (cos, sin), each (B, T, 1, H / 2)."""
  assert cfg.positions == "rope" and cfg.rope.scaling == "none" and cfg.rope.fraction == 1
  pairs = torch.arange(0, cfg.head_dim, 2, device=positions.device) / cfg.head_dim
  angles = positions[..., None, None].float() * cfg.rope.theta**-pairs
  return angles.cos(), angles.sin()


def rotated(x: torch.Tensor, cos_sin: tuple[torch.Tensor, ...]) -> torch.Tensor:
  """The pairs (i, i + H/2) of every head turned, as in LLaMA's release for transformers."""
  cos, sin = (part.to(x.dtype) for part in cos_sin)
  first, second = x.chunk(2, -1)
  return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def torch_side(
  case: Case, inputs: dict[str, np.ndarray], compiled: bool = False
) -> dict[str, Any]:
  """PyTorch, eager or compiled, on the same inputs, on its GPU if it has one."""
  device = "cuda" if torch.cuda.is_available() else "cpu"
  model = Decoder(case.model)
  whole = lambda name: torch.from_numpy(np.ascontiguousarray(inputs[name]))
  model.load(lambda name, shape, *layer: whole(name)[layer].reshape(shape))
  model.to(device)
  step = train_step(model, torch.compile(model) if compiled else model, case.dtype)
  positions = torch.arange(case.model.context, device=device)[None]

  def take(window: np.ndarray) -> torch.Tensor:
    tokens = torch.from_numpy(window).to(device)
    return step(Rows(tokens[:, :-1], tokens[:, 1:], positions))

  return time_steps(case, inputs["windows"], take, lambda loss: loss.item())


def train_step(
  model: nn.Module, forward: Callable, dtype: str
) -> Callable[[Rows], torch.Tensor]:
  """A function that takes one step of AdamW on a batch and returns its loss."""
  device = next(model.parameters()).device.type
  half = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")
  decayed = [p for p in model.parameters() if p.ndim >= 2]
  others = [p for p in model.parameters() if p.ndim < 2]
  optimizer = torch.optim.AdamW(
    [
      {"params": decayed, "weight_decay": OPTIMIZER.weight_decay},
      {"params": others, "weight_decay": 0.0},
    ],
    lr=OPTIMIZER.learning_rate,
    betas=(OPTIMIZER.beta1, OPTIMIZER.beta2),
    eps=OPTIMIZER.epsilon,
    fused=True,
  )

  def step(rows: Rows) -> torch.Tensor:
    with half:
      loss = forward(rows)
    loss.backward()
    if OPTIMIZER.clip_norm is not None:
      nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()

  return step
