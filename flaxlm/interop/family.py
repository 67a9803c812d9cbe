# SPDX-License-Identifier: Apache-2.0
"""What flaxlm knows of a family: its table of weights, and its config, both ways."""

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
  """One kind of checkpoint of Hugging Face's.

  model_type: as in its config.json.
  architectures: its classes; the first one with a language model's head, which we write.
  weights: its table. Rows for parameters that a config does not have mean nothing.
  read: Settings -> ModelConfig. write: ResolvedModel -> keys of config.json; what cannot be
    said in this family need not be refused there, `Family.keys` reads back and compares.
  prefix: of every name but the head's, which files saved from the bare model lack.
  renamed: (ending, ending) of older names.
  tied: (name, name) of tensors that may stand in a file besides their twin.
  ignored: regular expressions of tensors that are no parameters.
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
    """The config.json of a model of ours, whose tensors will be called `names`.

    Raises `CheckpointError`, with the fields that have no place in this family.
    """
    keys = {"model_type": self.model_type, **self.write(cfg.resolve())}
    said = Settings(keys, self.model_type, names)
    misfits = differences(canonical(cfg), canonical(self.read(said)))
    if misfits:
      raise CheckpointError(
        f"{self.model_type} has no place for {', '.join(misfits)}",
        f"as {self.model_type} it would be another model",
      )
    return keys

  def expected(
    self, cfg: ResolvedModel, shapes: Mapping[str, Shape]
  ) -> dict[str, tuple[Weight, tuple[int, ...], Shape]]:
    """{their name: (row, place in our stack, its shape)}; `shapes` are our parameters'.

    Raises `CheckpointError` where a parameter has no row.
    """
    table = self.weights(cfg)
    homeless = shapes.keys() - {path for row in table for path in row.ours}
    if homeless:
      raise CheckpointError(
        f"{self.model_type} has no place for the parameters {', '.join(sorted(homeless))}"
      )
    return {
      name: (row, place, shape)
      for row in table
      for name, shape, place in row.tensors(shapes)
    }


def differences(ours: Any, theirs: Any, prefix: str = "model.") -> list[str]:
  """Fields in which two configs differ, as `model.window=8 (not 16)`; numbers may be
  rounded, as JSON and other libraries do."""
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
