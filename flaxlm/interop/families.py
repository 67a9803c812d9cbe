# SPDX-License-Identifier: Apache-2.0
"""All families that flaxlm reads and writes; docs/interop.md shows how to add one."""

from typing import Any

from flaxlm.errors import CheckpointError
from flaxlm.interop import bert, gpt, llama
from flaxlm.interop.family import Family
from flaxlm.interop.values import shown

FAMILIES = {
  family.model_type: family for family in (*llama.FAMILIES, *gpt.FAMILIES, *bert.FAMILIES)
}


def find_family(model_type: Any, origin: str) -> Family:
  """The family of a config.json's model_type. Raises `CheckpointError` if unknown."""
  if not isinstance(model_type, str) or model_type not in FAMILIES:
    known = ", ".join(sorted(FAMILIES))
    raise CheckpointError(
      f"{origin}: model_type {shown(model_type)} is not supported", f"supported: {known}"
    )
  return FAMILIES[model_type]
