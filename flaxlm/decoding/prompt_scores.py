# SPDX-License-Identifier: Apache-2.0
"""How likely a model finds each token of a prompt, and which tokens it would have taken.

`scoring` sums the tokens of continuations; here each has its own number, as servers report
them. Logits exist for a few places at a time.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flaxlm.decoding.loading import Run
from flaxlm.decoding.prefill import check_ids, is_real_token, pad_rows
from flaxlm.decoding.scoring import (
  check_finite,
  check_scored,
  check_scores,
  map_logits,
  without_capacity,
)
from flaxlm.errors import ConfigError
from flaxlm.nn.base import LanguageModel
from flaxlm.sharding import batch_shards, on_host, use_mesh

WIDTHS = (0, 1, 20)  # how many of the likeliest are found: few programs


class PromptScores(NamedTuple):
  """The log-probability (nats) of each token of a prompt but the first, which follows
  nothing, and the likeliest (id, log-probability) in its place, best first."""

  logprobs: list[float]
  top: list[list[tuple[int, float]]]


def score_prompt(run: Run, prompt: Sequence[int], num_top: int = 0) -> PromptScores:
  """The scores of a prompt that a decoder or an RNN reads.

  Raises `ConfigError` for a model that reads no such prompt, an id that it or its tokenizer
  has not, and a prompt that does not fit; `NonFiniteError` when logits are NaN.
  """
  check_scores(run)
  cfg = run.model.cfg
  if cfg.family == "encoder_decoder":
    raise ConfigError("an encoder-decoder gives the tokens that it reads no probability")
  if cfg.family != "rnn" and len(prompt) > cfg.context:
    raise ConfigError(
      f"prompt of {len(prompt)} tokens > model.context={cfg.context}", "shorten it"
    )
  check_ids([prompt], cfg.num_ids)
  check_scored(run, [prompt[1:]])
  if len(prompt) < 2:
    return PromptScores([], [])
  tokens_BT, lengths_B = pad_rows([prompt], batch_shards(run.mesh.shape))
  width = min(next(n for n in (*WIDTHS, num_top) if n >= num_top), run.num_ids)
  with use_mesh(run.mesh):
    found = scores_of_tokens(
      without_capacity(run.model),
      run.params,
      tokens_BT,
      lengths_B,
      jnp.int32(run.num_ids),
      width,
    )
  own_T, ids_TX, top_TX = (on_host(x_BT)[0, : len(prompt) - 1] for x_BT in found)
  check_finite(own_T)
  rows = zip(ids_TX[:, :num_top].tolist(), top_TX[:, :num_top].tolist(), strict=True)
  top = [[*zip(ids, logprobs, strict=True)] for ids, logprobs in rows]
  return PromptScores(own_T.tolist(), top)


@functools.partial(jax.jit, static_argnames=("model", "num_top"))
def scores_of_tokens(
  model: LanguageModel,
  params: Any,
  tokens_BT: jax.Array,
  lengths_B: jax.Array,
  num_ids: jax.Array,
  num_top: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Of the token after each place of right-padded rows: its log-probability (B, T), and the
  X likeliest ids with theirs (B, T, X). Those after the end of a row mean nothing."""
  segments_BT = is_real_token(tokens_BT, lengths_B).astype(jnp.int32)
  output = model.apply({"params": params}, tokens_BT, None, segments_BT, method="hidden")
  next_BT = jnp.roll(tokens_BT, -1, axis=1)

  def score(logits_BXV: jax.Array, next_BX: jax.Array) -> tuple[jax.Array, ...]:
    total_BX1 = jax.nn.logsumexp(logits_BXV, axis=-1, keepdims=True)
    own_BX1 = jnp.take_along_axis(logits_BXV, next_BX[..., None], axis=-1) - total_BX1
    top_BXK, ids_BXK = jax.lax.top_k(logits_BXV, num_top)
    return own_BX1[..., 0], ids_BXK, top_BXK - total_BX1

  return map_logits(score, model, params, num_ids, output.value, next_BT)
