# SPDX-License-Identifier: Apache-2.0
"""One layer of a model, and what went in and out of each of its parts: what the formulas in
attention_laws.py and layer_laws.py are compared with."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from flaxlm.config import ResolvedModel
from flaxlm.nn.attention import Attention
from flaxlm.nn.base import LanguageModel, Source
from flaxlm.nn.block import Block
from flaxlm.nn.layers import FeedForward, LayerNorm, RMSNorm
from flaxlm.nn.models import build_model
from flaxlm.nn.moe import MoE
from flaxlm.nn.rnn import RecurrentBlock
from flaxlm.verify.case import Case, one_layer, random_params, random_tokens
from flaxlm.verify.shrink import SEQ_LEN

FIRST = 11  # tokens of the first of two documents in a row
FIRST_SOURCE, SOURCE_LEN = 5, 9  # the same of a source, and tokens in both of its documents
PARTS = (Attention, Block, FeedForward, LayerNorm, MoE, RMSNorm, RecurrentBlock)
# Input and output of a call.
Call = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Layer:
  """The last layer that runs, an encoder-decoder's decoder's: two rows of two documents.

  `calls` are by the path of the part in its layer, or outside of layers in the model; a
  layer itself is `Block` or `RecurrentBlock`.
  """

  cfg: ResolvedModel
  kind: str  # L or G
  calls: dict[str, Call]
  params: Any  # of the layer, in float64
  others: Any  # of the model, in float64
  positions_T: np.ndarray
  documents_T: np.ndarray
  source_documents_S: np.ndarray


@functools.lru_cache(maxsize=4)
def layer_of(case: Case, kind: str, **changes: Any) -> Layer:
  """A model of one layer, local (L) or global (G), run on random tokens; `changes` are of
  its config. The scores are small, so that every key has some weight."""
  cfg = dataclasses.replace(one_layer(case.model_cfg, kind), **changes)
  model = build_model(cfg)
  params = random_params(model, spread=0.1)
  index_T, index_S = np.arange(SEQ_LEN), np.arange(SOURCE_LEN)
  tokens_BT = random_tokens(2, SEQ_LEN)
  documents_T, source_documents_S = 1 + (index_T >= FIRST), 1 + (index_S >= FIRST_SOURCE)
  positions_T = np.where(index_T >= FIRST, index_T - FIRST, index_T)
  places = (np.broadcast_to(x, tokens_BT.shape) for x in (positions_T, documents_T))
  source = case.source_of(2)
  if source is not None:
    source = source._replace(segments_BS=source_documents_S + 0 * source.tokens_BS)
  calls = jax.device_get(_calls(model, params, tokens_BT, *places, source))
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(params))
  own = jax.tree.map(lambda x: x[0], params.get("decoder", params)["blocks"])
  return Layer(cfg, kind, calls, own, params, positions_T, documents_T, source_documents_S)


@functools.partial(jax.jit, static_argnums=0)
def _calls(
  model: LanguageModel,
  params: Any,
  tokens_BT: jax.Array,
  positions_BT: jax.Array,
  segments_BT: jax.Array,
  source: Source | None,
) -> dict[str, tuple[jax.Array, jax.Array]]:
  found: dict[str, tuple[jax.Array, jax.Array]] = {}

  def record(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
    output = next_fun(*args, **kwargs)
    module, method = context.module, context.method_name
    name = "/".join(module.scope.path) or type(module).__name__
    name = name if method == "__call__" else method
    if isinstance(module, PARTS) and method in ("__call__", "source_keys_values"):
      # An encoder's layer runs before, and is forgotten.
      found[name] = args[0], output[0] if isinstance(output, tuple) else output
    return output

  read = {} if source is None else {"source": source}
  with nn.intercept_methods(record):
    model.apply({"params": params}, tokens_BT, positions_BT, segments_BT, **read)
  return found
