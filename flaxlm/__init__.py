# SPDX-License-Identifier: Apache-2.0
"""flaxlm: a small, complete language-model package in JAX and Flax.

    flaxlm.train(Config(name="mine"))  # of flaxlm.config
    model = flaxlm.load("runs/mine")
    print(model.generate("def ", max_new_tokens=40).completion)

Importing the package itself loads neither jax nor any backend; its modules do, and so does
the first use of one of these names.
"""

import os
from typing import TYPE_CHECKING, Any

from flaxlm.version import __version__

if TYPE_CHECKING:
  from flaxlm.api import Model as Model
  from flaxlm.api import load as load
  from flaxlm.training.loop import train as train

__all__ = ["Model", "__version__", "load", "train"]
QUIET = "TF_CPP_MIN_LOG_LEVEL"


def __getattr__(name: str) -> Any:
  if name not in __all__:
    raise AttributeError(f"module 'flaxlm' has no attribute {name!r}")
  # When XLA loads a program from the compile cache, it takes two compiler hints for missing
  # processor features, and prints pages about them. It asks for this once, with jax.
  is_unset = QUIET not in os.environ
  os.environ.setdefault(QUIET, "3")
  try:
    if name == "train":
      from flaxlm.training.loop import train

      return train
    from flaxlm import api
  finally:
    if is_unset:
      os.environ.pop(QUIET, None)

  return getattr(api, name)


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
