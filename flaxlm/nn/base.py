# SPDX-License-Identifier: Apache-2.0
"""What all model families share: input and output types, the embedding and the head."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxlm.config import ResolvedModel
from flaxlm.nn.execution import Execution
from flaxlm.nn.kernels.fusion import activate
from flaxlm.nn.layers import Einsum, Embedding, build_norm
from flaxlm.nn.masks import LOWEST
from flaxlm.nn.vocabulary import mask_padding_ids
from flaxlm.sharding import constrain


class Source(NamedTuple):
  """The input of an encoder-decoder's encoder, packed like the target rows."""

  tokens_BS: Any
  positions_BS: Any = None
  segments_BS: Any = None


class Output(NamedTuple):
  """What a model returns. `value` is logits (B, T, V) in float32, or hidden (B, T, D).

  `losses` are auxiliary losses (the experts' balance), summed over tokens. `attention`
  holds the captured attention maps, by name, stacked over layers.
  """

  value: Any
  cache: Any = None
  losses: Any = None
  attention: Any = None


class LanguageModel(nn.Module):
  """Embeds tokens and turns hidden vectors into logits; each family defines `hidden`."""

  cfg: ResolvedModel
  execution: Execution = Execution()

  def setup(self):
    cfg, execution = self.cfg, self.execution
    V, D = cfg.vocab_size, cfg.width
    self.embedding = Embedding((V, D), ("vocab", "embed"), **execution.dtypes)
    if cfg.num_token_types:
      types = (cfg.num_token_types, D)
      self.token_types = Embedding(types, ("slots", "embed"), **execution.dtypes)
    if cfg.head_transform:
      self.head_transform = HeadTransform(cfg, execution)
    if not cfg.tied_embeddings:
      names = ("embed", "vocab")
      float32 = dict(output_dtype=jnp.float32)
      self.head = Einsum("BTD,DV->BTV", (D, V), names, **float32, **execution.dtypes)
    if cfg.head_biased:
      zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("vocab",))
      self.head_bias = self.param("head_bias", zeros, (V,), execution.param_dtype)
    self.setup_body()

  def setup_body(self) -> None:
    """Builds what lies between the embedding and the head."""
    raise NotImplementedError

  def hidden(self, tokens_BT: jax.Array, *args: Any, **kwargs: Any) -> Output:
    """The last layer's normalised output (B, T, D), and the new cache."""
    raise NotImplementedError

  def __call__(self, tokens_BT: jax.Array, *args: Any, **kwargs: Any) -> Output:
    """Logits (B, T, V) in float32, and the new cache; arguments as in `hidden`."""
    output = self.hidden(tokens_BT, *args, **kwargs)
    return output._replace(value=self.logits(output.value))

  def head_params(self, params: Any) -> Any:
    """Those of `params` that `logits` reads."""
    names = {"head", "head_bias", "head_transform"}
    names |= {"embedding"} if self.cfg.tied_embeddings else set()
    return {name: part for name, part in params.items() if name in names}

  def embed(
    self, tokens_BT: jax.Array, token_types_BT: jax.Array | None = None
  ) -> jax.Array:
    """Embedded tokens (B, T, D), before positions are added."""
    cfg = self.cfg
    x_BTD = self.embedding(tokens_BT)
    if cfg.embedding_scaled:  # to the size of the sinusoids (Vaswani et al., 2017, 3.4)
      x_BTD *= jnp.asarray(cfg.width**0.5, x_BTD.dtype)
    if cfg.num_token_types:
      if token_types_BT is None:
        token_types_BT = jnp.zeros_like(tokens_BT)
      x_BTD += self.token_types(token_types_BT)
    return x_BTD

  def logits(self, x_BTD: jax.Array) -> jax.Array:
    """Logits (B, T, V) in float32 of `hidden`'s output; the lowest ones for padding ids."""
    cfg = self.cfg
    if cfg.head_transform:
      x_BTD = self.head_transform(x_BTD)
    tied = cfg.tied_embeddings
    logits_BTV = self.embedding.logits(x_BTD) if tied else self.head(x_BTD)
    if cfg.logit_scale != 1:
      logits_BTV *= cfg.logit_scale
    if cfg.head_biased:
      logits_BTV += self.head_bias
    if cfg.logit_softcap is not None:
      logits_BTV = cfg.logit_softcap * jnp.tanh(logits_BTV / cfg.logit_softcap)
    if cfg.is_padded:  # padding has no probability, and no gradient
      logits_BTV = mask_padding_ids(logits_BTV, cfg.num_ids, LOWEST)
    return constrain(logits_BTV, "batch", "length", "act_vocab")


class HeadTransform(nn.Module):
  """Dense, activation, norm: what BERT applies to hidden vectors before its head."""

  cfg: ResolvedModel
  execution: Execution

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    x_BTD = dense(self.cfg, self.execution, "dense")(x_BTD)
    return build_norm(self.cfg, name="norm")(activate(x_BTD, self.cfg.activation))


def dense(cfg: ResolvedModel, execution: Execution, name: str | None = None) -> Einsum:
  """A biased D x D projection."""
  D = cfg.width
  names = ("embed", "act_embed")  # of the two dims of size D, only the first is sharded
  return Einsum("BTD,DE->BTE", (D, D), names, biased=True, name=name, **execution.dtypes)
