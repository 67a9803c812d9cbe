# SPDX-License-Identifier: Apache-2.0
"""How a language model works, told on one page with the numbers of one run.

A `Scene` is what the model did with the text; look/story_chapters.py tells it, chapter by
chapter. `probe` and the functions of decoding and planning give every number.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from flaxlm.config import ResolvedConfig, ResolvedModel
from flaxlm.decoding.completions import Completion, complete_request
from flaxlm.decoding.encoding import check_has_head
from flaxlm.decoding.loading import Run
from flaxlm.decoding.prefill import Request
from flaxlm.decoding.sampling import GREEDY, SamplingSettings
from flaxlm.errors import ConfigError
from flaxlm.look import story_chapters
from flaxlm.look.pieces import Reading, apply_to_row, describe
from flaxlm.look.probe import probe
from flaxlm.look.story_chapters import Scene
from flaxlm.look.view import View
from flaxlm.nn.models import unrolled

NUM_NEW = 12  # tokens of the completion
NUM_BEST = 5  # candidates for each


class Told(NamedTuple):
  """The row that the story is about, where its next token is asked, and what came."""

  ids: list[int]
  at: int
  masked: list[int]  # an encoder's places to fill
  completion: Completion | None
  cuts: list[str]


def check_story(cfg: ResolvedModel, layer: int | None) -> None:
  """Raises `ConfigError` if the model has no such layer."""
  if layer is not None and not 0 <= layer < cfg.depth:
    raise ConfigError(f"layer is {layer}", f"layers are 0 to {cfg.depth - 1}")


def look_story(
  run: Run,
  reading: Reading,
  layer: int | None = None,
  settings: SamplingSettings = GREEDY,
  cards: Mapping[str, ResolvedConfig] | None = None,
) -> View:
  """The story of a text that the run reads.

  `layer` is the one that is opened (default: the middle one), `settings` draw the
  completion, and `cards` are other models, by name, whose cost stands beside the run's.
  Raises `ConfigError` for an encoder that cannot fill masks.
  """
  cfg = run.model.cfg
  check_has_head(run)
  settings.check()
  told = (
    mask_one(run, reading) if cfg.family == "encoder" else go_on(run, reading, settings)
  )
  layer = cfg.depth // 2 if layer is None else layer
  plain = run._replace(model=unrolled(run.model))
  asked = (layer, np.int32(run.num_ids))
  seen = apply_to_row(plain, probe, told.ids, reading.source_ids, *asked)
  steps = rounds(run, told, seen["logits"])
  row, source = (describe(run.tokenizer, i) for i in (told.ids, reading.source_ids or []))
  scene = Scene(run, row, source, told.at, layer, seen, reading.texts, steps, settings)
  chapters = story_chapters.tell(scene, cards or {})
  figures = {
    "tokens": [piece._asdict() for piece in row],
    "source": [piece._asdict() for piece in source],
    "at": told.at,
    "steps": steps,
    "completion": None if told.completion is None else told.completion.completion,
    "costs": chapters[-1]["costs"],
  }
  notes = [
    f"{run.path} at step {run.step}, model.family={cfg.family}. Every number on this page "
    "is this model's own, computed when the page was made."
  ]
  title = f"How {run.cfg.name} reads a text and goes on"
  return View("story", title, told.cuts, notes, figures, {"chapters": chapters})


def go_on(run: Run, reading: Reading, settings: SamplingSettings) -> Told:
  """The text and, after it, as many tokens as the model's context has room for; without a
  text the story is about the answer to the source."""
  start = reading.ids or run.tokenizer.framed([], "prompt")
  cfg, cuts = run.model.cfg, [*reading.cuts]
  room = NUM_NEW if cfg.family == "rnn" else min(NUM_NEW, cfg.context - len(start))
  if room < NUM_NEW:
    cuts.append(
      f"The text leaves room for {room} more tokens: model.context={cfg.context}."
    )
  at = len(start) - 1
  if room < 1:
    return Told(start, at, [], None, cuts)
  sources = None if reading.source_ids is None else [reading.source_ids]
  best = min(NUM_BEST, run.num_ids)
  request = Request([start], room, run.num_ids, sources, best)
  [done] = complete_request(run, request, [""], [settings])
  if reading.ids is None:
    cuts.append("The text is the model's own answer.")
    start = [*start, *done.tokens]
  return Told(start, at, [], done, cuts)


def mask_one(run: Run, reading: Reading) -> Told:
  """The text with its masks; with its last token masked, if it has none."""
  mask_id, ids, cuts = run.tokenizer.mask_id, [*(reading.ids or [])], [*reading.cuts]
  if mask_id is None:
    raise ConfigError(
      f"the tokenizer of {run.path} has no mask, so the encoder fills none",
      "look tokens shows its pieces",
    )
  masked = [at for at, id_ in enumerate(ids) if id_ == mask_id]
  if not masked:
    own = [at for at, id_ in enumerate(ids) if id_ not in run.tokenizer.special_ids]
    masked = own[-1:]
    label = describe(run.tokenizer, [ids[masked[0]]])[0].label
    cuts.append(f"The text has no [MASK]: its last token, {label}, is masked.")
    ids[masked[0]] = mask_id
  return Told(ids, masked[0], masked, None, cuts)


def rounds(run: Run, told: Told, logits_TV: np.ndarray) -> list[dict[str, Any]]:
  """Each drawn token, its probability and what else was likely; or each filled mask."""
  done, rounds_ = told.completion, []
  if done is not None:
    for token, logprob, best in zip(
      done.tokens, done.logprobs, done.top_logprobs or [], strict=True
    ):
      likely = [(id_, math.exp(share)) for id_, share in best]
      rounds_.append(entry(run, token, math.exp(logprob), likely))
  for at in told.masked:
    chances_V = softmax(logits_TV[at, : run.num_ids])
    best_X = np.argsort(-chances_V, kind="stable")[:NUM_BEST].tolist()
    likely = [(id_, float(chances_V[id_])) for id_ in best_X]
    rounds_.append(entry(run, *likely[0], likely) | {"at": at})
  return rounds_


def entry(
  run: Run, token: int, chance: float, likely: Sequence[tuple[int, float]]
) -> dict[str, Any]:
  names = describe(run.tokenizer, [id_ for id_, _ in likely])
  best = [
    {"id": id_, "label": name.label, "chance": share}
    for (id_, share), name in zip(likely, names, strict=True)
  ]
  own = describe(run.tokenizer, [token])[0]
  return {**own._asdict(), "chance": chance, "best": best}


def softmax(logits_V: np.ndarray) -> np.ndarray:
  shares_V = np.exp(logits_V.astype(np.float64) - logits_V.max())
  return shares_V / shares_V.sum()
