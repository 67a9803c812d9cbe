# SPDX-License-Identifier: Apache-2.0
"""What a law is checked on: a small model, its batches, its parameters; what is found."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from flaxlm.config import (
  MESH_AXES,
  ResolvedConfig,
  ResolvedModel,
  TrainingConfig,
  mesh_sizes,
)
from flaxlm.data.objectives import Batch, Windows, next_token, seq2seq
from flaxlm.nn.base import LanguageModel, Source
from flaxlm.nn.models import boxed_shapes, build_model
from flaxlm.sharding import batch_shards, mesh_for
from flaxlm.verify.shrink import SEQ_LEN, shrink_mesh, shrink_model, shrink_training

ROUNDING = "float32 adds up in another order"  # why laws tolerate an error
END_ID = 0  # no document has it inside
DOCUMENTS = (  # lengths of those in a row of SEQ_LEN tokens and one that is only a target
  (9, 7, 9),
  (25,),
  (4, 21),
  (11, 6),  # what is left over is padding
  (1, 1, 23),
  (13, 12),
  (8, 3, 2, 5, 7),
  (5,),
)


@dataclasses.dataclass(frozen=True)
class Finding:
  """What a law's check has found. `error` is its largest error; a law that does not apply
  has none, and `reason` says why. `details` say what is wrong where a number does not."""

  error: float | None
  reason: str = ""
  details: Sequence[str] = ()


def does_not_apply(reason: str) -> Finding:
  return Finding(None, reason)


@dataclasses.dataclass(frozen=True)
class Law:
  """One law: `check` measures how far a case is from it.

  `tolerance` bounds the largest error, and `why` says where such an error may come from.
  """

  name: str
  says: str
  check: Callable[["Case"], Finding]
  tolerance: float
  why: str


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
  """A config that is shrunk, on a mesh: what all laws share, programs included."""

  cfg: ResolvedConfig
  sizes: Mapping[str, int]  # of every mesh axis
  model_cfg: ResolvedModel
  training: TrainingConfig

  @classmethod
  def of(cls, cfg: ResolvedConfig) -> "Case":
    sizes = shrink_mesh(cfg.mesh, cfg.model)
    copied = mesh_sizes(cfg.mesh).get("tensor", 1) > cfg.model.num_kv_heads
    model = shrink_model(cfg.model, cfg.training, sizes, copied)
    return cls(cfg, sizes, model, shrink_training(cfg.training, sizes))

  @property
  def family(self) -> str:
    return self.model_cfg.family

  @functools.cached_property
  def model(self) -> LanguageModel:
    """The model as the laws of the forward pass run it: unrolled, nothing recomputed."""
    return build_model(self.model_cfg)

  @functools.cached_property
  def params(self) -> Any:
    return random_params(self.model)

  def params_in(self, training: TrainingConfig) -> Any:
    """The parameters in the dtype in which a run has them."""
    shapes = nn.unbox(boxed_shapes(build_model(self.model_cfg, training)))
    return jax.tree.map(lambda x, like: x.astype(like.dtype), self.params, shapes)

  @functools.cached_property
  def one(self) -> Mesh:
    return mesh_of({})

  @functools.cached_property
  def mesh(self) -> Mesh:
    return mesh_for(mesh_of(self.sizes), self.model_cfg)

  # -- Rows

  @functools.cached_property
  def num_rows(self) -> int:
    """Rows of a batch: enough for two micro-batches on every device."""
    return math.lcm(len(DOCUMENTS), 2 * batch_shards(self.sizes))

  @functools.cached_property
  def documents(self) -> list[list[np.ndarray]]:
    """The documents of each row of a batch, all of whose rows together are uneven."""
    return random_documents(1, self.num_rows)

  @functools.cached_property
  def sources(self) -> list[list[np.ndarray]] | None:
    """The documents that those are translations of; None without an encoder beside."""
    if self.family != "encoder_decoder":
      return None
    return [[text[::-1] for text in row] for row in random_documents(2, self.num_rows)]

  @functools.cached_property
  def batch(self) -> Batch:
    """The rows as `flaxlm.data` makes them."""
    windows = windows_of(self.documents)
    if self.sources is not None:
      return seq2seq(windows_of(self.sources), windows, END_ID)
    batch = next_token(windows, END_ID)
    if self.family == "encoder":  # some tokens are predicted, by no rule that matters
      chosen = np.random.default_rng(3).random(batch.weights_BT.shape) < 0.4
      batch = batch._replace(weights_BT=batch.weights_BT * chosen)
    return batch

  def logits(self, tokens_BT: np.ndarray, *args: Any, **options: Any) -> np.ndarray:
    """`all_logits` (B, T, V) without the vocabulary's padding."""
    return self.all_logits(tokens_BT, *args, **options)[..., : self.model_cfg.num_ids]

  def all_logits(
    self,
    tokens_BT: np.ndarray,
    positions_BT: np.ndarray | None = None,
    segments_BT: np.ndarray | None = None,
    source: Source | None = None,
    model: LanguageModel | None = None,
    params: Any = None,
  ) -> np.ndarray:
    """Logits (B, T, V) of whole rows; by default of the case's own model, and of rows that
    are one document each."""
    model, params = model or self.model, self.params if params is None else params
    shape = tokens_BT.shape
    if positions_BT is None:
      positions_BT = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    if segments_BT is None:
      segments_BT = np.ones(shape, np.int32)
    if source is not None and source.positions_BS is None:
      positions = np.broadcast_to(
        np.arange(source.tokens_BS.shape[1], dtype=np.int32), source.tokens_BS.shape
      )
      source = source._replace(positions_BS=positions)
    places = (np.asarray(x, np.int32) for x in (tokens_BT, positions_BT, segments_BT))
    return np.asarray(_logits(model, params, *places, source))

  def source_of(self, rows: int, seed: int = 5) -> Source | None:
    """A source for each of some rows, for models that read one."""
    if self.family != "encoder_decoder":
      return None
    tokens_BS = random_tokens(rows, 9, seed=seed)
    return Source(tokens_BS, segments_BS=np.ones_like(tokens_BS))


@functools.partial(jax.jit, static_argnums=0)
def _logits(
  model: LanguageModel,
  params: Any,
  tokens_BT: jax.Array,
  positions_BT: jax.Array,
  segments_BT: jax.Array,
  source: Source | None,
) -> jax.Array:
  read = {} if source is None else {"source": source}
  return model.apply({"params": params}, tokens_BT, positions_BT, segments_BT, **read).value


def random_params(model: LanguageModel, seed: int = 0, spread: float = 0.2) -> Any:
  """Every parameter random, norms and biases too, as zeros and ones would hide mistakes:
  normal with a deviation of `spread`, around 1 if it scales. Nothing is compiled."""
  random = np.random.default_rng(seed)

  def fill(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    around = 1 if path[-1].key == "scale" else 0
    return (around + spread * random.normal(size=leaf.shape)).astype(leaf.dtype)

  shapes = nn.unbox(boxed_shapes(model))
  return jax.device_put(jax.tree_util.tree_map_with_path(fill, shapes))


def random_tokens(*shape: int, seed: int = 7) -> np.ndarray:
  """Ids of ordinary tokens, in every model that is shrunk."""
  return np.random.default_rng(seed).integers(1, 60, shape, np.int32)


def random_documents(seed: int, num_rows: int) -> list[list[np.ndarray]]:
  repeated = [DOCUMENTS[n % len(DOCUMENTS)] for n in range(num_rows)]
  return [
    [
      random_tokens(length, seed=1000 * seed + 10 * row + n)
      for n, length in enumerate(row_)
    ]
    for row, row_ in enumerate(repeated)
  ]


def windows_of(rows: Sequence[Sequence[np.ndarray]]) -> Windows:
  """The rows as a store hands them out, of SEQ_LEN + 1 tokens."""
  shape = len(rows), SEQ_LEN + 1
  tokens_BX, begins_BX = np.zeros(shape, np.int64), np.zeros(shape, bool)
  for number, documents in enumerate(rows):
    text = np.concatenate(documents)
    tokens_BX[number, : len(text)] = text
    starts = np.cumsum([0, *map(len, documents)])[:-1]
    begins_BX[number, starts] = True
  lengths_B = np.array([sum(map(len, documents)) for documents in rows])
  return Windows(tokens_BX, begins_BX, lengths_B)


def one_layer(cfg: ResolvedModel, kind: str) -> ResolvedModel:
  """The model with a single layer, local (L) or global (G)."""
  return dataclasses.replace(cfg, depth=1, encoder_depth=1, layer_pattern=kind)


def mesh_of(sizes: Mapping[str, int]) -> Mesh:
  """A mesh over as many devices as the sizes of its axes say: one if none is named."""
  shape = [sizes.get(axis, 1) for axis in MESH_AXES]
  types = (AxisType.Auto,) * len(shape)
  devices = jax.devices()[: math.prod(shape)]
  return jax.make_mesh(shape, MESH_AXES, axis_types=types, devices=devices)


def distance(actual: Any, expected: Any) -> float:
  """The largest difference of two trees of arrays, as a share of the largest number (at
  least 1) of `expected`; infinite where one is NaN."""
  pairs = [*zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)]
  scale = max(1.0, *(float(np.abs(e).max(initial=0)) for _, e in pairs))
  differences = [np.abs(np.asarray(a, np.float64) - e).max(initial=0) for a, e in pairs]
  worst = float(np.max(differences))
  return worst / scale if math.isfinite(worst) else math.inf
