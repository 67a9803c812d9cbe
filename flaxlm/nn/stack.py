# SPDX-License-Identifier: Apache-2.0
"""A transformer's layers: `Block` is one, `Stack` all of them, with their positions.

The parameters of all blocks are stacked along a leading layer dim, always. Whether the
stack runs as a loop or unrolled, and what is kept for the backward pass, is a knob of
the run (`Execution`), never of the checkpoint. Local and global
layers have the same parameters; a loop runs over whole periods of `layer_pattern`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from flaxlm.config import ResolvedModel
from flaxlm.nn.attention import Attention, Placement, Reach, Sight, visible
from flaxlm.nn.base import Execution
from flaxlm.nn.cache import (
  MOST_NEW,
  KVCache,
  SourceCache,
  layer_kinds,
  num_slots,
  ring_slots,
  slot_in_ring,
  tokens_in_ring,
  write_ring,
  write_slots,
)
from flaxlm.nn.layers import Embedding, FeedForward, build_norm
from flaxlm.nn.moe import MoE
from flaxlm.nn.pipeline import AXIS, Visit, run_pipeline
from flaxlm.nn.positions import alibi_bias, relative_buckets, rotation, sinusoids
from flaxlm.sharding import RULES, Schedule, axis_sizes_in_use, constrain, make_schedule

# What is kept of a block besides its input, by `training.remat`.
ATTENTION = "attention"  # the name of attention's output
REMAT_POLICIES = {
  "full": None,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "attention": jax.checkpoint_policies.save_only_these_names(ATTENTION),
  "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=[ATTENTION],
    offload_src="device",
    offload_dst="pinned_host",
  ),
}


class Surroundings(NamedTuple):
  """What a block reads besides its own input: the same for all layers of one kind."""

  sight: Sight
  reach: Reach | None
  first_slots_B: Any  # where new tokens go in the cache; None without one
  ring_BS: Any  # the token in each slot of a ring that takes several new ones, else None
  memory_BSD: Any  # the encoder's output; None if there is no encoder, or it is cached
  source_sight: Any
  real_BT: Any  # False on padding; None if there is none


class LayerOutput(NamedTuple):
  """What a block returns besides its output."""

  cache: Any = None
  losses: Any = None
  attention: Any = None


class Block(nn.Module):
  """One layer: attention, then feed-forward, each added to the residual stream."""

  cfg: ResolvedModel
  run: Execution
  reads_source: bool = False

  def setup(self):
    cfg, run = self.cfg, self.run
    self.attention = Attention(cfg, run)
    self.ffn = (MoE if cfg.moe.num_experts else FeedForward)(cfg, **run.dtypes)
    branches = ["attention", "ffn"]
    if self.reads_source:
      self.cross_attention = Attention(cfg, run)
      branches.append("cross_attention")
    if cfg.parallel == "one_norm":
      branches.remove("ffn")
    for branch in branches:
      if cfg.norm_placement != "output":
        setattr(self, f"{branch}_norm", build_norm(cfg))
      if cfg.norm_placement in {"output", "both"}:
        setattr(self, f"{branch}_output_norm", build_norm(cfg))
    self.dropout = nn.Dropout(cfg.dropout)

  def __call__(
    self,
    x_BTD: jax.Array,
    cache: Any,
    around: Surroundings,
    deterministic: bool = True,
    capture: bool = False,
  ) -> tuple[jax.Array, LayerOutput]:
    """The layer's output, and its new cache: (k, v) or None.

    A cache is (k, v), or (k, v, source k, source v).
    """
    attention: dict[str, Any] = {}
    losses: dict[str, Any] = {}
    source_cache = () if cache is None else cache[2:]
    cached = cache is not None
    dropout = lambda branch: self.dropout(branch, deterministic=deterministic)

    def attend(x_BTD: jax.Array) -> jax.Array:
      nonlocal cache
      kv = self.attention.keys_values(x_BTD, around.sight.cos_sin)
      if cached and around.ring_BS is not None:
        cache = kv = write_ring(cache[:2], kv, around.first_slots_B, around.ring_BS)
      elif cached:
        cache = kv = write_slots(cache[:2], kv, around.first_slots_B)
      out, maps = self.attention(x_BTD, around.sight, kv, around.reach, cached, capture)
      if capture:
        attention["self"] = maps
      return checkpoint_name(out, ATTENTION)

    def attend_source(x_BTD: jax.Array) -> jax.Array:
      kv = source_cache or self.cross_attention.keys_values(around.memory_BSD)
      sight = around.source_sight
      out, maps = self.cross_attention(x_BTD, sight, kv, None, cached, capture)
      if capture:
        attention["cross"] = maps
      return out

    def feed(x_BTD: jax.Array) -> jax.Array:
      if not self.cfg.moe.num_experts:
        return self.ffn(x_BTD)
      # Decoding serves every choice: nothing may depend on what else is in the batch.
      out, router = self.ffn(x_BTD, around.real_BT, dropping=not cached)
      losses.update(router)
      return out

    if self.cfg.parallel != "none":
      h_BTD = for_products(self.attention_norm(x_BTD))
      one_norm = self.cfg.parallel == "one_norm"
      g_BTD = h_BTD if one_norm else for_products(self.ffn_norm(x_BTD))
      for y_BTD in (attend(h_BTD), feed(g_BTD)):
        x_BTD = x_BTD + dropout(for_norms(y_BTD, self.run))
    else:
      x_BTD = self.residual("attention", x_BTD, attend, dropout)
      if self.reads_source:
        x_BTD = self.residual("cross_attention", x_BTD, attend_source, dropout)
      x_BTD = self.residual("ffn", x_BTD, feed, dropout)
    return for_norms(x_BTD, self.run), LayerOutput(cache, losses, attention)

  def residual(
    self, name: str, x_BTD: jax.Array, branch: Callable, dropout: Callable
  ) -> jax.Array:
    """x + branch(x), with norms where `norm_placement` wants them."""
    placement = self.cfg.norm_placement
    norm: Any = getattr(self, f"{name}_norm", None)
    y_BTD = branch(for_products(norm(x_BTD) if placement in {"pre", "both"} else x_BTD))
    y_BTD = for_norms(y_BTD, self.run)
    if placement in {"output", "both"}:
      y_BTD = getattr(self, f"{name}_output_norm")(y_BTD)
    x_BTD = x_BTD + dropout(y_BTD)
    return norm(x_BTD) if placement == "post" else x_BTD

  def source_keys_values(self, memory_BSD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What this layer's cross-attention reads of the encoder's output."""
    return self.cross_attention.keys_values(memory_BSD)


def for_norms(x_BTD: jax.Array, run: Execution) -> jax.Array:
  """Where norms and sums run: each member of `tensor` on all of a row, or on its share
  (Korthikanti et al., 2022, section 4.2.2). Of a product's parts there, this is the sum.
  """
  if run.sequence_parallel:
    return constrain(x_BTD, "batch", "norm_length", "act_embed")
  return for_products(x_BTD)


def for_products(x_BTD: jax.Array) -> jax.Array:
  """Whole along `tensor`, whose members have their heads and their share of the FFN."""
  return constrain(x_BTD, "batch", "length", "act_embed")


class Stack(nn.Module):
  """Positions, L blocks, and the final norm: embedded tokens in, hidden vectors out."""

  cfg: ResolvedModel
  run: Execution
  depth: int
  causal: bool = True
  reads_source: bool = False

  def setup(self):
    cfg, run = self.cfg, self.run
    if cfg.positions == "learned":
      shape, names = (cfg.context, cfg.width), ("slots", "embed")
      self.positions = Embedding(shape, names, **run.dtypes)
    if cfg.positions == "relative":
      shape, names = (cfg.relative_buckets, cfg.num_heads), ("slots", "heads")
      self.relative_bias = Embedding(shape, names, param_dtype=run.param_dtype)
    if cfg.embedding_norm:
      self.embedding_norm = build_norm(cfg)
    self.blocks = nn.scan(
      Block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=(nn.broadcast, nn.broadcast),
      length=self.depth,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )(cfg, run, self.reads_source)
    if cfg.norm_placement != "post":
      self.final_norm = build_norm(cfg)
    self.dropout = nn.Dropout(cfg.dropout)

  def __call__(
    self,
    x_BTD: jax.Array,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    *,
    cache: KVCache | None = None,
    num_new_B: jax.Array | None = None,
    memory: tuple[jax.Array, jax.Array | None] | None = None,
    deterministic: bool = True,
    capture: bool = False,
  ) -> tuple[jax.Array, KVCache | None, dict, dict]:
    """Hidden vectors (B, T, D), the new cache, losses, and attention maps (L, B, N, T, S).

    Without a cache a row is read from its start, `segments_BT` keeping packed documents
    apart. With a cache the T tokens follow each row's `lengths_B` earlier ones, and the
    first `num_new_B` of them count. `memory` is the encoder's output with its segments.
    """
    B, T = x_BTD.shape[:2]
    slots_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    if cache is not None:
      assert segments_BT is None, "a cached row is one document"
      slots_BT += cache.lengths_B[:, None]
    if positions_BT is None:
      positions_BT = slots_BT
    x_BTD = self.place(x_BTD, positions_BT)
    x_BTD = self.dropout(x_BTD, deterministic=deterministic)
    x_BTD = for_norms(x_BTD, self.run)
    keys_at = positions_BT if cache is None else None  # a cached row is one document
    where = Placement(slots_BT, segments_BT, segments_BT, keys_at)
    schedule = None if cache is not None or capture else self.schedule(B)
    if schedule is not None:
      rows = (positions_BT, segments_BT, memory)
      x_BTD, output = self.run_stages(schedule, x_BTD, rows, deterministic)
    else:
      around = self.surroundings(where, positions_BT, cache, memory, num_new_B)
      layers: list | None = None
      if cache is not None:
        layers = [*cache.layers]
        if cache.source is not None:
          of_source = cache.source.layers
          layers = [(*own, *of) for own, of in zip(layers, of_source, strict=True)]
      x_BTD, output = self.run_blocks(x_BTD, layers, around, deterministic, capture)
    if self.cfg.norm_placement != "post":
      x_BTD = self.final_norm(x_BTD)
    x_BTD = for_products(x_BTD)
    if cache is not None:
      lengths_B = cache.lengths_B + (T if num_new_B is None else num_new_B)
      cache = cache._replace(layers=tuple(output.cache), lengths_B=lengths_B)
    losses = jax.tree.map(lambda loss_L: loss_L.sum(), output.losses)
    return x_BTD, cache, losses, output.attention

  def place(self, x_BTD: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """Adds positions to the embedding, where they are added."""
    if self.cfg.positions == "learned":
      x_BTD += self.positions(positions_BT)
    elif self.cfg.positions == "sinusoidal":
      x_BTD += sinusoids(positions_BT, self.cfg.width).astype(x_BTD.dtype)
    return self.embedding_norm(x_BTD) if self.cfg.embedding_norm else x_BTD

  def surroundings(
    self,
    where: Placement,
    positions_BT: jax.Array,
    cache: KVCache | None,
    memory: tuple[jax.Array, jax.Array | None] | None,
    num_new_B: jax.Array | None,
    bias_XNTS: jax.Array | None = None,
  ) -> dict[str, Surroundings]:
    """What the layers of each kind, L and G, have around them; a bias if it is known."""
    cfg, causal = self.cfg, self.causal
    num_new = num_keys = positions_BT.shape[1]
    if cache is not None:
      num_keys = max(map(num_slots, cache.layers))
    real_BT = None
    if where.query_segments_BT is not None:
      real_BT = where.query_segments_BT > 0
    elif num_new_B is not None:
      real_BT = jnp.arange(positions_BT.shape[1]) < num_new_B[:, None]
    if bias_XNTS is None:
      # Rows without a cache all have the same slots: one bias serves them.
      slots_XT = where.query_slots_BT[: None if cache is not None else 1]
      bias_XNTS = self.score_bias(slots_XT, num_keys)
    memory_BSD, source_sight = None, None
    if self.reads_source:
      source = None if cache is None else cache.source
      memory_BSD, source_sight = self.see_source(where, source, memory)
    found = {}
    for kind in sorted(set(cfg.period)):
      window = cfg.window if kind == "L" else None
      placed, first_slots_B, ring_BS = where, None, None
      if cache is not None:
        first_slots_B = where.query_slots_BT[:, 0]
        num_keys = num_slots(cache.layers[layer_kinds(cfg).index(kind)])
        most = ring_slots(cfg)
        if kind == "L" and most is not None:
          ring = (num_keys, cfg.sink_tokens)
          tokens_BS = tokens_in_ring(first_slots_B + num_new, *ring)
          placed = where._replace(key_slots_BS=tokens_BS)
          if num_new == 1:
            first_slots_B = slot_in_ring(first_slots_B, *ring)
          else:
            assert num_keys < most or num_new <= MOST_NEW, "in chunks"
            ring_BS = tokens_BS
      mask_BTS = visible(placed, num_keys, causal, window, cfg.sink_tokens)
      reach = Reach(
        window=None if cfg.sink_tokens else window,
        is_all=where.query_segments_BT is None and not cfg.sink_tokens,
      )
      cos_sin = None
      if cfg.positions == "rope":
        assert cfg.head_dim is not None
        cos_sin = rotation(positions_BT, cfg.head_dim, cfg.rope, kind == "L")
      found[kind] = Surroundings(
        sight=Sight(mask_BTS, bias_XNTS, cos_sin),
        reach=reach if causal else None,
        first_slots_B=first_slots_B,
        ring_BS=ring_BS,
        memory_BSD=memory_BSD,
        source_sight=source_sight,
        real_BT=real_BT,
      )
    return found

  def see_source(
    self,
    where: Placement,
    source: SourceCache | None,
    memory: tuple[jax.Array, jax.Array | None] | None,
  ) -> tuple[jax.Array | None, Sight]:
    """The encoder's output, and which of it each query sees: its own document's."""
    if memory is not None:
      memory_BSD, segments_BS = memory
    else:
      assert source is not None, "an encoder-decoder decodes from a cache with a source"
      memory_BSD, segments_BS = None, source.segments_BS
    queries_BT = where.query_segments_BT
    if queries_BT is None and segments_BS is not None:  # one document a row
      queries_BT = jnp.ones_like(where.query_slots_BT)
    placed = Placement(where.query_slots_BT, queries_BT, segments_BS)
    if segments_BS is None:
      return memory_BSD, Sight(None)
    return memory_BSD, Sight(visible(placed, segments_BS.shape[1], causal=False))

  def score_bias(self, slots_XT: jax.Array, num_keys: int) -> jax.Array | None:
    """bias_XNTS of every layer's scores, or None."""
    cfg = self.cfg
    if cfg.positions == "alibi":
      return alibi_bias(slots_XT, num_keys, cfg.num_heads, self.causal)
    if cfg.positions == "relative":
      distances_XTS = jnp.arange(num_keys) - slots_XT[:, :, None]
      sizes = (cfg.relative_buckets, cfg.relative_distance)
      buckets_XTS = relative_buckets(distances_XTS, *sizes, self.causal)
      return self.relative_bias(buckets_XTS).transpose(0, 3, 1, 2)
    return None

  def run_blocks(
    self,
    x_BTD: jax.Array,
    caches: list | None,
    around: dict[str, Surroundings],
    deterministic: bool,
    capture: bool,
  ) -> tuple[jax.Array, LayerOutput]:
    """All layers. Losses and maps come stacked along L, caches as a list."""
    if self.is_initializing():  # kinds have the same parameters, and caches have none
      x_BTD, output = self.blocks(x_BTD, None, around[self.cfg.period[0]])
      return x_BTD, output._replace(attention={})
    order = self.layers(lambda: around, deterministic, capture)
    params, keys_L = self.blocks.variables["params"], self.dropout_keys(deterministic)
    if caches is None and self.run.scanned and not is_split(params):
      return run_scanned(order, len(self.cfg.period), x_BTD, (params, keys_L, None))
    # With a cache always: a loop over layers would copy each layer's at every token.
    of_layers = zip(
      split_blocks(params, self.depth),
      unstack(keys_L, self.depth),
      caches or [None] * self.depth,
      strict=True,
    )
    x_BTD, outputs = run_unrolled(order, x_BTD, list(of_layers))
    stacked = stack_trees([output._replace(cache=None) for output in outputs])
    return x_BTD, stacked._replace(cache=[output.cache for output in outputs])

  def schedule(self, num_rows: int) -> Schedule | None:
    """How the layers run as a pipeline; None if the mesh has none, or if they just run.

    They do where there is no batch to cut up: a few rows to be looked at, or parameters
    that decoding has taken apart. Training never comes to that (`sharding.check_batch`).
    """
    sizes = axis_sizes_in_use()
    stages = sizes.get(AXIS, 1)
    if stages == 1 or self.is_initializing() or is_split(self.blocks.variables["params"]):
      return None
    schedule = make_schedule(stages, self.run.microbatches, self.run.repeats)
    shards = math.prod(sizes.get(axis, 1) for axis in RULES["batch"]) // stages
    return None if num_rows % (schedule.microbatches * shards) else schedule

  def run_stages(
    self,
    schedule: Schedule,
    x_BTD: jax.Array,
    rows: tuple,
    deterministic: bool,
  ) -> tuple[jax.Array, LayerOutput]:
    """All layers in a pipeline; `rows` are positions, segments, and memory, of each row."""
    count = self.depth // (schedule.stages * schedule.repeats)
    T = x_BTD.shape[1]
    shared = self.dropout_keys(deterministic), self.score_bias(jnp.arange(T)[None], T)

    def run_stage(
      params: Any, x_BTD: jax.Array, rows: tuple, shared: tuple, visit: Visit
    ) -> tuple[jax.Array, Any]:
      keys_L, bias_XNTS = shared

      def surround() -> dict[str, Surroundings]:
        positions_BT, segments_BT, memory = rows
        slots_BT = jnp.broadcast_to(jnp.arange(T), positions_BT.shape)
        where = Placement(slots_BT, segments_BT, segments_BT, positions_BT)
        return self.surroundings(where, positions_BT, None, memory, None, bias_XNTS)

      choose = lambda param: param[visit.round]
      layers = self.layers(surround, deterministic, False, choose)[:count]
      if keys_L is not None:
        first = visit.group * count
        keys_L = jax.lax.dynamic_slice_in_dim(keys_L, first, count)
        keys_L = jax.vmap(jax.random.fold_in, (0, None))(keys_L, visit.microbatch)
      of_layers = (params, keys_L, None)
      if self.run.scanned:
        period = min(len(self.cfg.period), count)
        x_BTD, output = run_scanned(layers, period, x_BTD, of_layers)
      else:
        x_BTD, outputs = run_unrolled(layers, x_BTD, unstack(of_layers, count))
        output = stack_trees(outputs)
      return x_BTD, jax.tree.map(lambda loss_L: loss_L.sum(), output.losses)

    params = self.blocks.variables["params"]
    x_BTD, losses = run_pipeline(run_stage, schedule, params, x_BTD, rows, shared)
    return x_BTD, LayerOutput(losses=losses, attention={})

  def dropout_keys(self, deterministic: bool) -> jax.Array | None:
    """A key for each layer."""
    return None if deterministic else jax.random.split(self.make_rng("dropout"), self.depth)

  def layers(
    self,
    surround: Callable[[], dict[str, Surroundings]],
    deterministic: bool,
    capture: bool,
    choose: Callable = lambda params: params,
  ) -> "list[Layer]":
    """Every layer as a function of its input and of (its parameters, its key, its cache).

    What is around it and which of several parameters it has are found out in the function:
    so neither is kept for the backward pass.
    """
    block = Block(self.cfg, self.run, self.reads_source, parent=None)

    def layer(kind: str, x_BTD: jax.Array, of_layer: Any) -> tuple[jax.Array, LayerOutput]:
      params, key, cache = of_layer
      params = jax.tree.map(choose, params)
      rngs = {} if key is None else {"dropout": key}
      around = surround()[kind]
      return block.apply(
        {"params": params}, x_BTD, cache, around, deterministic, capture, rngs=rngs
      )

    def kept(kind: str) -> Callable:
      run = lambda x_BTD, of_layer: layer(kind, x_BTD, of_layer)
      if self.run.remat == "none":
        return run
      policy = REMAT_POLICIES[self.run.remat]
      return jax.checkpoint(run, policy=policy, prevent_cse=not self.run.scanned)

    pattern = self.cfg.period
    kinds = {kind: kept(kind) for kind in sorted(set(pattern))}
    return [kinds[pattern[n % len(pattern)]] for n in range(self.depth)]

  def source_cache(self, memory_BSD: jax.Array, segments_BS: jax.Array) -> SourceCache:
    """Every layer's keys and values of the encoder's output."""
    block = Block(self.cfg, self.run, self.reads_source, parent=None)
    layers = []
    for params in split_blocks(self.blocks.variables["params"], self.depth):
      variables = {"params": params}
      kv = block.apply(variables, memory_BSD, method="source_keys_values")
      layers.append(tuple(x.swapaxes(1, 2) for x in kv))
    return SourceCache(tuple(layers), segments_BS)


# -- Running layers ------------------------------------------------------------------------

Layer = Callable[[jax.Array, Any], tuple[jax.Array, Any]]


def run_unrolled(layers: list[Layer], x: jax.Array, of_layers: list) -> tuple[Any, list]:
  """`layers` one after the other, each with what is its own; the outputs as a list."""
  outputs = []
  for layer, of_layer in zip(layers, of_layers, strict=True):
    x, output = layer(x, of_layer)
    outputs.append(output)
  return x, outputs


def stack_trees(trees: list) -> Any:
  return jax.tree.map(lambda *parts: jnp.stack(parts), *trees)


def run_scanned(
  layers: list[Layer], period: int, x: jax.Array, stacked: Any
) -> tuple[jax.Array, Any]:
  """The same as a loop over periods of layers that differ; what is left over, unrolled."""
  if period == 1:  # no slices in the loop: each is a copy that the backward pass keeps
    return jax.lax.scan(layers[0], x, stacked)
  count = len(layers) // period
  looped = count * period
  in_loop = jax.tree.map(lambda s: s[:looped].reshape(count, period, *s.shape[1:]), stacked)

  def run_period(x: jax.Array, of_period: Any) -> tuple[jax.Array, Any]:
    x, outputs = run_unrolled(layers[:period], x, unstack(of_period, period))
    return x, stack_trees(outputs)

  x, outputs = jax.lax.scan(run_period, x, in_loop)
  outputs = jax.tree.map(lambda s: s.reshape(looped, *s.shape[2:]), outputs)
  if looped < len(layers):
    rest = jax.tree.map(lambda s: s[looped:], stacked)
    rest = unstack(rest, len(layers) - looped)
    x, more = run_unrolled(layers[looped:], x, rest)
    join = lambda *parts: jnp.concatenate(parts)
    outputs = jax.tree.map(join, outputs, stack_trees(more))
  return x, outputs


def is_split(params: Any) -> bool:
  """Whether each layer's parameters are a dict of their own, {"0": ..., "1": ...}.

  Decoding has them so: a slice of a stacked array would be a copy, at every token.
  """
  return "0" in params


def split_blocks(params: Any, depth: int) -> list[Any]:
  """The parameters of each layer, whether they come stacked or not."""
  if is_split(params):
    return [params[str(n)] for n in range(depth)]
  return unstack(params, depth)


def unstack(stacked: Any, count: int) -> list[Any]:
  """The slices of a stacked tree, whose gradient is stacked again in one piece.

  Left to itself, the gradient of each slice is as large as the whole, and they are added.
  """
  leaves, tree = jax.tree.flatten(stacked)
  slices = [unstack_array(leaf, count) for leaf in leaves]
  return [jax.tree.unflatten(tree, [s[n] for s in slices]) for n in range(count)]


def unstack_array(stacked: jax.Array, count: int) -> tuple[jax.Array, ...]:
  if not jnp.issubdtype(stacked.dtype, jnp.floating):  # keys have no gradient
    return tuple(stacked[n] for n in range(count))
  return _unstack(stacked)


@jax.custom_vjp
def _unstack(stacked: jax.Array) -> tuple[jax.Array, ...]:
  return tuple(stacked)


_unstack.defvjp(
  lambda stacked: (tuple(stacked), None), lambda _, grads: (jnp.stack(grads),)
)
