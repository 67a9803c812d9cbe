# SPDX-License-Identifier: Apache-2.0
"""Where every array lives: the mesh, the one table of rules, the rows of a batch."""

from flaxlm.sharding.batches import (
  batch_parts,
  batch_sharding,
  batch_shards,
  check_batch,
  least_rows,
  merged,
  on_host,
  wait_on_cpu,
)
from flaxlm.sharding.heads import KV_COPIES, kv_parts, mesh_for, split_sizes, whole_sizes
from flaxlm.sharding.mesh import (
  describe_mesh,
  hybrid_grid,
  make_mesh,
  networks,
  use_mesh,
)
from flaxlm.sharding.rules import (
  FIELDS,
  RULES,
  axes_of,
  axis_sizes_in_use,
  check_replication,
  constrain,
  find_replication,
  is_cut,
  like_parameters,
  name_of,
  partition_spec,
  with_shardings,
)
from flaxlm.sharding.schedule import Schedule, make_schedule, training_schedule

__all__ = [
  "FIELDS",
  "KV_COPIES",
  "RULES",
  "Schedule",
  "axes_of",
  "axis_sizes_in_use",
  "batch_parts",
  "batch_sharding",
  "batch_shards",
  "check_batch",
  "check_replication",
  "constrain",
  "describe_mesh",
  "find_replication",
  "hybrid_grid",
  "is_cut",
  "kv_parts",
  "least_rows",
  "like_parameters",
  "make_mesh",
  "make_schedule",
  "merged",
  "mesh_for",
  "name_of",
  "networks",
  "on_host",
  "partition_spec",
  "split_sizes",
  "training_schedule",
  "use_mesh",
  "wait_on_cpu",
  "whole_sizes",
  "with_shardings",
]
