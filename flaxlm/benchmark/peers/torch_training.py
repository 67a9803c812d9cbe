# SPDX-License-Identifier: Apache-2.0
"""The peer of the suite `train`: the same transformer as a plain PyTorch module."""

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from flaxlm.benchmark.training_case import OPTIMIZER, Case, time_steps
from flaxlm.config import ResolvedModel


class Block(nn.Module):
  """Pre-norm attention and feed-forward, as nanoGPT writes them."""

  def __init__(self, cfg: ResolvedModel):
    super().__init__()
    D = cfg.width
    self.num_heads = cfg.num_heads
    self.attention_norm, self.ffn_norm = nn.LayerNorm(D), nn.LayerNorm(D)
    self.qkv, self.o = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
    self.up, self.down = nn.Linear(D, 4 * D, bias=False), nn.Linear(4 * D, D, bias=False)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    B, T, D = x.shape
    heads = self.qkv(self.attention_norm(x)).view(B, T, 3, self.num_heads, -1)
    q, k, v = heads.permute(2, 0, 3, 1, 4)
    out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    x = x + self.o(out.transpose(1, 2).reshape(B, T, D))
    return x + self.down(functional.gelu(self.up(self.ffn_norm(x))))


class GPT(nn.Module):
  """Learned positions, tied head; the mean next-token loss of (B, T) tokens."""

  def __init__(self, cfg: ResolvedModel):
    super().__init__()
    self.embedding = nn.Embedding(cfg.vocab_size, cfg.width)
    self.positions = nn.Embedding(cfg.context, cfg.width)
    self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))
    self.final_norm = nn.LayerNorm(cfg.width)

  def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    slots = torch.arange(tokens.shape[1], device=tokens.device)
    x = self.embedding(tokens) + self.positions(slots)
    for block in self.blocks:
      x = block(x)
    logits = self.final_norm(x) @ self.embedding.weight.T
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

  @torch.no_grad()
  def load(self, inputs: dict[str, np.ndarray]) -> None:
    """Copies the parameters that `write_inputs` made for both sides."""
    D = self.embedding.weight.shape[1]
    put = lambda to, array: to.copy_(torch.from_numpy(np.ascontiguousarray(array)))
    put(self.embedding.weight, inputs["embedding/table"])
    put(self.positions.weight, inputs["positions/table"])
    put(self.final_norm.weight, inputs["final_norm/scale"])
    put(self.final_norm.bias, inputs["final_norm/bias"])
    for layer, block in enumerate(self.blocks):
      of = lambda name: inputs[f"blocks/{name}"][layer]  # noqa: B023
      qkv = [of(f"attention/{name}/kernel").reshape(D, D).T for name in "qkv"]
      put(block.qkv.weight, np.concatenate(qkv))
      put(block.o.weight, of("attention/o/kernel").reshape(D, D).T)
      put(block.up.weight, of("ffn/up/kernel").T)
      put(block.down.weight, of("ffn/down/kernel").T)
      for name in ("attention_norm", "ffn_norm"):
        norm = getattr(block, name)
        put(norm.weight, of(f"{name}/scale"))
        put(norm.bias, of(f"{name}/bias"))


def torch_side(
  case: Case, inputs: dict[str, np.ndarray], compiled: bool = False
) -> dict[str, Any]:
  """PyTorch, eager or compiled, on the same inputs, on its GPU if it has one."""
  device = "cuda" if torch.cuda.is_available() else "cpu"
  model = GPT(case.model)
  model.load(inputs)
  model.to(device)
  forward = torch.compile(model) if compiled else model
  half = torch.autocast(device, torch.bfloat16, enabled=case.dtype == "bfloat16")
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

  def step(window: np.ndarray) -> torch.Tensor:
    tokens = torch.from_numpy(window).to(device)
    with half:
      loss = forward(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    if OPTIMIZER.clip_norm is not None:
      nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()

  return time_steps(case, inputs["windows"], step, lambda loss: loss.item())
