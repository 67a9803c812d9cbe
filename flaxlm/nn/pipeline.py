# SPDX-License-Identifier: Apache-2.0
"""A pipeline: the mesh axis `stage` splits the layers, and microbatches pass through them.

A batch is split into M microbatches. In every tick each stage runs some of its layers on
one of them and sends the result to the next stage (GPipe: Huang et al., 2019). Stages are
idle while the pipeline fills and drains, S - 1 ticks. If layers are dealt out in R rounds
instead, and microbatches pass all stages R times, a tick is R times shorter, and so is the
idle time (Narayanan et al., 2021, section 2.2): (S - 1) / (M R + S - 1) of the whole.

One program runs on all stages: `shard_map` over `stage`, and over `data`, whose members
would otherwise sum their gradients at every tick, while the compiler shards all other axes
by the rules, as it does everywhere. Nothing here knows what a layer is.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from flaxlm.sharding import Schedule, axis_sizes_in_use, constrain, sums_at_ticks

AXIS = "stage"


class Visit(NamedTuple):
  """One tick of one stage: which microbatch it has, in which round, for which layers."""

  microbatch: jax.Array
  round: Any
  group: jax.Array  # which of the R S groups of layers


def run_pipeline(
  run_stage: Callable,
  schedule: Schedule,
  params: Any,
  x_BTD: jax.Array,
  rows: Any,
  shared: Any,
) -> tuple[jax.Array, Any]:
  """Runs all layers; returns their output, and the sums of `run_stage`'s second result.

  `run_stage(params, x_BTD, rows, shared, visit)` runs a stage's layers on one microbatch.
  `params` are stacked along L; `run_stage` gets them as (layers of a visit, R, ...) and
  uses those at `visit.round`. `rows` are arrays (B, ...), of which it gets the rows of the
  microbatch; it gets `shared` unchanged.
  """
  stages, visits = schedule.stages, schedule.visits
  at_ticks = any(sums_at_ticks(x.dtype.itemsize) for x in jax.tree.leaves(params))
  sums_data = axis_sizes_in_use().get("data", 1) > 1 and not at_ticks
  members = (AXIS, "data") if sums_data else (AXIS,)
  to_next = [(n, (n + 1) % stages) for n in range(stages)]

  def on_stage(
    numbers: jax.Array, params: Any, x_BTD: jax.Array, rows: Any, shared: Any
  ) -> tuple[jax.Array, Any]:
    number = numbers[0]
    params = deal(params, schedule, number)
    rows = jax.tree.map(functools.partial(cut, schedule, number), rows)
    x_MBTD = cut(schedule, number, x_BTD)

    def tick(carry: tuple, t: jax.Array) -> tuple[tuple, Any]:
      x_BTD, x_MBTD = carry  # from the previous stage; the microbatches at stage 0
      place = jnp.clip(t - number, 0, visits - 1)
      round = place // schedule.microbatches if schedule.repeats > 1 else 0
      visit = Visit(place % schedule.microbatches, round, round * stages + number)
      pick = lambda x: jax.lax.dynamic_index_in_dim(x, visit.microbatch, 0, False)
      x_BTD = jnp.where(number == 0, pick(x_MBTD), x_BTD)
      x_BTD, sums = run_stage(params, x_BTD, jax.tree.map(pick, rows), shared, visit)
      working = (t >= number) & (t < number + visits)
      sums = jax.tree.map(lambda x: jnp.where(working, x, 0), sums)
      x_BTD = jax.lax.ppermute(x_BTD, AXIS, to_next)
      # The last stage's output goes to stage 0, for the next round or as the result.
      home = t - (stages - 1)
      done = home % schedule.microbatches
      before = jax.lax.dynamic_index_in_dim(x_MBTD, done, 0, False)
      back = jnp.where(home >= 0, x_BTD, before)
      return (x_BTD, jax.lax.dynamic_update_index_in_dim(x_MBTD, back, done, 0)), sums

    # Idle stages compute too, on the values that they have. These are of this batch, not
    # zeros, for which a norm's gradient need not be finite.
    ticks = jnp.arange(schedule.ticks)
    (_, x_MBTD), sums = jax.lax.scan(tick, (x_MBTD[0], x_MBTD), ticks)
    return join(schedule, number, x_MBTD), jax.tree.map(
      lambda x: jax.lax.psum(x.sum(0), members), sums
    )

  of_stage, of_member, whole = PartitionSpec(AXIS), PartitionSpec(members), PartitionSpec()
  on_mesh = jax.shard_map(
    on_stage,
    in_specs=(of_stage, of_stage, of_member, of_member, whole),
    out_specs=(of_member, whole),
    axis_names=set(members),
    check_vma=False,  # with it, gradients of a shard_map inside (experts) do not compile
  )
  x_BTD, sums = on_mesh(jnp.arange(stages), params, x_BTD, rows, shared)
  return constrain(x_BTD, "batch", "length", "act_embed"), sums


def cut(schedule: Schedule, number: jax.Array, x: jax.Array) -> jax.Array:
  """Each stage's share of the rows -> all microbatches, (M, B / M, ...), on every stage.

  A microbatch has every n-th row of a share, so that no row leaves its device along other
  axes. The shares go from stage to stage by `ppermute`: the gradient of an all-gather sums
  over stages, which in bfloat16 breaks XLA's CPU compiler here, and an all-to-all gathers
  rows over `data`.
  """
  stages, parts = schedule.stages, schedule.microbatches // schedule.stages
  x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
  ahead = lambda k: [(n, (n + k) % stages) for n in range(stages)]
  shares = [x, *(jax.lax.ppermute(x, AXIS, ahead(k)) for k in range(1, stages))]
  x = jnp.stack(shares)[(number - jnp.arange(stages)) % stages]  # in the stages' order
  x = x.reshape(-1, *x.shape[2:])
  names = (None, "batch", "length", None)
  return constrain(x, *names[: x.ndim])


def join(schedule: Schedule, number: jax.Array, x_MBTD: jax.Array) -> jax.Array:
  """The inverse of `cut`: each stage gets its share of the microbatches on stage 0."""
  own, *others = jnp.split(x_MBTD, schedule.stages)
  x = jnp.where(number == 0, own, 0)
  for stage, share in enumerate(others, 1):  # all other stages receive zeros
    x += jax.lax.ppermute(share, AXIS, [(0, stage)])
  x = x.swapaxes(0, 1)
  return x.reshape(-1, *x.shape[2:])


def deal(params: Any, schedule: Schedule, number: jax.Array) -> Any:
  """The layers that a stage stores -> those that it runs, (layers of a visit, R, ...).

  Layers are stored in order, a contiguous block per stage, so that a checkpoint does not
  depend on the schedule. With R rounds a stage runs every S-th group of layers. Once per
  pass, all groups move to the stage that runs them, in R exchanges of one group per stage.
  """
  S, R = schedule.stages, schedule.repeats
  group = lambda x: x.reshape(R, x.shape[0] // R, *x.shape[1:])
  if R == 1:
    return jax.tree.map(lambda x: group(x).swapaxes(0, 1), params)
  # Stage s stores groups sR to sR + R - 1. In each exchange it sends one of them to a stage
  # that receives no other. Stages at a distance of S / gcd(S, R) have the same targets, so
  # they take turns.
  distance = S // math.gcd(S, R)
  sent = [[(k + s // distance) % R for k in range(R)] for s in range(S)]
  received = [[0] * R for _ in range(S)]  # the exchange that brings the group of a round
  targets = [[0] * S for _ in range(R)]
  for s, k in itertools.product(range(S), range(R)):
    round, targets[k][s] = divmod(s * R + sent[s][k], S)
    received[targets[k][s]][round] = k

  def send(x: jax.Array, k: int) -> jax.Array:
    if targets[k] == list(range(S)):  # every stage keeps its group
      return x
    return jax.lax.ppermute(x, AXIS, list(enumerate(targets[k])))

  def deal_out(x: jax.Array) -> jax.Array:
    groups = group(x)[jnp.array(sent)[number]]
    arrived = jnp.stack([send(groups[k], k) for k in range(R)])
    return arrived[jnp.array(received)[number]].swapaxes(0, 1)

  return jax.tree.map(deal_out, params)
