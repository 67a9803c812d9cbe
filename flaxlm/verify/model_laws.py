# SPDX-License-Identifier: Apache-2.0
"""Laws of one forward pass: who sees whom, where positions are, what heads read."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from flaxlm.nn.base import Source
from flaxlm.nn.models import build_model
from flaxlm.verify.case import (
  END_ID,
  ROUNDING,
  Case,
  Finding,
  Law,
  distance,
  does_not_apply,
  one_layer,
  random_params,
  random_tokens,
)
from flaxlm.verify.shrink import SEQ_LEN

LEAST_CHANGE = 1e-6  # of logits, for what must not be seen to count as seen
SAME_PROGRAM = "one program on numbers that may not matter"


# -- Who sees whom -------------------------------------------------------------------------


def causal(case: Case) -> Finding:
  """Changes all tokens from some place on, in another place in each row."""
  if case.family == "encoder":
    return does_not_apply("an encoder sees both sides")
  tokens_BT = np.repeat(random_tokens(1, SEQ_LEN), 8, 0)
  cuts_B1 = np.array([1, 2, 3, 5, 8, 12, 17, 23])[:, None]
  is_later_BT = np.arange(SEQ_LEN) >= cuts_B1
  other_BT = np.where(is_later_BT, random_tokens(8, SEQ_LEN, seed=8), tokens_BT)
  source = case.source_of(8)
  logits = [case.logits(x, source=source) for x in (tokens_BT, other_BT)]
  change_BT = np.abs(logits[1] - logits[0]).max(-1)
  details = []
  if not np.all(change_BT[is_later_BT] > 0):
    details.append("what changes does not change the logits at its own place")
  error = float(change_BT[~is_later_BT].max())
  if case.family != "rnn":
    seen = sight(case, "G", "decoder")
    maps = shown(case)[1]
    if not all(np.all(own_diagonal(x) > 0) for name, x in maps.items() if "self" in name):
      details.append("a query does not see its own key")
    later_TS = np.triu(np.ones_like(seen.documents_TS), 1) > 0
    unseen_TS = seen.documents_TS & ~later_TS & ~seen.sees_TS
    details += described(unseen_TS, "a global layer's query does not see an earlier key")
    error = max(error, float(seen.change_TS[later_TS].max()))
  return Finding(error, details=details)


def both_sides(case: Case) -> Finding:
  """The same for encoders, where every token of a document sees every other."""
  if case.family in ("decoder", "rnn"):
    return does_not_apply("there is no encoder")
  if case.family == "encoder_decoder":
    return both_sides_of_source(case)
  if "G" not in case.model_cfg.period:
    return does_not_apply("all layers are local")
  seen = sight(case, "G", "encoder")
  details = described(seen.documents_TS & ~seen.sees_TS, "a query does not see a key")
  return Finding(float(seen.change_TS[~seen.documents_TS].max()), details=details)


def both_sides_of_source(case: Case) -> Finding:
  """Each token of a source changes every logit of its target, wherever it stands."""
  tokens_BT = np.repeat(random_tokens(1, SEQ_LEN), 10, 0)
  sources_BS = np.repeat(random_tokens(1, 9), 10, 0)
  rows = np.arange(1, 10)
  sources_BS[rows, rows - 1] = sources_BS[rows, rows - 1] % 59 + 1
  source = Source(sources_BS, segments_BS=np.ones_like(sources_BS))
  logits_BTV = case.logits(tokens_BT, source=source)
  change_BT = np.abs(logits_BTV[1:] - logits_BTV[0]).max(-1)
  unseen = np.argwhere(~(change_BT > 0))
  details = [f"target position {t} does not see source position {s}" for s, t in unseen[:3]]
  return Finding(0.0, details=details)


def window(case: Case) -> Finding:
  """A local layer's query sees the last `window` keys of its document, and no other one
  but sink tokens."""
  cfg = case.model_cfg
  if "L" not in cfg.period or case.family == "rnn":
    return does_not_apply("model.window is none")
  seen = sight(case, "L", case.family)
  query, key = np.arange(SEQ_LEN)[:, None], np.arange(SEQ_LEN)[None]
  assert cfg.window is not None
  near_TS = seen.documents_TS & (np.abs(query - key) < cfg.window)
  if case.family != "encoder":
    near_TS &= key <= query
  far_TS = ~near_TS & ~seen.sinks_TS
  details = described(near_TS & ~seen.sees_TS, "a query does not see a key in its window")
  outside_TS = far_TS & (seen.change_TS > LEAST_CHANGE)
  details += described(outside_TS, "a query sees a key outside its window")
  return Finding(float(seen.change_TS[far_TS].max()), details=details)


def sinks(case: Case) -> Finding:
  """A document's first tokens stay visible to local layers, and a learned sink takes
  weight: large ones take all of it."""
  cfg = case.model_cfg
  has_tokens = cfg.sink_tokens > 0 and "L" in cfg.period
  if case.family == "rnn" or not (has_tokens or cfg.learned_sinks):
    return does_not_apply("model.sink_tokens is 0, and model.learned_sinks is false")
  details: list[str] = []
  error = 0.0
  if has_tokens:
    seen = sight(case, "L", case.family)
    details += described(
      seen.sinks_TS & ~seen.sees_TS, "a query does not see a sink token of its document"
    )
  if cfg.learned_sinks:
    plain = build_model(dataclasses.replace(cfg, learned_sinks=False))
    tokens_BT, source = random_tokens(8, SEQ_LEN), case.source_of(8)
    without = without_sinks(case.params)
    expected = case.logits(tokens_BT, source=source, model=plain, params=without)
    given = lambda value: case.logits(
      tokens_BT, source=source, params=with_sinks(case.params, value)
    )
    error = distance(given(-100.0), expected)
    blind = np.abs(given(100.0) - expected).max()
    if not blind > LEAST_CHANGE or not np.isfinite(blind):
      details.append("a learned sink takes no weight from the keys")
  return Finding(error, details=details)


def with_sinks(params: Any, value: float) -> Any:
  """The parameters with all learned sinks at `value`."""
  change = lambda path, x: np.full_like(x, value) if path[-1].key == "sinks" else x
  return jax.tree_util.tree_map_with_path(change, params)


def without_sinks(params: Any) -> Any:
  if not isinstance(params, dict):
    return params
  return {name: without_sinks(x) for name, x in params.items() if name != "sinks"}


@dataclasses.dataclass(frozen=True)
class Sight:
  """What the queries of one layer see in a row of two documents, by experiment."""

  change_TS: np.ndarray  # of the logits at t, when token s is another one
  documents_TS: np.ndarray  # both are of one document
  sinks_TS: np.ndarray  # the key is one of the first tokens of the query's document

  @property
  def sees_TS(self) -> np.ndarray:
    return self.change_TS > 0


@functools.lru_cache(maxsize=4)
def sight(case: Case, kind: str, family: str) -> Sight:
  """Changes each token of a row in turn, for a model of a single layer of this kind."""
  cfg = one_layer(case.model_cfg, kind)
  model = build_model(cfg)
  first = 11  # tokens of the first document
  index_T = np.arange(SEQ_LEN)
  is_second_T = index_T >= first
  positions_T = np.where(is_second_T, index_T - first, index_T)
  tokens_BT = np.repeat(random_tokens(1, SEQ_LEN), SEQ_LEN + 1, 0)
  tokens_BT[index_T + 1, index_T] = tokens_BT[0] % 59 + 1
  whole = lambda x_T: np.broadcast_to(x_T, tokens_BT.shape)
  source = case.source_of(1)
  if source is not None:
    tokens_BS = np.repeat(source.tokens_BS, SEQ_LEN + 1, 0)
    source = Source(tokens_BS, segments_BS=1 + (np.arange(9) >= 5) + 0 * tokens_BS)
  params = random_params(model, spread=0.1)  # small scores: every key has some weight
  places = whole(positions_T), whole(1 + is_second_T)
  logits_BTV = case.logits(tokens_BT, *places, source, model, params)
  change_ST = np.abs(logits_BTV[1:] - logits_BTV[0]).max(-1)
  documents_TS = is_second_T[:, None] == is_second_T
  key = index_T[None]
  later_TS = (key > index_T[:, None]) & (family != "encoder")
  sinks_TS = documents_TS & (positions_T[None] < cfg.sink_tokens) & ~later_TS
  return Sight(change_ST.T, documents_TS, sinks_TS)


def described(pairs_TS: np.ndarray, what: str) -> list[str]:
  """The first pair that is wrong, and how many there are."""
  wrong = np.argwhere(pairs_TS)
  if not len(wrong):
    return []
  t, s = wrong[0].tolist()
  return [f"{what}: {s} from {t}, and {len(wrong) - 1} more such pairs"]


# -- Documents, padding, positions ---------------------------------------------------------


def packed(case: Case) -> Finding:
  """Every document of a batch, in its packed row and in a row of its own."""
  batch, details = case.batch, misplaced(case)
  source, alone_source = None, None
  tokens, lengths, where, read = [], [], [], []
  for row, documents in enumerate(case.documents):
    start, room = 0, length_in_batch(documents)
    for number, document in enumerate(documents):
      document = document[: room - start]
      if not len(document):
        continue
      tokens.append(np.pad(document, (0, SEQ_LEN - len(document))))
      lengths.append(len(document))
      where.append((row, start))
      if case.sources is not None:
        read.append(source_in_batch(case.sources[row], number))
      start += len(document)
  alone_BT = np.array(tokens)
  segments_BT = (np.arange(SEQ_LEN) < np.array(lengths)[:, None]).astype(np.int32)
  if case.sources is not None:
    fields = (batch.source_BS, batch.source_positions_BS, batch.source_segments_BS)
    source = Source(*fields)
    source_BS = np.array([np.pad(text, (0, SEQ_LEN - len(text))) for text in read])
    is_text_BS = np.arange(SEQ_LEN) < np.array([*map(len, read)])[:, None]
    alone_source = Source(source_BS, segments_BS=is_text_BS.astype(np.int32))
  places = (batch.tokens_BT, batch.positions_BT, batch.segments_BT)
  packed_BTV = case.logits(*places, source)
  alone_BTV = case.logits(alone_BT, None, segments_BT, alone_source)
  errors = [
    distance(packed_BTV[row, start : start + length], alone_TV[:length])
    for (row, start), length, alone_TV in zip(where, lengths, alone_BTV, strict=True)
  ]
  return Finding(max(errors), details=details)


def length_in_batch(documents: Sequence[np.ndarray]) -> int:
  """Tokens of a row: its last one is only a target."""
  return min(SEQ_LEN, sum(map(len, documents)) - 1)


def source_in_batch(documents: Sequence[np.ndarray], number: int) -> np.ndarray:
  """What a batch has of one source: the text after its first token, and its end."""
  start = sum(map(len, documents[:number]))
  text = np.append(documents[number][1:], END_ID)
  return text[: length_in_batch(documents) - start]


def misplaced(case: Case) -> list[str]:
  """Positions and segments of the batch that are not those that a loop counts."""
  batch = case.batch
  sides = [(case.documents, batch.positions_BT, batch.segments_BT, "")]
  if case.sources is not None:
    positions_BS, segments_BS = batch.source_positions_BS, batch.source_segments_BS
    assert positions_BS is not None and segments_BS is not None
    sides.append((case.sources, positions_BS, segments_BS, "source "))
  wrong = []
  for rows, positions_BT, segments_BT, side in sides:
    assert segments_BT is not None
    for row, documents in enumerate(rows):
      numbers = [(n + 1, i) for n, text in enumerate(documents) for i in range(len(text))]
      real = length_in_batch(documents)
      found = [*zip(segments_BT[row].tolist(), positions_BT[row].tolist(), strict=True)]
      if found[:real] != numbers[:real]:
        wrong.append(f"{side}positions or segments of row {row} of a batch are wrong")
        break
      if any(segment for segment, _ in found[real:]):
        wrong.append(f"padding of row {row} of a batch is a document")
  return wrong


def padding(case: Case) -> Finding:
  """Other tokens in the padding of rows, and of sources, change nothing outside."""
  length_B1 = np.array([7, 5, 23, 12, 16, 1, 20, 9])[:, None]
  is_text_BT = np.arange(SEQ_LEN) < length_B1
  tokens_BT, segments_BT = random_tokens(8, SEQ_LEN), is_text_BT.astype(np.int32)
  source = case.source_of(8)

  def logits(seed: int) -> np.ndarray:
    filled_BT = np.where(is_text_BT, tokens_BT, random_tokens(8, SEQ_LEN, seed=seed))
    read = None
    if source is not None:
      is_text_BS = np.arange(9) < 1 + np.arange(8)[:, None]
      other_BS = random_tokens(8, 9, seed=seed)
      tokens_BS = np.where(is_text_BS, source.tokens_BS, other_BS)
      read = Source(tokens_BS, segments_BS=is_text_BS.astype(np.int32))
    return case.logits(filled_BT, None, segments_BT, read)[is_text_BT]

  return Finding(distance(logits(11), logits(12)))


# -- Heads ---------------------------------------------------------------------------------


def kv_heads(case: Case) -> Finding:
  """Grouped heads are the same as heads of their own with equal keys and values."""
  cfg = case.model_cfg
  if case.family == "rnn":
    return does_not_apply("an RNN has no heads")
  group = cfg.num_heads // cfg.num_kv_heads
  if group == 1:
    return does_not_apply("every query head has its own kv head")
  own = build_model(dataclasses.replace(cfg, num_kv_heads=cfg.num_heads))

  def repeat(path: Any, x: jax.Array) -> Any:
    names = [key.key for key in path]
    if names[-2:-1] in (["k"], ["v"]):  # (L, D, K, H), and biases (L, K, H)
      return np.repeat(x, group, -2)
    if names[-2:-1] == ["k_norm"] and cfg.qk_norm == "width":
      return np.repeat(x, group, -2)
    return x

  repeated = jax.tree_util.tree_map_with_path(repeat, case.params)
  tokens_BT, source = random_tokens(8, SEQ_LEN), case.source_of(8)
  expected = case.logits(tokens_BT, source=source, model=own, params=repeated)
  return Finding(distance(case.logits(tokens_BT, source=source), expected))


def paths(case: Case) -> Finding:
  """Attention as it runs, and as the reference that shows its weights; these add up to 1,
  or less where a learned sink takes a part."""
  if case.family == "rnn":
    return does_not_apply("an RNN has no attention")
  tokens_BT, source = random_tokens(8, SEQ_LEN), case.source_of(8)
  expected, maps = shown(case)
  sums = [weights.sum(-1) for weights in maps.values()]
  details = []
  highest = max(float(x.max()) for x in sums)
  lowest = min(float(x.min()) for x in sums)
  if highest > 1 + 1e-5 or (lowest < 1 - 1e-5 and not case.model_cfg.learned_sinks):
    details.append(f"attention weights add up to {lowest:.6f} to {highest:.6f}")
  return Finding(distance(case.logits(tokens_BT, source=source), expected), details=details)


@functools.lru_cache(maxsize=2)
def shown(case: Case) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """(logits, attention maps (L, B, N, T, S) by name) of the reference."""
  tokens_BT, source = random_tokens(8, SEQ_LEN), case.source_of(8)
  logits_BTV, maps = jax.device_get(_shown(case.model, case.params, tokens_BT, source))
  return logits_BTV[..., : case.model_cfg.num_ids], maps


def own_diagonal(maps: np.ndarray) -> np.ndarray:
  return np.diagonal(maps, axis1=-2, axis2=-1)


@functools.partial(jax.jit, static_argnums=0)
def _shown(model: Any, params: Any, tokens_BT: jax.Array, source: Any) -> Any:
  read = {} if source is None else {"source": source}
  output = model.apply({"params": params}, tokens_BT, capture=True, **read)
  return output.value, output.attention


LAWS = (
  Law("causal", "no logit depends on a later token", causal, 1e-6, SAME_PROGRAM),
  Law(
    "both sides",
    "an encoder's token sees all of its document",
    both_sides,
    1e-6,
    SAME_PROGRAM,
  ),
  Law("window", "a local layer sees exactly its window", window, 1e-6, SAME_PROGRAM),
  Law("sinks", "sinks stay visible, and take weight", sinks, 1e-4, ROUNDING),
  Law("packed", "a packed document is the document alone", packed, 1e-4, ROUNDING),
  Law("padding", "padding of rows never matters", padding, 1e-6, SAME_PROGRAM),
  Law("kv heads", "neighbouring query heads share a kv head", kv_heads, 1e-4, ROUNDING),
  Law("attention paths", "each path gives the reference's values", paths, 1e-4, ROUNDING),
)
