# SPDX-License-Identifier: Apache-2.0
"""Beam search: the likeliest completions instead of drawn ones.

As in Wu et al. (2016, section 7) and Vaswani et al. (2017, section 6.1): hypotheses that
ended are ranked by their log-probability over a length penalty, ((5 + length) / 6)^alpha.
A hypothesis ends if its end is among the W best ways to go on, and the search is over
when W have ended, so that one beam is greedy decoding.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flaxlm.decoding.prefill import BLOCK_STEPS, Request, prefill_logits
from flaxlm.decoding.weights import prepare_params
from flaxlm.errors import ConfigError, NonFiniteError
from flaxlm.nn.base import LanguageModel
from flaxlm.sharding import on_host, use_mesh

NEVER = -1e9  # the score of what does not exist; infinities would make NaN when scaled
MOST_BEAMS = 256


class Beams(NamedTuple):
  """W hypotheses of each of B prompts, going on (alive) and ended. Rows of the cache are
  prompt by prompt; scores of the ended ones are penalised for length."""

  cache: Any
  tokens_BWT: jax.Array  # alive
  scores_BW: jax.Array
  ended_BWT: jax.Array  # their last token is the end of text
  ended_scores_BW: jax.Array
  lengths_BW: jax.Array  # of the ended ones
  step: jax.Array


class Hypothesis(NamedTuple):
  """One result: its tokens, the end of text too if it got there, and its score."""

  tokens: list[int]
  score: float
  ended: bool


def beam_search(
  model: LanguageModel,
  params: Any,
  request: Request,
  num_beams: int,
  eos_id: int,
  alpha: float = 0.6,
  mesh: Mesh | None = None,
) -> list[list[Hypothesis]]:
  """For each prompt its `num_beams` best hypotheses, best first.

  `alpha` 0 ranks by log-probability alone; larger values favour longer ones. Raises
  `ConfigError` for what cannot be searched, `NonFiniteError` as `generate` does.
  """
  if not 1 <= num_beams <= MOST_BEAMS:
    raise ConfigError(f"beams is {num_beams}", f"it can be 1 to {MOST_BEAMS}")
  request.check(model.cfg)
  num_steps = request.max_new_tokens
  with use_mesh(mesh):
    params = prepare_params(params, model.cfg)
    logits_BV, cache = prefill_logits(model, params, request, mesh)
    ids = jnp.int32(request.num_ids)
    beams = start(logits_BV, cache, ids, num_beams, num_steps, eos_id, alpha)
    while int(beams.step) < num_steps:
      beams, done = search_block(model, params, beams, ids, eos_id, alpha)
      if bool(done):
        break
  beams = jax.tree.map(on_host, beams._replace(cache=None))
  if not np.isfinite(beams.scores_BW).all():
    raise NonFiniteError("logits are NaN or infinite", "the parameters are damaged")
  return [_ranked(beams, row, alpha) for row in range(len(request.prompts))]


def _ranked(beams: Beams, row: int, alpha: float) -> list[Hypothesis]:
  """A prompt's hypotheses: the ended ones, then, where they are too few, others."""
  step, num_beams = int(beams.step), beams.scores_BW.shape[1]
  found = []
  for beam in range(num_beams):
    score = float(beams.ended_scores_BW[row, beam])
    if score > NEVER / 2:
      length = int(beams.lengths_BW[row, beam])
      tokens = beams.ended_BWT[row, beam, :length].tolist()
      found.append(Hypothesis(tokens, score, True))
  for beam in range(num_beams - len(found)):
    score = float(beams.scores_BW[row, beam]) / float(length_penalty(step, alpha))
    tokens = beams.tokens_BWT[row, beam, :step].tolist()
    found.append(Hypothesis(tokens, score, False))
  return found


def length_penalty(length: Any, alpha: float) -> Any:
  return ((5 + length) / 6) ** alpha


@functools.partial(jax.jit, static_argnames=("num_beams", "num_steps", "eos_id", "alpha"))
def start(
  logits_BV: jax.Array,
  cache: Any,
  num_ids: jax.Array,
  num_beams: int,
  num_steps: int,
  eos_id: int,
  alpha: float,
) -> Beams:
  """One hypothesis per prompt, grown by its first token to `num_beams` of them."""
  B = logits_BV.shape[0]
  empty_BWT = jnp.zeros((B, num_beams, num_steps), jnp.int32)
  scores_BW = jnp.full((B, num_beams), NEVER).at[:, 0].set(0.0)
  beams = Beams(
    cache=cache.take(jnp.repeat(jnp.arange(B), num_beams)),
    tokens_BWT=empty_BWT,
    scores_BW=scores_BW,
    ended_BWT=empty_BWT,
    ended_scores_BW=jnp.full((B, num_beams), NEVER),
    lengths_BW=jnp.zeros((B, num_beams), jnp.int32),
    step=jnp.int32(0),
  )
  logits_BWV = jnp.repeat(logits_BV[:, None], num_beams, 1)
  return grow(beams, logits_BWV, num_ids, eos_id, alpha)


@functools.partial(
  jax.jit, static_argnames=("model", "eos_id", "alpha"), donate_argnames="beams"
)
def search_block(
  model: LanguageModel,
  params: Any,
  beams: Beams,
  num_ids: jax.Array,
  eos_id: int,
  alpha: float,
) -> tuple[Beams, jax.Array]:
  """Some steps, and whether all searches are over."""
  B, W, num_steps = beams.tokens_BWT.shape

  def step(beams: Beams, _: None) -> tuple[Beams, None]:
    last_BW1 = jax.lax.dynamic_slice_in_dim(
      beams.tokens_BWT, jnp.maximum(beams.step - 1, 0), 1, 2
    )
    tokens_R1 = last_BW1.reshape(B * W, 1)
    output = model.apply({"params": params}, tokens_R1, cache=beams.cache)
    grown = grow(
      beams._replace(cache=output.cache),
      output.value[:, -1].reshape(B, W, -1),
      num_ids,
      eos_id,
      alpha,
    )
    # The last block may be longer than what is left; the cache has room for it.
    over, cache = beams.step >= num_steps, grown.cache
    keep = lambda old, new: jnp.where(over, old, new)
    beams, grown = beams._replace(cache=None), grown._replace(cache=None)
    return jax.tree.map(keep, beams, grown)._replace(cache=cache), None

  beams, _ = jax.lax.scan(step, beams, length=BLOCK_STEPS)
  return beams, (beams.ended_scores_BW > NEVER / 2).all()


def grow(
  beams: Beams, logits_BWV: jax.Array, num_ids: jax.Array, eos_id: int, alpha: float
) -> Beams:
  """Each hypothesis by one token: the W best that go on, and up to W that ended."""
  B, W, num_steps = beams.tokens_BWT.shape
  real_V = jnp.arange(logits_BWV.shape[-1]) < num_ids
  logits_BWV = jnp.where(real_V, logits_BWV.astype(jnp.float32), -jnp.inf)
  logprobs_BWV = jax.nn.log_softmax(logits_BWV, -1)
  totals_BC = (beams.scores_BW[:, :, None] + logprobs_BWV).reshape(B, -1)
  # 2 W candidates, of which at most W end: enough of them go on.
  scores_BC, flat_BC = jax.lax.top_k(totals_BC, 2 * W)
  parents_BC, tokens_BC = jnp.divmod(flat_BC, logits_BWV.shape[-1])
  texts_BCT = jnp.take_along_axis(beams.tokens_BWT, parents_BC[:, :, None], 1)
  texts_BCT = jnp.where(
    jnp.arange(num_steps) == beams.step, tokens_BC[:, :, None], texts_BCT
  )
  ends_BC = tokens_BC == eos_id

  alive_BC = jnp.where(ends_BC, NEVER, scores_BC)
  alive_BW, picked_BW = jax.lax.top_k(alive_BC, W)
  parents_BW = jnp.take_along_axis(parents_BC, picked_BW, 1)
  rows_R = (jnp.arange(B)[:, None] * W + parents_BW).reshape(-1)

  length = beams.step + 1
  over_B1 = (beams.ended_scores_BW > NEVER / 2).all(1, keepdims=True)
  counts_BC = ends_BC & (jnp.arange(2 * W) < W) & (scores_BC > NEVER / 2) & ~over_B1
  penalised_BC = jnp.where(counts_BC, scores_BC / length_penalty(length, alpha), NEVER)
  all_scores = jnp.concatenate([beams.ended_scores_BW, penalised_BC], 1)
  all_texts = jnp.concatenate([beams.ended_BWT, texts_BCT], 1)
  all_lengths = jnp.concatenate([beams.lengths_BW, jnp.full((B, 2 * W), length)], 1)
  ended_BW, chosen_BW = jax.lax.top_k(all_scores, W)
  return Beams(
    cache=beams.cache.take(rows_R),
    tokens_BWT=jnp.take_along_axis(texts_BCT, picked_BW[:, :, None], 1),
    scores_BW=alive_BW,
    ended_BWT=jnp.take_along_axis(all_texts, chosen_BW[:, :, None], 1),
    ended_scores_BW=ended_BW,
    lengths_BW=jnp.take_along_axis(all_lengths, chosen_BW, 1),
    step=length,
  )
