# SPDX-License-Identifier: Apache-2.0
"""The models: a `Decoder` is an embedding, a stack of `Block`s, a norm and a head.

The parameters of all blocks are stacked along a leading layer dim, always. Whether the
stack runs as a loop or unrolled, and what is kept for the backward pass, is a knob of
the run (`Execution`), never of the checkpoint.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from flaxlm.config import ModelConfig, TrainingConfig
from flaxlm.nn.attention import Attention, KVCache, Visibility
from flaxlm.nn.layers import (
  Einsum,
  Embedding,
  FeedForward,
  build_norm,
  rotation,
  sinusoids,
)
from flaxlm.sharding import constrain, with_shardings


@dataclasses.dataclass(frozen=True)
class Execution:
  """How a model runs. Changing any of this changes no parameter and no shape."""

  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32
  remat: str = "none"
  scanned: bool = False


def build_model(cfg: ModelConfig, run: TrainingConfig | None = None) -> "Decoder":
  """The model of a config; `run` gives dtypes, remat and scan (default: float32)."""
  if run is None:
    return Decoder(cfg.resolve(), Execution())
  dtype, param_dtype = jnp.dtype(run.dtype), jnp.dtype(run.param_dtype)
  return Decoder(cfg.resolve(), Execution(dtype, param_dtype, run.remat, run.scanned))


def init_params(model: "Decoder", seed: jax.Array) -> Any:
  """Random parameters, boxed with their logical names."""
  # The loop compiles once for all layers, and makes the same numbers.
  model = model.clone(run=dataclasses.replace(model.run, scanned=True))
  tokens_BT = jnp.zeros((1, 1), jnp.int32)
  return model.init(jax.random.key(seed), tokens_BT)["params"]


def abstract_params(model: "Decoder", mesh: Mesh) -> Any:
  """Shape, dtype and sharding of each parameter; computes and allocates nothing."""
  boxed = jax.eval_shape(functools.partial(init_params, model), jnp.uint32(0))
  return with_shardings(boxed, mesh)


REMAT_POLICIES = {
  "full": None,  # keep the block's input only
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Decoder(nn.Module):
  """A decoder-only transformer: tokens to logits."""

  cfg: ModelConfig
  run: Execution = Execution()

  def setup(self):
    cfg, run = self.cfg, self.run
    dtypes = dict(dtype=run.dtype, param_dtype=run.param_dtype)
    V, D = cfg.vocab_size, cfg.width
    self.embedding = Embedding((V, D), ("vocab", "embed"), **dtypes)
    if cfg.positions == "learned":
      self.positions = Embedding((cfg.context, D), ("slots", "embed"), **dtypes)
    self.blocks = build_stack(cfg, run)
    self.dropout = nn.Dropout(cfg.dropout)
    if cfg.norm_placement == "pre":
      self.final_norm = build_norm(cfg)
    if not cfg.tied_embeddings:
      names = ("embed", "vocab")
      self.head = Einsum("BTD,DV->BTV", (D, V), names, output_dtype=jnp.float32, **dtypes)

  def __call__(self, tokens_BT, *args, **kwargs):
    """Logits (B, T, V) in float32, and the new cache; arguments as in `hidden`."""
    x_BTD, cache = self.hidden(tokens_BT, *args, **kwargs)
    return self.logits(x_BTD), cache

  def hidden(
    self,
    tokens_BT: jax.Array,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    cache: KVCache | None = None,
    deterministic: bool = True,
  ) -> tuple[jax.Array, KVCache | None]:
    """The last block's normalised output (B, T, D), and the new cache.

    Without a cache a row is read from its start, `segments_BT` keeping packed documents
    apart. With a cache the T tokens follow each row's `lengths_B` earlier ones.
    """
    B, T = tokens_BT.shape
    slots_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    if cache is not None:
      assert segments_BT is None, "a cached row is one document"
      slots_BT += cache.lengths_B[:, None]
    if positions_BT is None:
      positions_BT = slots_BT
    where = Visibility(slots_BT, segments_BT, segments_BT)
    x_BTD, cos_sin = self.embed(tokens_BT, positions_BT)
    x_BTD = self.dropout(x_BTD, deterministic=deterministic)
    x_BTD = constrain(x_BTD, "batch", "length", "act_embed")
    layers = None if cache is None else (cache.k_LBSKH, cache.v_LBSKH)
    x_BTD, layers = self.blocks(x_BTD, layers, where, cos_sin, deterministic)
    if self.cfg.norm_placement == "pre":
      x_BTD = self.final_norm(x_BTD)
    if cache is None:
      return x_BTD, None
    k_LBSKH, v_LBSKH = layers
    return x_BTD, KVCache(k_LBSKH, v_LBSKH, cache.lengths_B + T)

  def embed(self, tokens_BT, positions_BT):
    """Embedded tokens (B, T, D) with additive positions; RoPE's (cos, sin) or None."""
    cfg = self.cfg
    x_BTD = self.embedding(tokens_BT)
    match cfg.positions:
      case "learned":
        x_BTD += self.positions(positions_BT)
      case "sinusoidal":  # scaled up to the size of the sinusoids (Vaswani et al., 3.4)
        x_BTD *= cfg.width**0.5
        x_BTD += sinusoids(positions_BT, cfg.width).astype(x_BTD.dtype)
      case "rope":
        assert cfg.head_dim is not None
        return x_BTD, rotation(positions_BT, cfg.head_dim, cfg.rope.theta)
    return x_BTD, None

  def logits(self, x_BTD: jax.Array) -> jax.Array:
    """Logits (B, T, V) in float32 of what `hidden` returned."""
    tied = self.cfg.tied_embeddings
    logits_BTV = self.embedding.logits(x_BTD) if tied else self.head(x_BTD)
    return constrain(logits_BTV, "batch", "length", "act_vocab")


def build_stack(cfg: ModelConfig, run: Execution) -> nn.Module:
  """All L blocks: one set of stacked parameters, looped over or unrolled."""
  block = Block
  if run.remat != "none":
    policy = REMAT_POLICIES[run.remat]
    block = nn.remat(block, policy=policy, prevent_cse=not run.scanned, static_argnums=(5,))
  stack = nn.scan(
    block,
    variable_axes={"params": 0, "intermediates": 0},
    split_rngs={"params": True, "dropout": True},
    in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
    out_axes=0,
    length=cfg.depth,
    unroll=1 if run.scanned else cfg.depth,
    metadata_params={nn.PARTITION_NAME: "layers"},
  )
  return stack(cfg, run)


class Block(nn.Module):
  """One layer: attention, then feed-forward, each added to the residual stream."""

  cfg: ModelConfig
  run: Execution

  @nn.compact
  def __call__(self, x_BTD, cache, where, cos_sin, deterministic):
    cfg, run = self.cfg, self.run
    dtypes = dict(dtype=run.dtype, param_dtype=run.param_dtype)
    attention_norm = build_norm(cfg, name="attention_norm")
    ffn_norm = build_norm(cfg, name="ffn_norm")
    attention = Attention(cfg, **dtypes, name="attention")
    ffn = FeedForward(cfg, **dtypes, name="ffn")
    dropout = nn.Dropout(cfg.dropout, deterministic=deterministic)

    if cfg.norm_placement == "pre":
      branch, cache = attention(attention_norm(x_BTD), where, cos_sin, cache)
      x_BTD = x_BTD + dropout(branch)
      x_BTD = x_BTD + dropout(ffn(ffn_norm(x_BTD)))
    else:
      branch, cache = attention(x_BTD, where, cos_sin, cache)
      x_BTD = attention_norm(x_BTD + dropout(branch))
      x_BTD = ffn_norm(x_BTD + dropout(ffn(x_BTD)))
    return constrain(x_BTD, "batch", "length", "act_embed"), cache
