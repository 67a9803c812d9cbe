# SPDX-License-Identifier: Apache-2.0
"""What a model makes of a batch: its output, and the log-probability of every target.

Two sets of parameters are asked: those that learn, and the *reference*, which are those of
the run that training began from. With adapters the reference is the same parameters with
the adapters off, which `TrainState.frozen` is; otherwise it is a copy that never changes.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from flaxlm.data.objectives import Batch
from flaxlm.nn.base import LanguageModel, Output, Source
from flaxlm.nn.lora import combined, has_dropout
from flaxlm.training.losses import cross_entropy


def forward(model: LanguageModel, params: Any, batch: Batch, **options: Any) -> Output:
  """The model's output for a batch; `options` go to `apply`."""
  source = {}
  if batch.source_BS is not None:
    fields = (batch.source_BS, batch.source_positions_BS, batch.source_segments_BS)
    source = {"source": Source(*fields)}
  return model.apply(
    {"params": params},
    batch.tokens_BT,
    batch.positions_BT,
    batch.segments_BT,
    **source,
    **options,
  )


def drops_units(model: LanguageModel, frozen: Any) -> bool:
  """Whether a training step has dropout: of the model, or of its adapters."""
  return model.cfg.dropout > 0 or has_dropout(frozen)


def learning_pass(
  model: LanguageModel, learning: Any, frozen: Any, batch: Batch, key: jax.Array
) -> tuple[Any, Output]:
  """(the parameters together, the hidden vectors) of what learns, with dropout."""
  dropout = drops_units(model, frozen)
  params = combined(frozen, learning)
  rngs = {"dropout": key} if dropout else {}
  options = dict(deterministic=not dropout, rngs=rngs, method="hidden")
  return params, forward(model, params, batch, **options)


def target_logprobs(
  model: LanguageModel,
  params: Any,
  x_BTD: jax.Array,
  targets_BT: ArrayLike,
  num_chunks: int = 1,
) -> jax.Array:
  """log p(target) of each hidden vector, in nats and float32, (B, T).

  With more than one chunk the logits (B, T, V) are computed for a part of each row at a
  time, and again in the backward pass.
  """

  def of_chunk(chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
    x_BTD, targets_BT = chunk
    logits_BTV = model.apply({"params": params}, x_BTD, method="logits")
    return -cross_entropy(logits_BTV, targets_BT)

  if num_chunks == 1:
    return of_chunk((x_BTD, jnp.asarray(targets_BT)))
  chunks = cut_rows(x_BTD, num_chunks), cut_rows(targets_BT, num_chunks)
  logprobs_CBT = jax.lax.map(jax.checkpoint(of_chunk), chunks)
  return jnp.moveaxis(logprobs_CBT, 0, 1).reshape(jnp.shape(targets_BT))


def reference_logprobs(
  model: LanguageModel, reference: Any, batch: Batch, num_chunks: int = 1
) -> jax.Array:
  """log p(target) under the reference, (B, T): without dropout, and without a gradient."""
  output = forward(model, reference, batch, method="hidden")
  logprobs_BT = target_logprobs(
    model, reference, output.value, batch.targets_BT, num_chunks
  )
  return jax.lax.stop_gradient(logprobs_BT)


def cut_rows(x: ArrayLike, num_chunks: int) -> jax.Array:
  """(B, T, ...) as (C, B, T / C, ...)."""
  B, T, *rest = jnp.shape(x)
  return jnp.moveaxis(jnp.reshape(x, (B, num_chunks, T // num_chunks, *rest)), 1, 0)
