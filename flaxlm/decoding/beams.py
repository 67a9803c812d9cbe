# SPDX-License-Identifier: Apache-2.0
"""Beam search: the likeliest completions instead of drawn ones.

As in Wu et al. (2016, section 7) and Vaswani et al. (2017, section 6.1): finished
hypotheses are ranked by their log-probability over a length penalty,
((5 + length) / 6)^alpha. A hypothesis is finished when the end of text is among the W best
continuations of a prompt; the search stops when W are finished, so that a search with one
beam is greedy decoding.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flaxlm.decoding.prefill import BLOCK_STEPS, Request, prefill_prompts
from flaxlm.decoding.weights import prepare_params
from flaxlm.errors import ConfigError, NonFiniteError
from flaxlm.nn.base import LanguageModel
from flaxlm.nn.vocabulary import mask_padding_ids
from flaxlm.sharding import on_host, use_mesh

NO_SCORE = -1e9  # of a hypothesis that does not exist; infinity would make NaN if scaled
MOST_BEAMS = 256
MOST_ALPHA = 5.0  # float32 holds the penalty of any length


class Beams(NamedTuple):
  """W hypotheses that go on (alive) and W that ended, for each of B prompts.

  The cache has B x W rows, in that order. Scores are log-probabilities; those of the ended
  hypotheses are divided by the length penalty.
  """

  cache: Any
  tokens_BWT: jax.Array  # alive
  scores_BW: jax.Array
  ended_BWT: jax.Array  # each with the end of text as its last token
  ended_scores_BW: jax.Array
  lengths_BW: jax.Array  # of the ended hypotheses
  step: jax.Array


class Hypothesis(NamedTuple):
  """One result: its tokens, with the end of text if it `ended`, and its score."""

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
  `ConfigError` for too many beams or a bad request, `NonFiniteError` as `generate` does.
  """
  if not 1 <= num_beams <= MOST_BEAMS:
    raise ConfigError(f"beams is {num_beams}", f"it can be 1 to {MOST_BEAMS}")
  if not 0 <= alpha <= MOST_ALPHA:
    raise ConfigError(f"length-penalty is {alpha}", f"it can be 0 to {MOST_ALPHA:g}")
  request.check(model.cfg)
  num_steps = request.max_new_tokens
  with use_mesh(mesh):
    params = prepare_params(params, model.cfg)
    logits_BV, cache = prefill_prompts(model, params, request, mesh)
    ids = jnp.int32(request.num_ids)
    beams = init_beams(logits_BV, cache, ids, num_beams, num_steps, eos_id, alpha)
    while int(beams.step) < num_steps:
      beams, done = search_block(model, params, beams, ids, eos_id, alpha)
      if bool(done):
        break
  beams = jax.tree.map(on_host, beams._replace(cache=None))
  if not np.isfinite(beams.scores_BW).all():
    raise NonFiniteError("logits are NaN or infinite", "the parameters are damaged")
  return [_ranked(beams, row, alpha) for row in range(len(request.prompts))]


def _ranked(beams: Beams, row: int, alpha: float) -> list[Hypothesis]:
  """A prompt's hypotheses: the ended ones, then unfinished ones if those are too few."""
  step, num_beams = int(beams.step), beams.scores_BW.shape[1]
  found = []
  for beam in range(num_beams):
    score = float(beams.ended_scores_BW[row, beam])
    if score > NO_SCORE / 2:
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
def init_beams(
  logits_BV: jax.Array,
  cache: Any,
  num_ids: jax.Array,
  num_beams: int,
  num_steps: int,
  eos_id: int,
  alpha: float,
) -> Beams:
  """The beams after the first token: the `num_beams` best continuations of each prompt."""
  B = logits_BV.shape[0]
  empty_BWT = jnp.zeros((B, num_beams, num_steps), jnp.int32)
  scores_BW = jnp.full((B, num_beams), NO_SCORE).at[:, 0].set(0.0)
  beams = Beams(
    cache=cache.take(jnp.repeat(jnp.arange(B), num_beams)),
    tokens_BWT=empty_BWT,
    scores_BW=scores_BW,
    ended_BWT=empty_BWT,
    ended_scores_BW=jnp.full((B, num_beams), NO_SCORE),
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
  """`BLOCK_STEPS` steps: (beams, whether the search for every prompt is over)."""
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
    # The last block may have more steps than are left; the cache has room for them.
    over, cache = beams.step >= num_steps, grown.cache
    keep = lambda old, new: jnp.where(over, old, new)
    beams, grown = beams._replace(cache=None), grown._replace(cache=None)
    return jax.tree.map(keep, beams, grown)._replace(cache=cache), None

  beams, _ = jax.lax.scan(step, beams, length=BLOCK_STEPS)
  return beams, (beams.ended_scores_BW > NO_SCORE / 2).all()


def grow(
  beams: Beams, logits_BWV: jax.Array, num_ids: jax.Array, eos_id: int, alpha: float
) -> Beams:
  """Extends the hypotheses by one token: the W best go on, and up to W more have ended."""
  B, W, num_steps = beams.tokens_BWT.shape
  logits_BWV = mask_padding_ids(logits_BWV.astype(jnp.float32), num_ids)
  logprobs_BWV = jax.nn.log_softmax(logits_BWV, -1)
  totals_BC = (beams.scores_BW[:, :, None] + logprobs_BWV).reshape(B, -1)
  # At most W of the 2 W candidates end, so at least W go on.
  scores_BC, flat_BC = jax.lax.top_k(totals_BC, 2 * W)
  parents_BC, tokens_BC = jnp.divmod(flat_BC, logits_BWV.shape[-1])
  texts_BCT = jnp.take_along_axis(beams.tokens_BWT, parents_BC[:, :, None], 1)
  texts_BCT = jnp.where(
    jnp.arange(num_steps) == beams.step, tokens_BC[:, :, None], texts_BCT
  )
  ends_BC = tokens_BC == eos_id

  alive_BC = jnp.where(ends_BC, NO_SCORE, scores_BC)
  alive_BW, picked_BW = jax.lax.top_k(alive_BC, W)
  parents_BW = jnp.take_along_axis(parents_BC, picked_BW, 1)
  rows_R = (jnp.arange(B)[:, None] * W + parents_BW).reshape(-1)

  length = beams.step + 1
  over_B1 = (beams.ended_scores_BW > NO_SCORE / 2).all(1, keepdims=True)
  counts_BC = ends_BC & (jnp.arange(2 * W) < W) & (scores_BC > NO_SCORE / 2) & ~over_B1
  penalised_BC = jnp.where(counts_BC, scores_BC / length_penalty(length, alpha), NO_SCORE)
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
