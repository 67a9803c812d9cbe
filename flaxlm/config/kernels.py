# SPDX-License-Identifier: Apache-2.0
"""The fused attention kernels that platforms have, and what decides whether one is used."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class FusedKernel:
  """The fused attention kernel of a device: `training.attention` calls it by its name.

  Whoever knows the device says which it has (`platform.fused_kernel` of the device at hand,
  `devices.Device.kernel` of a planned one), because nothing in `nn` asks devices.
  """

  name: Literal["", "cudnn", "splash", "tiled"] = ""
  head_dim: int = 0  # the largest that it takes in training
  shortest: int = 0  # `auto` leaves shorter rows to XLA's operations
  packed: bool = False  # it tells packed documents apart without a mask
  lanes: int = 1  # it keeps heads padded to a multiple of these, and takes such lengths
  interpreted: bool = False  # by Pallas's interpreter, which needs no TPU: for tests

  @property
  def on_cpu(self) -> bool:
    return self.name == "tiled"


FUSED = ("cudnn", "splash", "tiled")  # the paths of attention that are such a kernel
NO_KERNEL = FusedKernel()

# Its table of block sizes ends at 512 tokens (nn/kernels/splash.py): a row of two blocks is
# the first of which causal attention skips a part.
SPLASH = FusedKernel("splash", head_dim=256, shortest=1024, lanes=128)

# Up to 256 tokens it is no faster than whole rows (docs/LOG.md).
TILED = FusedKernel("tiled", shortest=512)


def cudnn(head_dim: int, packed: bool = False) -> FusedKernel:
  """cuDNN's attention for heads of up to this dim; 0: the device cannot run it."""
  return FusedKernel("cudnn", head_dim, packed=packed) if head_dim else NO_KERNEL
