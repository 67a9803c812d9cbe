# SPDX-License-Identifier: Apache-2.0
"""What encoders are used for: filling in masked tokens, and sentence embeddings."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxlm.decoding.completions import as_texts
from flaxlm.decoding.loading import Run
from flaxlm.decoding.pooling import Pooling, load_pooling, pool
from flaxlm.decoding.prefill import bucket, check_ids, is_real_token, pad_rows
from flaxlm.errors import ConfigError
from flaxlm.nn.base import LanguageModel
from flaxlm.nn.vocabulary import mask_padding_ids
from flaxlm.sharding import batch_shards, on_host, use_mesh
from flaxlm.tokenizers import MASK

ROWS_AT_A_TIME = 64


class Filled(NamedTuple):
  """A text with its masks filled in, and, for each mask, the likeliest tokens."""

  text: str
  filled: str
  candidates: list[list[tuple[str, float]]]  # (token, probability), best first


def fill_masks(
  run: Run, texts: str | Sequence[str], num_candidates: int = 5
) -> list[Filled]:
  """Replaces every `[MASK]` of each text by its likeliest token, independently.

  Raises `ConfigError` for a model that cannot fill masks, and for a text that has no mask
  or is too long.
  """
  mask_id = run.tokenizer.mask_id
  if run.cfg.model.family != "encoder" or mask_id is None:
    raise ConfigError(f"{run.path} cannot fill masks", "use the run of an encoder")
  check_has_head(run)
  texts = as_texts(texts, "text")
  rows = encode_rows(run, texts, masked=True)
  for text, row in zip(texts, rows, strict=True):
    if mask_id not in row:
      raise ConfigError(f"{text!r} has no {MASK}", f'as in "import {MASK}"')
  logits_of_ids = functools.partial(logits_of_rows, num_ids=jnp.int32(run.num_ids))
  all_logits_BTV = map_in_batches(run, rows, logits_of_ids)
  results = []
  for text, row, logits_TV in zip(texts, rows, all_logits_BTV, strict=True):
    candidates, ids = [], list(row)
    for at in np.flatnonzero(np.array(row) == mask_id).tolist():
      logits_V = logits_TV[at].astype(np.float64)
      logits_V[mask_id] = -np.inf
      probs_V = np.exp(logits_V - logits_V.max())
      probs_V /= probs_V.sum()
      best = np.argsort(-probs_V, kind="stable")[:num_candidates].tolist()
      candidates.append(
        [(run.tokenizer.decode([id_]), float(probs_V[id_])) for id_ in best]
      )
      ids[at] = best[0]
    results.append(Filled(text, run.tokenizer.decode(ids), candidates))
  return results


def check_has_head(run: Run) -> None:
  """Raises `ConfigError` for an encoder without a head: its logits would mean nothing."""
  if run.is_headless:
    raise ConfigError(
      f"{run.path} is an encoder without a masked-LM head: it cannot guess tokens",
      "`flaxlm embed` is what it is for",
    )


def embed_texts(
  run: Run,
  texts: str | Sequence[str],
  normalised: bool = False,
  warn: Callable[[str], None] | None = None,
) -> list[np.ndarray]:
  """A vector for each text, of its hidden vectors: their mean (D,), or what the files of
  an imported checkpoint say instead, see `Pooling`.

  `normalised` scales it to length 1. `warn` gets a line if texts are cut to the length that
  the files allow. Raises `ConfigError` if the run is not an encoder, and for a text that
  is empty or too long.
  """
  if run.cfg.model.family != "encoder":
    raise ConfigError(f"{run.path} is not an encoder", "use the run of an encoder")
  pooling = load_pooling(run.path)
  rows = rows_to_embed(run, texts, pooling, warn)
  return embed_rows(run, rows, pooling, normalised)


def rows_to_embed(
  run: Run,
  texts: str | Sequence[str],
  pooling: Pooling,
  warn: Callable[[str], None] | None = None,
) -> list[list[int]]:
  """The ids of each text, as `embed_texts` reads it."""
  texts = [pooling.prompt + text for text in as_texts(texts, "text")]
  texts = [text.lower() for text in texts] if pooling.lowercase else texts
  return encode_rows(run, texts, most=pooling.max_tokens, warn=warn)


def embed_rows(
  run: Run, rows: Sequence[Sequence[int]], pooling: Pooling, normalised: bool = False
) -> list[np.ndarray]:
  """`embed_texts` for ids that are known already."""
  pooled = functools.partial(pooled_hidden, modes=pooling.modes)
  vectors_BD = map_in_batches(run, rows, pooled)
  if normalised or pooling.normalised:
    vectors_BD = [x_D / max(np.linalg.norm(x_D), 1e-12) for x_D in vectors_BD]
  return vectors_BD


def encode_rows(
  run: Run,
  texts: Sequence[str],
  masked: bool = False,
  most: int | None = None,
  warn: Callable[[str], None] | None = None,
) -> list[list[int]]:
  """The ids of each text, with its special tokens, as in training.

  With `most`, rows are cut to so many ids, and `warn` is told how many were.
  """
  context = run.model.cfg.context
  rows, num_cut = [], 0
  for number, text in enumerate(texts, 1):
    encode = run.tokenizer.encode_masked if masked else run.tokenizer.encode
    ids = encode(text)
    if not ids:
      raise ConfigError(f"text {number} is empty", "give it at least one word")
    row = run.tokenizer.framed(ids, "text")
    if most is not None and len(row) > most:
      row = run.tokenizer.framed(ids[: len(ids) - (len(row) - most)], "text")
      num_cut += 1
    if len(row) > context:
      raise ConfigError(
        f"text {number} has {len(row)} tokens > model.context={context}", "shorten it"
      )
    rows.append(row)
  check_ids(rows, run.model.cfg.num_ids)
  if num_cut and warn is not None:
    warn(f"texts cut to their first {most} tokens, as the checkpoint says: {num_cut}")
  return rows


def map_in_batches(
  run: Run, rows: Sequence[Sequence[int]], function: Any
) -> list[np.ndarray]:
  """Applies `function(model, params, tokens_BT, lengths_B)` to the rows on the run's mesh;
  one result for each row."""
  multiple = batch_shards(run.mesh.shape)
  results: list[np.ndarray] = []
  for start in range(0, len(rows), ROWS_AT_A_TIME):
    some = rows[start : start + ROWS_AT_A_TIME]
    # A bucket of rows, so that few programs compile.
    size = multiple * bucket(-(-len(some) // multiple), smallest=1)
    tokens_BT, lengths_B = pad_rows(some, size)
    with use_mesh(run.mesh):
      values = function(run.model, run.params, tokens_BT, lengths_B)
    results += list(on_host(values)[: len(some)])
  return results


@functools.partial(jax.jit, static_argnames="model")
def logits_of_rows(
  model: LanguageModel,
  params: Any,
  tokens_BT: jax.Array,
  lengths_B: jax.Array,
  num_ids: jax.Array,
) -> jax.Array:
  """Logits (B, T, V) of right-padded rows; -inf for ids from `num_ids` on."""
  segments_BT = is_real_token(tokens_BT, lengths_B).astype(jnp.int32)
  logits_BTV = model.apply({"params": params}, tokens_BT, None, segments_BT).value
  return mask_padding_ids(logits_BTV, num_ids)


@functools.partial(jax.jit, static_argnames=("model", "modes"))
def pooled_hidden(
  model: LanguageModel,
  params: Any,
  tokens_BT: jax.Array,
  lengths_B: jax.Array,
  modes: tuple[str, ...],
) -> jax.Array:
  """One vector (B, D) per mode of each right-padded row, of the hidden vectors of its
  tokens, special ones included."""
  real_BT = is_real_token(tokens_BT, lengths_B)
  variables, segments_BT = {"params": params}, real_BT.astype(jnp.int32)
  output = model.apply(variables, tokens_BT, None, segments_BT, method="hidden")
  return pool(modes, output.value, real_BT, lengths_B)
