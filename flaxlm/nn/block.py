# SPDX-License-Identifier: Apache-2.0
"""One layer of a transformer: x = x + attention(norm(x)); x = x + ffn(norm(x))."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from flaxlm.config import ResolvedModel
from flaxlm.nn.attention import Attention
from flaxlm.nn.cache import CacheSlots, write
from flaxlm.nn.execution import ATTENTION, Execution
from flaxlm.nn.layers import Dropout, FeedForward, build_norm
from flaxlm.nn.masks import Sight
from flaxlm.nn.moe import MoE
from flaxlm.sharding import constrain


class LayerContext(NamedTuple):
  """What a layer reads besides its input: the same for all layers of one kind."""

  sight: Sight  # what self-attention sees
  cache_slots: CacheSlots | None = None  # for the new tokens; None without a cache
  source_BSD: Any = None  # the encoder's output; None without an encoder, or if cached
  source_sight: Sight | None = None  # what cross-attention sees of it
  real_BT: jax.Array | None = None  # False on padding; None: there is no padding


class LayerOutput(NamedTuple):
  """What a layer returns besides its output."""

  cache: Any = None  # (keys, values) with the new tokens; None without a cache
  losses: Any = None  # of a mixture of experts, by name
  attention: Any = None  # captured weights, by name


class Block(nn.Module):
  """Attention, cross-attention if there is a source, and feed-forward, each a branch that
  is added to the residual stream. `norm_placement` says where the norms go:

      pre      x + f(norm(x))          (GPT-2; Xiong et al., 2020)
      post     norm(x + f(x))          (Vaswani et al., 2017)
      output   x + norm(f(x))          (OLMo 2)
      both     x + norm(f(norm(x)))    (Gemma 2)
  """

  cfg: ResolvedModel
  execution: Execution
  reads_source: bool = False

  def setup(self):
    cfg, execution = self.cfg, self.execution
    self.attention = Attention(cfg, execution)
    if cfg.moe.num_experts:
      self.ffn = MoE(cfg, **execution.dtypes)
    else:
      self.ffn = FeedForward(cfg, **execution.projections)
    branches = ["attention", "ffn"]
    if self.reads_source:
      self.cross_attention = Attention(cfg, execution)
      branches.append("cross_attention")
    if cfg.parallel == "one_norm":
      branches.remove("ffn")
    for branch in branches:
      if cfg.norm_placement != "output":
        setattr(self, f"{branch}_norm", build_norm(cfg))
      if cfg.norm_placement in {"output", "both"}:
        setattr(self, f"{branch}_output_norm", build_norm(cfg))
    self.dropout = Dropout(cfg.dropout)

  def __call__(
    self,
    x_BTD: jax.Array,
    cache: Any,
    context: LayerContext,
    deterministic: bool = True,
    capture: bool = False,
  ) -> tuple[jax.Array, LayerOutput]:
    """The output (B, T, D) and a `LayerOutput`.

    `cache` is None, (keys, values), or (keys, values, source keys, source values).
    """
    h_BTD = self.branch_input("attention", x_BTD)
    y_BTD, new_cache, maps = self.attend(h_BTD, cache, context, capture)
    if self.cfg.parallel != "none":  # both branches read the same x (GPT-J, PaLM)
      g_BTD = h_BTD if self.cfg.parallel == "one_norm" else self.branch_input("ffn", x_BTD)
      x_BTD = self.add("attention", x_BTD, y_BTD, deterministic)
    else:
      x_BTD = self.add("attention", x_BTD, y_BTD, deterministic)
      if self.reads_source:
        h_BTD = self.branch_input("cross_attention", x_BTD)
        y_BTD, cross_maps = self.attend_to_source(h_BTD, cache, context, capture)
        x_BTD = self.add("cross_attention", x_BTD, y_BTD, deterministic)
        maps |= cross_maps
      g_BTD = self.branch_input("ffn", x_BTD)
    y_BTD, losses = self.feed_forward(g_BTD, context, cached=cache is not None)
    x_BTD = self.add("ffn", x_BTD, y_BTD, deterministic)
    return on_share(x_BTD, self.execution), LayerOutput(new_cache, losses, maps)

  # -- The residual stream

  def branch_input(self, branch: str, x_BTD: jax.Array) -> jax.Array:
    """The input of a branch: norm(x), or x."""
    if self.cfg.norm_placement in {"pre", "both"}:
      x_BTD = getattr(self, f"{branch}_norm")(x_BTD)
    return on_whole_rows(x_BTD)

  def add(
    self, branch: str, x_BTD: jax.Array, y_BTD: jax.Array, deterministic: bool
  ) -> jax.Array:
    """x + y, with dropout on y and norms where `norm_placement` puts them."""
    y_BTD = on_share(y_BTD, self.execution)
    if self.cfg.norm_placement in {"output", "both"}:
      y_BTD = getattr(self, f"{branch}_output_norm")(y_BTD)
    x_BTD = x_BTD + self.dropout(y_BTD, deterministic=deterministic)
    if self.cfg.norm_placement == "post":
      x_BTD = getattr(self, f"{branch}_norm")(x_BTD)
    return x_BTD

  # -- The branches

  def attend(
    self, x_BTD: jax.Array, cache: Any, context: LayerContext, capture: bool
  ) -> tuple[jax.Array, Any, dict]:
    """Self-attention: its output, the cache with the new tokens, the captured weights."""
    keys_values = self.attention.keys_values(x_BTD, context.sight.cos_sin)
    new_cache = None
    if cache is not None:
      assert context.cache_slots is not None
      new_cache = keys_values = write(cache[:2], keys_values, context.cache_slots)
    cached = cache is not None
    y_BTD, weights_BNTS = self.attention(x_BTD, context.sight, keys_values, cached, capture)
    maps = {"self": weights_BNTS} if capture else {}
    return checkpoint_name(y_BTD, ATTENTION), new_cache, maps

  def attend_to_source(
    self, x_BTD: jax.Array, cache: Any, context: LayerContext, capture: bool
  ) -> tuple[jax.Array, dict]:
    """Cross-attention: its output, and the captured weights."""
    cached = cache is not None
    keys_values = cache[2:] if cached else self.source_keys_values(context.source_BSD)
    sight = context.source_sight
    assert sight is not None, "a block that reads a source has one"
    y_BTD, weights_BNTS = self.cross_attention(x_BTD, sight, keys_values, cached, capture)
    return y_BTD, {"cross": weights_BNTS} if capture else {}

  def source_keys_values(self, source_BSD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The keys and values of the encoder's output for this layer's cross-attention."""
    return self.cross_attention.keys_values(source_BSD)

  def feed_forward(
    self, x_BTD: jax.Array, context: LayerContext, cached: bool
  ) -> tuple[jax.Array, dict]:
    """The feed-forward's output, and the losses of its experts, if it has any."""
    if not self.cfg.moe.num_experts:
      return self.ffn(x_BTD), {}
    # Decoding drops no choice: a result must not depend on the rest of the batch.
    return self.ffn(x_BTD, context.real_BT, dropping=not cached)


def on_share(x_BTD: jax.Array, execution: Execution) -> jax.Array:
  """The layout for norms and residual sums: whole rows or, with `sequence_parallel`, a
  share of each row per device along `tensor` (Korthikanti et al., 2022, section 4.2.2).

  A branch's output arrives as partial sums over `tensor`; this constraint adds them up.
  """
  if execution.sequence_parallel:
    return constrain(x_BTD, "batch", "norm_length", "act_embed")
  return on_whole_rows(x_BTD)


def on_whole_rows(x_BTD: jax.Array) -> jax.Array:
  """The layout for a branch's input: `tensor` splits heads and the FFN, but not rows."""
  return constrain(x_BTD, "batch", "length", "act_embed")
