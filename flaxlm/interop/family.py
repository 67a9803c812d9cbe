# SPDX-License-Identifier: Apache-2.0
"""A family of checkpoints: its table of weights, and its config, in both directions."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from flaxlm.config import ModelConfig, ResolvedModel
from flaxlm.errors import CheckpointError
from flaxlm.interop.layouts import Shape, Weight
from flaxlm.interop.settings import Settings, canonical


@dataclasses.dataclass(frozen=True)
class Family:
  """One kind of Hugging Face checkpoint.

  model_type: as in config.json.
  architectures: its classes. We write the first, which has a language model's head.
  weights: its table. Rows for parameters that a config does not have are ignored.
  read: makes a ModelConfig of Settings.
  write: makes the keys of config.json of a ResolvedModel. It need not refuse what this
    family cannot express: `Family.keys` reads the keys back and compares.
  prefix: of every name except the head's. Files saved from the model without its head
    leave it out.
  renamed: pairs of name endings, (older, newer).
  tied: (name, twin): a file may hold both tensors, which are the same.
  ignored: regular expressions for tensors that are not parameters.
  """

  model_type: str
  architectures: tuple[str, ...]
  weights: Callable[[ResolvedModel], tuple[Weight, ...]]
  read: Callable[[Settings], ModelConfig]
  write: Callable[[ResolvedModel], dict[str, Any]]
  prefix: str
  renamed: tuple[tuple[str, str], ...] = ()
  tied: tuple[tuple[str, str], ...] = ()
  ignored: tuple[str, ...] = ()

  def ignores(self, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in self.ignored)

  def keys(self, cfg: ResolvedModel, names: tuple[str, ...]) -> dict[str, Any]:
    """The config.json of our model `cfg`; `names` are those of its tensors in the file.

    Raises `CheckpointError`, with the fields that this family cannot express.
    """
    keys = {"model_type": self.model_type, **self.write(cfg.resolve())}
    written = Settings(keys, self.model_type, names)
    misfits = differences(canonical(cfg), canonical(self.read(written)))
    if misfits:
      raise CheckpointError(
        f"{self.model_type} has no place for {', '.join(misfits)}",
        f"exported as {self.model_type}, it would be a different model",
      )
    return keys

  def expected(
    self, cfg: ResolvedModel, shapes: Mapping[str, Shape]
  ) -> dict[str, tuple[Weight, tuple[int, ...], Shape]]:
    """{name of their tensor: (row of the table, index in our stacked array, its shape)}.

    `shapes` are those of our parameters. Raises `CheckpointError` if one has no row.
    """
    table = self.weights(cfg)
    unmapped = shapes.keys() - {path for row in table for path in row.ours}
    if unmapped:
      raise CheckpointError(
        f"{self.model_type} has no place for the parameters {', '.join(sorted(unmapped))}"
      )
    return {
      name: (row, place, shape)
      for row in table
      for name, shape, place in row.tensors(shapes)
    }


def differences(ours: Any, theirs: Any, prefix: str = "model.") -> list[str]:
  """The fields in which two configs differ, with our values, as `model.window=8`.

  Floats may differ by rounding, which JSON and other libraries do.
  """
  found = []
  for field in dataclasses.fields(ours):
    mine, other = getattr(ours, field.name), getattr(theirs, field.name)
    if dataclasses.is_dataclass(mine):
      found += differences(mine, other, f"{prefix}{field.name}.")
    elif isinstance(mine, float) and isinstance(other, float):
      if abs(mine - other) > 1e-6 * max(abs(mine), abs(other)):
        found.append(f"{prefix}{field.name}={mine}")
    elif mine != other:
      found.append(f"{prefix}{field.name}={mine}")
  return found
