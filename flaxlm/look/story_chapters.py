# SPDX-License-Identifier: Apache-2.0
"""The chapters of `flaxlm look story`: what each says, and the numbers of its figure.

A chapter is a dict: `key` names the function of story.js that draws it, `title` and `says`
are its text, and the rest is its data.
"""

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from flaxlm.config import ResolvedConfig, mesh_shape
from flaxlm.cost import (
  active_parameters,
  forward_work,
  kv_cache_bytes,
  parameters,
  weight_bytes,
)
from flaxlm.decoding.loading import Run
from flaxlm.decoding.sampling import SamplingSettings
from flaxlm.errors import DataError
from flaxlm.look.embeddings import nearest
from flaxlm.look.pieces import Piece, describe, spelled
from flaxlm.look.positions import SAYS, look_positions
from flaxlm.look.view import Shares, heat_map
from flaxlm.planning.decoding import decode_work
from flaxlm.planning.memory import training_memory
from flaxlm.planning.planner import resolve
from flaxlm.planning.tables import size
from flaxlm.tokenizers import MASK
from flaxlm.tokenizers.merges import trace_merges

MOST_WORDS = 40  # whose merges are shown
MOST_DIMS = 64  # of a vector
NUM_NEURONS = 6
NUM_NAMED = 40  # of the likeliest tokens
# The chart that look_positions has for each kind, counted from the last.
CHARTS = {"rope": -1, "alibi": -1, "relative": -2, "learned": -2, "sinusoidal": -2}
METHODS = {
  "BPE": "byte pair encoding",
  "WordPiece": "WordPiece",
  "Unigram": "a unigram model",
  "WordLevel": "whole words",
}


class Scene(NamedTuple):
  """What a story is about: the row that the model read, and what it did with it."""

  run: Run
  row: list[Piece]
  source: list[Piece]
  at: int  # the place whose next token, or whose mask, is asked for
  layer: int  # the one that is opened
  seen: Mapping[str, np.ndarray]  # what `probe` returned
  texts: Sequence[str]
  steps: list[dict[str, Any]]  # the drawn tokens, or the filled masks
  settings: SamplingSettings


def tell(scene: Scene, cards: Mapping[str, ResolvedConfig]) -> list[dict[str, Any]]:
  """All chapters; the last one is about cost, and compares the run with `cards`."""
  is_rnn = scene.run.model.cfg.family == "rnn"
  return [
    tell_ids(scene),
    tell_vectors(scene),
    *([] if is_rnn else [tell_positions(scene)]),
    tell_state(scene) if is_rnn else tell_block(scene),
    tell_lens(scene),
    tell_softmax(scene),
    tell_rounds(scene),
    tell_cost(scene, cards),
  ]


# -- Text to vectors -----------------------------------------------------------------------


def tell_ids(scene: Scene) -> dict[str, Any]:
  run = scene.run
  method = json.loads(run.tokenizer.to_json())["model"]["type"]
  words = merges_of(scene)
  says = [
    f"A model computes with numbers, so the text is first cut into tokens: pieces of a "
    f"fixed list of {run.tokenizer.vocab_size:,}. Each piece has a number, its id. The cut "
    f"was made by {METHODS.get(method, method)}; this text became "
    f"{len(scene.row)} tokens. Choose one to see its bytes. In the names of tokens · is a "
    "blank, ↵ a new line, and \\x with two digits a byte that is part of a character."
  ]
  first = scene.row[0]
  if not first.hex and scene.run.model.cfg.family != "encoder":
    says.append(
      f"You did not type {first.label}. It stood between the texts that the model learnt "
      "from, so in the first place it says that a text begins."
    )
  if words:
    says.append(
      "Byte pair encoding starts from single bytes, which are letters in English, and "
      "joins two neighbours at a time, the pair that it learnt earliest first. The "
      "number of a merge says when: 0 was the most frequent pair in the texts that the "
      "list was made of."
    )
  if scene.source:
    says.append(f"The encoder reads a source of {len(scene.source)} tokens of its own.")
  return {"key": "ids", "title": "The text becomes ids", "says": says, "words": words}


def merges_of(scene: Scene) -> list[list[dict[str, Any]]]:
  """How each word came about that took a merge, once for each spelling: its pieces before
  the first merge and after each."""
  tokenizer = scene.run.tokenizer
  shown = lambda names: [spelled(tokenizer, name) for name in names]
  found: dict[str, list[dict[str, Any]]] = {}
  has_mask = tokenizer.mask_id is not None  # whose name in a text is no word
  parts = [text.split(MASK) if has_mask else [text] for text in scene.texts]
  for text in filter(None, itertools.chain(*parts)):
    try:
      traced = trace_merges(tokenizer, text)
    except DataError:  # this tokenizer does not merge
      return []
    for word in traced:
      if not word.steps:
        continue
      states: list[dict[str, Any]] = [{"rank": None, "pieces": shown(word.pieces)}]
      states += [{"rank": s.rank, "pieces": shown(s.pieces)} for s in word.steps]
      found.setdefault("".join(word.pieces), states)
  return list(found.values())[:MOST_WORDS]


def tell_vectors(scene: Scene) -> dict[str, Any]:
  run = scene.run
  table_VD = np.asarray(run.params["embedding"]["table"])[: run.num_ids]
  table_VD = table_VD.astype(np.float32)
  known = sorted({piece.id for piece in scene.row if piece.id < len(table_VD)})
  near_RC, cosines_RC = nearest(table_VD, np.array(known))
  D = table_VD.shape[1]
  neighbours = {
    id_: [
      {"label": piece.label, "cosine": float(cosine)}
      for piece, cosine in zip(describe(run.tokenizer, ids), cosines, strict=True)
    ]
    for id_, ids, cosines in zip(known, near_RC, cosines_RC, strict=True)
  }
  says = [
    f"An id says nothing by itself, so the model looks up a vector for it: a row of {D} "
    "trained numbers. All rows together are the embedding. At first these were random. "
    "Training moves tokens that are used alike towards each other, so the nearest rows "
    "show what the model takes for similar (cosine 1 is the same direction, 0 none in "
    "common, -1 the opposite). In the strip numbers above and below 0 have two colours, "
    "the stronger the larger."
  ]
  return {
    "key": "vectors",
    "title": "Each id becomes a vector",
    "says": says,
    "known": known,
    "vectors": table_VD[known][:, :MOST_DIMS],
    "width": D,
    "neighbours": [neighbours[id_] for id_ in known],
  }


def tell_positions(scene: Scene) -> dict[str, Any]:
  cfg = scene.run.model.cfg
  view = look_positions(cfg, "", "", scene.run.params)
  at = CHARTS.get(cfg.positions, 0)
  charts = view.data["charts"][at:][:1]  # of the decoder, if there are two stacks
  says = [
    "The same words in another order mean something else, and attention by itself does not "
    f"see the order. {SAYS[cfg.positions]}"
  ]
  if cfg.positions in ("rope", "alibi", "relative"):
    says.append(
      "The next chapter shows where that happens: each token makes a query and a key, two "
      "vectors, and the product of one token's query with another's key is a score, which "
      "says how much the one looks at the other."
    )
  lengths = None
  if cfg.positions in ("learned", "sinusoidal") and not cfg.embedding_norm:
    embedded_TD, placed_TD = scene.seen["embedded"], scene.seen["stream"][0]
    lengths = [np.linalg.norm(x, axis=-1) for x in (embedded_TD, placed_TD - embedded_TD)]
    says.append("Below: how long each token's vector is, and the one that is added to it.")
  title = "Where each token stands"
  return {
    "key": "positions",
    "title": title,
    "says": says,
    "charts": charts,
    "lengths": lengths,
  }


# -- The layers ----------------------------------------------------------------------------


def tell_block(scene: Scene) -> dict[str, Any]:
  cfg, seen = scene.run.model.cfg, scene.seen
  says = [
    f"The vectors now pass {cfg.depth} layers; this is layer {scene.layer}, counted from "
    f"0 (`--layer` opens another). In each of its {cfg.num_heads} heads three trained "
    "matrices make three shorter vectors of each token's: a query, what it looks for; a "
    "key, what it offers; and a value, what it has to tell. Where a query and a key "
    "point the same way, their product q·k, the score, is large. The softmax (chapter "
    "6) turns the scores of one query into weights that add up to 100 %, and so much of "
    "each token's value is mixed and added to the vector of the token that asked.",
    "Heads learn different habits. A head that finds nothing to its taste often looks at "
    "the first token: its value adds little (Xiao et al., 2023).",
  ]
  if cfg.family in ("decoder", "encoder_decoder"):
    says.append(
      "A token sees only itself and what is before it: the rest is to be guessed."
    )
  if scene.source:
    says.append("It also asks the source: there the keys and values are the encoder's.")
  # The dot products of the asked query, before a bias of positions, a cap and the mask.
  K = seen["keys"].shape[1]
  q_KGH = seen["queries"][scene.at].reshape(K, cfg.num_heads // K, -1)
  scores_NS = np.einsum("KGH,SKH->KGS", q_KGH, seen["keys"]).reshape(cfg.num_heads, -1)
  chapter = {
    "key": "block",
    "title": "A layer: tokens look at each other, then each one thinks",
    "says": says,
    "layer": scene.layer,
    "maps": [
      {"name": title, "weights": Shares(seen[name]), "cross": name == "cross"}
      for name, title in (("self", "the text itself"), ("cross", "the source"))
      if name in seen
    ],
    "scores": cfg.attention_scale * scores_NS,
    "heads": seen["heads"].T,
    "neurons": None,
    "experts": None,
  }
  if "experts" in seen:
    says.append(
      f"Then a router sends each token to {cfg.moe.experts_per_token} of "
      f"{cfg.moe.num_experts} experts: small networks, of which only these are computed."
    )
    if cfg.moe.capacity_factor is not None:
      says.append("An expert has limited room: what comes late may be chosen and dropped.")
    chapter["experts"] = {
      "ids": seen["experts"].tolist(),
      "shares": Shares(seen["shares"]),
      "count": cfg.moe.num_experts,
    }
  else:
    says.append(
      f"Then each token by itself goes through {cfg.ffn_width} neurons. A neuron whose "
      "number is far from 0 has found a pattern, and adds what it has learnt to say about "
      "it, or takes it away (below 0)."
    )
    chapter["neurons"] = strongest_neurons(seen["neurons"].astype(np.float32))
  return chapter


def strongest_neurons(h_TF: np.ndarray) -> list[list[dict[str, Any]]]:
  """The neurons with the largest activations of each token, and where in the text each of
  them fires most."""
  best_TX = np.argsort(-np.abs(h_TF), -1, kind="stable")[:, :NUM_NEURONS]
  peaks_F = np.abs(h_TF).argmax(0)
  return [
    [{"neuron": int(n), "value": float(h_F[n]), "peak": int(peaks_F[n])} for n in best_X]
    for h_F, best_X in zip(h_TF, best_TX, strict=True)
  ]


def tell_state(scene: Scene) -> dict[str, Any]:
  cfg, state_TD = scene.run.model.cfg, scene.seen["state"]
  dims = min(MOST_DIMS, state_TD.shape[1])
  chart = heat_map(
    f"The state of layer {scene.layer} after each token",
    state_TD[:, :dims].T,
    x=("token", [*range(len(state_TD))]),
    y=("dim", [*range(dims)]),
  )
  changes_T = np.linalg.norm(np.diff(state_TD, axis=0, prepend=0), axis=-1)
  kind = cfg.cell.upper()
  says = [
    f"This model is an RNN ({kind}): it reads one token after the other and has no "
    f"attention. What it remembers of all earlier tokens is one state of {cfg.width} "
    f"numbers in each of its {cfg.depth} layers. Each token changes the state; what is not "
    "kept in it is forgotten. Nothing else tells it about the order, so it needs no "
    "positions.",
    f"Here is layer {scene.layer}: a column for each token, a row for each of the first "
    f"{dims} numbers. Below: how much each token changed it.",
  ]
  title = "The state carries the past"
  return {
    "key": "state",
    "title": title,
    "says": says,
    "charts": [chart],
    "changes": changes_T,
  }


def tell_lens(scene: Scene) -> dict[str, Any]:
  ids_LTX, chances_LTX = scene.seen["lens_ids"], scene.seen["lens_chances"]
  names = describe(scene.run.tokenizer, np.unique(ids_LTX))
  what = "its guess for the mask" if scene.run.cfg.model.family == "encoder" else "next"
  says = [
    "Every layer adds to one vector per token, the residual stream. What makes scores of "
    "all tokens from that vector stands behind the last layer (a norm, and the output "
    "head), but one can let it read the stream earlier, and so ask at any depth what the "
    f"model would say {what} if it stopped there: the logit lens. Often the first layers "
    "answer with the token itself or at random, and the answer takes shape on the way up."
  ]
  return {
    "key": "lens",
    "title": "What it would say after each layer",
    "says": says,
    "ids": ids_LTX.tolist(),
    "chances": Shares(np.clip(chances_LTX, 0, 1)),
    "labels": {str(piece.id): piece.label for piece in names},
  }


# -- To the next token ---------------------------------------------------------------------


def tell_softmax(scene: Scene) -> dict[str, Any]:
  run = scene.run
  logits_V = scene.seen["logits"][scene.at, : run.num_ids].astype(np.float32)
  best = np.argsort(-logits_V, kind="stable")[:NUM_NAMED]
  says = [
    f"At the end each of the {run.num_ids:,} tokens has a score, its logit. The softmax "
    "turns scores into probabilities: e to the power of each, divided by the sum of these "
    "powers, so that they add up to 100 %. A "
    "temperature divides the logits first: low ones favour the best token, high ones make "
    "all more alike. Top-k keeps the k likeliest, top-p the fewest whose probabilities add "
    "up to p; the struck-out ones cannot be drawn. Move the sliders."
  ]
  return {
    "key": "softmax",
    "title": "Scores become probabilities",
    "says": says,
    "logits": logits_V,
    "best": best.tolist(),
    "labels": [piece.label for piece in describe(run.tokenizer, best)],
  }


def tell_rounds(scene: Scene) -> dict[str, Any]:
  temperature = scene.settings.temperature
  if scene.run.model.cfg.family == "encoder":
    title = "The masks are filled"
    says = [
      "An encoder sees the words on both sides and was trained to fill gaps. For each mask "
      "it takes the likeliest token. Step through them: buttons, or arrow keys."
    ]
  else:
    title = "The token joins the text, and the next round begins"
    how = "always the likeliest token (greedy)"
    if temperature:
      how = f"a token drawn at temperature {temperature:g}, seed {scene.settings.seed}"
    says = [
      f"One token is taken, here {how}. It is put at the end of the text, and all of the "
      "above happens again, with one token more: that is how a completion is written. "
      "Step through it: buttons, or arrow keys. How good it is depends on the model's size "
      f"and on how long it has learnt: this one took {scene.run.step:,} steps."
    ]
  return {"key": "rounds", "title": title, "says": says}


# -- Cost --------------------------------------------------------------------------------


def tell_cost(scene: Scene, cards: Mapping[str, ResolvedConfig]) -> dict[str, Any]:
  cfg = dataclasses.replace(resolve(scene.run.cfg), model=scene.run.model.cfg)
  own = {"name": str(cfg.name), **costs(cfg)}
  sizes = mesh_shape({"data": 1})
  own["training_bytes"] = training_memory(cfg, sizes).total
  others = [{"name": name, **costs(card)} for name, card in cards.items()]
  says = [
    f"This model has {own['parameters']:,} trained numbers, {size(own['weight_bytes'])}. "
    f"A token costs about {own['flops_per_token']:,.0f} floating-point operations to read "
    f"and three times that to learn from; a training step of this run needs "
    f"{size(own['training_bytes'])} of memory. While it writes, it keeps "
    + (
      f"one state of {size(own['cache_bytes'])}, however long the text is."
      if scene.run.model.cfg.family == "rnn"
      else f"{size(own['cache_per_token'])} of keys and values for each token."
    )
  ]
  if others:
    says.append(
      "Large models do the same with more numbers (G: a thousand million; ffn: the "
      "neurons; cache: the keys and values that are kept; FLOPs: additions and "
      "multiplications), which may be stored in fewer bytes each. `flaxlm plan "
      f"{others[0]['name']} --mesh fsdp=512 --device h200` says what such a one costs to "
      "train."
    )
  return {"key": "cost", "title": "What it costs", "says": says, "costs": [own, *others]}


def costs(cfg: ResolvedConfig) -> dict[str, Any]:
  """What a model costs, by the functions of `flaxlm plan`: FLOPs of one forward pass over
  its context, per token (strict), and bytes of weights and cache in the compute dtype."""
  model, item = cfg.model, cfg.training.item_size
  T, source = model.context, cfg.source_length
  parts = parameters(model)
  cache = kv_cache_bytes(model, 1, T, item, source)
  return {
    "parameters": sum(parts.values()),
    "parts": parts,
    "active": active_parameters(model),
    "flops_per_token": forward_work(model, 1, T, source).strict / T,
    "flops_to_write": decode_work(cfg, 1, T)[0],
    "weight_bytes": weight_bytes(model, item),
    "cache_bytes": cache,
    "cache_per_token": None
    if model.family == "rnn"
    else (cache - kv_cache_bytes(model, 1, 0, item, source)) / T,
    "context": T,
  }
