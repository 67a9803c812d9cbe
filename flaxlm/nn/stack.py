# SPDX-License-Identifier: Apache-2.0
"""A transformer's layers and their positions: embedded tokens in, hidden vectors out.

In training and in checkpoints, the parameters of all blocks are stacked along a leading
layer dim. How the blocks run (as a loop, unrolled or as a pipeline) and what is kept for
the backward pass are knobs of the run (nn/execution.py), never of the checkpoint. Local and
global layers have the same parameters; a loop runs over whole periods of `layer_pattern`.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxlm.config import ResolvedModel
from flaxlm.nn.block import Block, LayerContext, LayerOutput, on_share, on_whole_rows
from flaxlm.nn.cache import KVCache, SourceCache, cached_keys, num_slots
from flaxlm.nn.execution import (
  Execution,
  Layer,
  is_split,
  run_layers,
  run_unrolled,
  split_blocks,
  stack_trees,
  stacked_class,
  unstack,
  with_remat,
)
from flaxlm.nn.layers import Dropout, Embedding, build_norm
from flaxlm.nn.masks import Pattern, Placement, Reach, Sight, visible
from flaxlm.nn.pipeline import AXIS, Visit, run_pipeline
from flaxlm.nn.positions import alibi_bias, relative_buckets, rotation, sinusoids
from flaxlm.sharding import RULES, Schedule, axis_sizes_in_use, make_schedule

# An encoder's output (B, S, D) with its segments.
EncodedSource = tuple[jax.Array, jax.Array | None]


class Stack(nn.Module):
  """Positions, L blocks, and the final norm: embedded tokens in, hidden vectors out."""

  cfg: ResolvedModel
  execution: Execution
  causal: bool = True
  reads_source: bool = False

  def setup(self):
    cfg, execution = self.cfg, self.execution
    if cfg.positions == "learned":
      shape, names = (cfg.context, cfg.width), ("slots", "embed")
      self.positions = Embedding(shape, names, **execution.dtypes)
    if cfg.positions == "relative":
      shape, names = (cfg.relative_buckets, cfg.num_heads), ("slots", "heads")
      self.relative_bias = Embedding(shape, names, param_dtype=execution.param_dtype)
    if cfg.embedding_norm:
      self.embedding_norm = build_norm(cfg)
    blocks = stacked_class(Block, self.cfg.depth, in_axes=(nn.broadcast, nn.broadcast))
    self.blocks = blocks(cfg, execution, self.reads_source)
    if cfg.norm_placement != "post":
      self.final_norm = build_norm(cfg)
    self.dropout = Dropout(cfg.dropout)

  def __call__(
    self,
    x_BTD: jax.Array,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    *,
    cache: KVCache | None = None,
    num_new_B: jax.Array | None = None,
    source: EncodedSource | None = None,
    deterministic: bool = True,
    capture: bool = False,
  ) -> tuple[jax.Array, KVCache | None, dict, dict]:
    """Hidden vectors (B, T, D), the new cache, losses, and attention maps (L, B, N, T, S).

    Without a cache a row is read from its start, and `segments_BT` separates packed
    documents. With a cache the T tokens follow each row's `lengths_B` earlier ones, and the
    first `num_new_B` of them count. `source` is the output of the encoder, if there is one.
    """
    B, T = x_BTD.shape[:2]
    slots_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    if cache is not None:
      assert segments_BT is None, "a cached row is one document"
      slots_BT += cache.lengths_B[:, None]
    if positions_BT is None:
      positions_BT = slots_BT
    x_BTD = self.add_positions(x_BTD, positions_BT)
    x_BTD = self.dropout(x_BTD, deterministic=deterministic)
    x_BTD = on_share(x_BTD, self.execution)
    schedule = None if cache is not None or capture else self.schedule(B)
    if schedule is not None:
      rows = (positions_BT, segments_BT, source)
      x_BTD, output = self.run_stages(schedule, x_BTD, rows, deterministic)
    else:
      keys_at = positions_BT if cache is None else None  # a cached row is one document
      where = Placement(slots_BT, segments_BT, segments_BT, keys_at)
      contexts = self.contexts(where, positions_BT, cache, source, num_new_B)
      caches = None if cache is None else cache.of_layers()
      x_BTD, output = self.run_blocks(x_BTD, caches, contexts, deterministic, capture)
    if self.cfg.norm_placement != "post":
      x_BTD = self.final_norm(x_BTD)
    x_BTD = on_whole_rows(x_BTD)
    if cache is not None:
      lengths_B = cache.lengths_B + (T if num_new_B is None else num_new_B)
      cache = cache._replace(layers=tuple(output.cache), lengths_B=lengths_B)
    losses = jax.tree.map(lambda loss_L: loss_L.sum(), output.losses)
    return x_BTD, cache, losses, output.attention

  # -- Positions

  def add_positions(self, x_BTD: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """Adds learned or sinusoidal positions, and applies the embedding norm, if any."""
    if self.cfg.positions == "learned":
      x_BTD += self.positions(positions_BT)
    elif self.cfg.positions == "sinusoidal":
      x_BTD += sinusoids(positions_BT, self.cfg.width).astype(x_BTD.dtype)
    return self.embedding_norm(x_BTD) if self.cfg.embedding_norm else x_BTD

  def score_bias(self, slots_XT: jax.Array, num_keys: int) -> jax.Array | None:
    """The bias of every layer's scores, bias_XNTS, or None."""
    cfg = self.cfg
    if cfg.positions == "alibi":
      return alibi_bias(slots_XT, num_keys, cfg.num_heads, self.causal)
    if cfg.positions == "relative":
      distances_XTS = jnp.arange(num_keys) - slots_XT[:, :, None]
      sizes = (cfg.relative_buckets, cfg.relative_distance)
      buckets_XTS = relative_buckets(distances_XTS, *sizes, self.causal)
      return self.relative_bias(buckets_XTS).transpose(0, 3, 1, 2)
    return None

  # -- What layers read besides their input

  def contexts(
    self,
    where: Placement,
    positions_BT: jax.Array,
    cache: KVCache | None,
    source: EncodedSource | None,
    num_new_B: jax.Array | None,
    bias_XNTS: jax.Array | None = None,
  ) -> dict[str, LayerContext]:
    """The context of each kind of layer, local (L) and global (G).

    `bias_XNTS` is the result of `score_bias`, if the caller has it.
    """
    cfg = self.cfg
    if bias_XNTS is None:
      # Without a cache all rows have the same slots and share one bias.
      slots_XT = where.query_slots_BT[: None if cache is not None else 1]
      num_keys = positions_BT.shape[1]
      if cache is not None:
        num_keys = max(map(num_slots, cache.layers))
      bias_XNTS = self.score_bias(slots_XT, num_keys)
    source_BSD, source_sight = None, None
    if self.reads_source:
      source_BSD, source_sight = see_source(where, cache, source)
    contexts = {}
    for kind in sorted(set(cfg.period)):
      window = cfg.window_of(kind)
      placed, num_keys, cache_slots = where, positions_BT.shape[1], None
      if cache is not None:
        placed, num_keys, cache_slots = cached_keys(cfg, cache, kind, where)
      mask_BTS = visible(placed, num_keys, self.causal, window, cfg.sink_tokens)
      cos_sin = None
      if cfg.positions == "rope":
        cos_sin = rotation(positions_BT, cfg.head_dim, cfg.rope, kind == "L")
      reach = pattern = None
      if cache is None:  # over a cache queries do not begin where its keys do
        reach, pattern = self.reach(where, window), self.pattern(where, window)
      contexts[kind] = LayerContext(
        sight=Sight(mask_BTS, bias_XNTS, cos_sin, reach, pattern),
        cache_slots=cache_slots,
        source_BSD=source_BSD,
        source_sight=source_sight,
        real_BT=real_tokens(where, num_new_B),
      )
    return contexts

  def reach(self, where: Placement, window: int | None) -> Reach | None:
    """What kernels may skip: later keys, and those before the window."""
    if not self.causal:
      return None
    sinks = self.cfg.sink_tokens  # visible although they are before the window
    is_all = where.query_segments_BT is None and not sinks
    return Reach(window=None if sinks else window, is_all=is_all)

  def pattern(self, where: Placement, window: int | None) -> Pattern | None:
    """The mask for kernels that compute it; None if it depends on positions, too."""
    if window is not None and self.cfg.sink_tokens:
      return None
    return Pattern(self.causal, window, segments_of(where))

  # -- Running the layers

  def run_blocks(
    self,
    x_BTD: jax.Array,
    caches: list | None,
    contexts: dict[str, LayerContext],
    deterministic: bool,
    capture: bool,
  ) -> tuple[jax.Array, LayerOutput]:
    """Runs all layers. Losses and maps come stacked along L, caches as a list."""
    if self.is_initializing():  # every kind of layer has the same parameters
      x_BTD, output = self.blocks(x_BTD, None, contexts[self.cfg.period[0]])
      return x_BTD, output._replace(attention={})
    layers = self.layers(lambda: contexts, deterministic, capture)
    params, keys_L = self.blocks.variables["params"], self.dropout_keys(deterministic)
    if caches is None:
      period, scanned = len(self.cfg.period), self.execution.scanned
      return run_layers(layers, period, scanned, x_BTD, params, keys_L, None)
    # With a cache, always unrolled: a loop would copy the whole cache at every token.
    depth = self.cfg.depth
    layer_inputs = zip(
      split_blocks(params, depth), unstack(keys_L, depth), caches, strict=True
    )
    x_BTD, outputs = run_unrolled(layers, x_BTD, list(layer_inputs))
    stacked = stack_trees([output._replace(cache=None) for output in outputs])
    return x_BTD, stacked._replace(cache=[output.cache for output in outputs])

  def schedule(self, num_rows: int) -> Schedule | None:
    """How the layers run as a pipeline; None if they run without one.

    There is no pipeline if the mesh has no stages, if the parameters are laid out for
    decoding, or if the rows do not divide into microbatches, such as the few that `flaxlm
    look` reads. In training, `check_batch` has made sure that they divide.
    """
    sizes = axis_sizes_in_use()
    stages = sizes.get(AXIS, 1)
    if stages == 1 or self.is_initializing() or is_split(self.blocks.variables["params"]):
      return None
    schedule = make_schedule(stages, self.execution.microbatches, self.execution.repeats)
    shards = math.prod(sizes.get(axis, 1) for axis in RULES["batch"]) // stages
    return None if num_rows % (schedule.microbatches * shards) else schedule

  def run_stages(
    self,
    schedule: Schedule,
    x_BTD: jax.Array,
    rows: tuple,
    deterministic: bool,
  ) -> tuple[jax.Array, LayerOutput]:
    """Runs all layers as a pipeline; `rows` are each row's positions, segments, source."""
    count = self.cfg.depth // (schedule.stages * schedule.repeats)
    T = x_BTD.shape[1]
    shared = self.dropout_keys(deterministic), self.score_bias(jnp.arange(T)[None], T)

    def run_stage(
      params: Any, x_BTD: jax.Array, rows: tuple, shared: tuple, visit: Visit
    ) -> tuple[jax.Array, Any]:
      keys_L, bias_XNTS = shared

      def make_contexts() -> dict[str, LayerContext]:
        positions_BT, segments_BT, source = rows
        slots_BT = jnp.broadcast_to(jnp.arange(T), positions_BT.shape)
        where = Placement(slots_BT, segments_BT, segments_BT, positions_BT)
        return self.contexts(where, positions_BT, None, source, None, bias_XNTS)

      choose = lambda param: param[visit.round]
      layers = self.layers(make_contexts, deterministic, False, choose)[:count]
      if keys_L is not None:
        first = visit.group * count
        keys_L = jax.lax.dynamic_slice_in_dim(keys_L, first, count)
        keys_L = jax.vmap(jax.random.fold_in, (0, None))(keys_L, visit.microbatch)
      period, scanned = min(len(self.cfg.period), count), self.execution.scanned
      x_BTD, output = run_layers(layers, period, scanned, x_BTD, params, keys_L, None)
      return x_BTD, jax.tree.map(lambda loss_L: loss_L.sum(), output.losses)

    params = self.blocks.variables["params"]
    x_BTD, losses = run_pipeline(run_stage, schedule, params, x_BTD, rows, shared)
    return x_BTD, LayerOutput(losses=losses, attention={})

  def dropout_keys(self, deterministic: bool) -> jax.Array | None:
    """A key for each layer; None without dropout."""
    return (
      None if deterministic else jax.random.split(self.make_rng("dropout"), self.cfg.depth)
    )

  def layers(
    self,
    make_contexts: Callable[[], dict[str, LayerContext]],
    deterministic: bool,
    capture: bool,
    choose: Callable = lambda params: params,
  ) -> list[Layer]:
    """Every layer as a function of x and of (its parameters, its key, its cache).

    The function itself makes the layer's context and, with `choose`, picks its parameters
    out of several, so that neither is kept for the backward pass.
    """
    block = Block(self.cfg, self.execution, self.reads_source, parent=None)
    has_tail = self.cfg.depth % len(self.cfg.period) > 0  # which `run_scanned` unrolls
    is_looped = self.execution.scanned and not has_tail

    def layer_of(kind: str) -> Layer:
      def layer(x_BTD: jax.Array, inputs: tuple) -> tuple[jax.Array, LayerOutput]:
        params, key, cache = inputs
        variables = {"params": jax.tree.map(choose, params)}
        rngs = {} if key is None else {"dropout": key}
        context = make_contexts()[kind]
        return block.apply(
          variables, x_BTD, cache, context, deterministic, capture, rngs=rngs
        )

      return with_remat(layer, self.execution, is_looped)

    layers = {kind: layer_of(kind) for kind in sorted(set(self.cfg.period))}
    return [layers[kind] for kind in self.cfg.layer_kinds()]

  def source_cache(self, source_BSD: jax.Array, segments_BS: jax.Array) -> SourceCache:
    """Every layer's keys and values of the encoder's output."""
    block = Block(self.cfg, self.execution, self.reads_source, parent=None)
    layers = []
    for params in split_blocks(self.blocks.variables["params"], self.cfg.depth):
      variables = {"params": params}
      kv = block.apply(variables, source_BSD, method="source_keys_values")
      layers.append(tuple(x.swapaxes(1, 2) for x in kv))
    return SourceCache(tuple(layers), segments_BS)


def real_tokens(where: Placement, num_new_B: jax.Array | None) -> jax.Array | None:
  """real_BT: which queries are not padding; None if all are."""
  if where.query_segments_BT is not None:
    return where.query_segments_BT > 0
  if num_new_B is not None:
    return jnp.arange(where.query_slots_BT.shape[1]) < num_new_B[:, None]
  return None


def see_source(
  where: Placement, cache: KVCache | None, source: EncodedSource | None
) -> tuple[jax.Array | None, Sight]:
  """The encoder's output (None if a cache has its keys and values), and the part of it that
  each query sees: that of its own document."""
  if source is not None:
    source_BSD, segments_BS = source
  else:
    assert cache is not None and cache.source is not None, "start() caches the source"
    source_BSD, segments_BS = None, cache.source.segments_BS
  if segments_BS is None:
    return source_BSD, Sight(None, pattern=Pattern())
  queries_BT = where.query_segments_BT
  if queries_BT is None:  # one document per row
    queries_BT = jnp.ones_like(where.query_slots_BT)
  placed = Placement(where.query_slots_BT, queries_BT, segments_BS)
  mask_BTS = visible(placed, segments_BS.shape[1], causal=False)
  pattern = Pattern(segments=segments_of(placed)) if cache is None else None
  return source_BSD, Sight(mask_BTS, pattern=pattern)


def segments_of(where: Placement) -> tuple[jax.Array, jax.Array] | None:
  """The segments of queries and of keys; None if every row is one document."""
  if where.query_segments_BT is None or where.key_segments_BS is None:
    return None
  return where.query_segments_BT, where.key_segments_BS
