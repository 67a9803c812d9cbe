# SPDX-License-Identifier: Apache-2.0
"""The models: a `Decoder` is an embedding, a stack of `Block`s, a norm and a head.

Encoders, encoder-decoders and RNNs share the embedding and the head (`LanguageModel`) and
take the same arguments. Parameters are plain nested dicts; there is no other state.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from flaxlm.config import NO_KERNEL, FusedKernel, ModelConfig, TrainingConfig
from flaxlm.nn.base import LanguageModel, Output, Source, dense
from flaxlm.nn.cache import KVCache, empty_cache
from flaxlm.nn.execution import Execution
from flaxlm.nn.rnn import RNN, init_rnn_cache
from flaxlm.nn.stack import Stack
from flaxlm.sharding import with_shardings


def build_model(
  cfg: ModelConfig,
  training: TrainingConfig | None = None,
  kernel: FusedKernel = NO_KERNEL,
) -> LanguageModel:
  """The model of a config, run as `Execution.of(training, kernel)` says."""
  execution = Execution.of(training, kernel)
  return FAMILIES[cfg.family](cfg.resolve(), execution)


def unrolled(model: LanguageModel) -> LanguageModel:
  """The same model without a loop over layers and without remat, whose values could not
  leave them."""
  plain = dataclasses.replace(model.execution, scanned=False, remat="none")
  return model.clone(execution=plain)


def init_params(model: LanguageModel, seed: jax.Array) -> Any:
  """Random parameters, boxed with their logical names."""
  tokens_BT = jnp.zeros((1, 1), jnp.int32)
  source = {}
  if model.cfg.family == "encoder_decoder":
    source = {"source": Source(tokens_BT)}
  return model.init(jax.random.key(seed), tokens_BT, **source)["params"]


def boxed_shapes(model: LanguageModel) -> Any:
  """Shape, dtype and logical names of each parameter; computes and allocates nothing."""
  seed = jax.ShapeDtypeStruct((), jnp.uint32)
  return jax.eval_shape(functools.partial(init_params, model), seed)


def abstract_params(model: LanguageModel, mesh: Mesh) -> Any:
  """Shape, dtype and sharding of each parameter; computes and allocates nothing."""
  return with_shardings(boxed_shapes(model), mesh)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def init_cache(model: LanguageModel, batch: int, slots: int) -> Any:
  """An empty cache for `batch` rows of up to `slots` tokens.

  An encoder-decoder's cache holds its source too, and its method `start` makes it. An RNN's
  cache has the size of its state, whatever `slots` is.
  """
  if model.cfg.family == "rnn":
    return init_rnn_cache(model.cfg, batch)
  return empty_cache(model.cfg, batch, slots, model.execution.cache_dtype)


class Decoder(LanguageModel):
  """A decoder-only transformer (Radford et al., 2018): each token sees earlier ones."""

  def setup_body(self) -> None:
    self.stack = Stack(self.cfg, self.execution)
    nn.share_scope(self, self.stack)

  def hidden(self, tokens_BT: jax.Array, *args: Any, **options: Any) -> Output:
    """The last block's normalised output (B, T, D); arguments as in `Stack`."""
    return Output(*self.stack(self.embed(tokens_BT), *args, **options))


class Encoder(LanguageModel):
  """An encoder (Devlin et al., 2019): each token sees all of its document."""

  def setup_body(self) -> None:
    self.stack = Stack(self.cfg, self.execution, causal=False)
    nn.share_scope(self, self.stack)
    if self.cfg.pooler:
      self.pooler = dense(self.cfg, self.execution)

  def hidden(
    self,
    tokens_BT: jax.Array,
    *args: Any,
    token_types_BT: jax.Array | None = None,
    **options: Any,
  ) -> Output:
    """The last block's output (B, T, D); arguments as in `Stack`."""
    x_BTD = self.embed(tokens_BT, token_types_BT)
    output = Output(*self.stack(x_BTD, *args, **options))
    if self.is_initializing() and self.cfg.pooler:
      self.pool(output.value)
    return output

  def pool(self, x_BTD: jax.Array) -> jax.Array:
    """One vector (B, D) per row, from the hidden vector of its first token."""
    return jnp.tanh(self.pooler(x_BTD[:, 0]))


class EncoderDecoder(LanguageModel):
  """An encoder-decoder (Vaswani et al., 2017; Raffel et al., 2020)."""

  def setup_body(self) -> None:
    encoder_cfg = dataclasses.replace(self.cfg, depth=self.cfg.encoder_depth)
    self.encoder = Stack(encoder_cfg, self.execution, causal=False)
    self.decoder = Stack(self.cfg, self.execution, reads_source=True)

  def encode(self, source: Source, **options: Any) -> Output:
    """The encoder's output (B, S, D)."""
    x_BSD = self.embed(source.tokens_BS)
    return Output(*self.encoder(x_BSD, source.positions_BS, source.segments_BS, **options))

  def hidden(
    self,
    tokens_BT: jax.Array,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    source: Source | None = None,
    cache: KVCache | None = None,
    **options: Any,
  ) -> Output:
    """The decoder's output (B, T, D); the source is `source`, or is in `cache`."""
    encoded_source, encoded = None, Output(None, losses={}, attention={})
    if cache is None:
      assert source is not None, "an encoder-decoder needs a source"
      passed = {k: v for k, v in options.items() if k in {"deterministic", "capture"}}
      encoded = self.encode(source, **passed)
      encoded_source = (encoded.value, source.segments_BS)
    x_BTD = self.embed(tokens_BT)
    options |= dict(cache=cache, source=encoded_source)
    output = Output(*self.decoder(x_BTD, positions_BT, segments_BT, **options))
    maps = {f"encoder_{name}": weights for name, weights in encoded.attention.items()}
    losses = {
      name: loss + encoded.losses.get(name, 0.0) for name, loss in output.losses.items()
    }
    return output._replace(losses=losses, attention=output.attention | maps)

  def start(self, source: Source, slots: int) -> KVCache:
    """An empty cache for `slots` target tokens, which holds the source."""
    batch = source.tokens_BS.shape[0]
    segments_BS = source.segments_BS
    if segments_BS is None:
      segments_BS = jnp.ones_like(source.tokens_BS)
    source_BSD = self.encode(source._replace(segments_BS=segments_BS)).value
    known = self.decoder.source_cache(source_BSD, segments_BS)
    empty = empty_cache(self.cfg, batch, slots, self.execution.cache_dtype)
    return empty._replace(source=known)


FAMILIES = {
  "decoder": Decoder,
  "encoder": Encoder,
  "encoder_decoder": EncoderDecoder,
  "rnn": RNN,
}
