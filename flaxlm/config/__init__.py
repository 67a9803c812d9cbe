# SPDX-License-Identifier: Apache-2.0
"""Every knob of flaxlm with its default; how experiments are written, read and checked.

Standard library only: importing this is instant.
"""

from flaxlm.config.checks import check_config, check_model, check_types
from flaxlm.config.fields import MOST_DEVICES, knob, knobs
from flaxlm.config.kernels import FUSED, NO_KERNEL, SPLASH, TILED, FusedKernel, cudnn
from flaxlm.config.mesh import (
  MESH_AXES,
  SLOW,
  MeshConfig,
  mesh_shape,
  mesh_sizes,
  parse_mesh,
  slow_axes,
)
from flaxlm.config.model import (
  MAX_NEW_IN_RING,
  OBJECTIVES,
  TALKS,
  ModelConfig,
  MoEConfig,
  ResolvedModel,
  ResolvedMoE,
  ResolvedRope,
  RopeConfig,
)
from flaxlm.config.schema import (
  AttentionPath,
  CheckpointConfig,
  Config,
  DataConfig,
  DpoConfig,
  JobConfig,
  LoraConfig,
  OptimizerConfig,
  Remat,
  ResolvedConfig,
  RewardConfig,
  TokenizerConfig,
  TrainingConfig,
)
from flaxlm.config.text import (
  difference,
  fields_in,
  flag,
  from_json,
  is_file,
  is_shipped,
  load_config,
  override,
  to_json,
  unique_keys,
  without,
)
