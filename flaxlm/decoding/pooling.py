# SPDX-License-Identifier: Apache-2.0
"""How a sentence encoder makes one vector of a text, by the files that came with it.

The files are those of sentence-transformers: modules.json lists what follows the encoder
(pooling, normalising), each with a folder that has its settings.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flaxlm.errors import DataError
from flaxlm.runs import IMPORTED_FILES, read_imported

MODULES, SETTINGS = "modules.json", "config.json"
PROMPTS, ENCODER_SETTINGS = "config_sentence_transformers.json", "sentence_bert_config.json"
# Files to keep of a checkpoint, as patterns below its folder.
FILES = (MODULES, PROMPTS, ENCODER_SETTINGS, f"[0-9]_*/{SETTINGS}")
# The vectors that a pooling may join, in sentence-transformers' order, and its settings.
KEYS = {
  "cls": "pooling_mode_cls_token",
  "max": "pooling_mode_max_tokens",
  "mean": "pooling_mode_mean_tokens",
  "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
  "weightedmean": "pooling_mode_weightedmean_tokens",
  "lasttoken": "pooling_mode_lasttoken",
}


class Pooling(NamedTuple):
  """How a text is read, and how its hidden vectors become one."""

  modes: tuple[str, ...] = ("mean",)  # of `KEYS`; their vectors are joined
  normalised: bool = False  # to length 1
  max_tokens: int | None = None  # what follows is cut off, special tokens apart
  lowercase: bool = False
  prompt: str = ""  # before every text


def load_pooling(run_dir: Path) -> Pooling:
  """The pooling of a run. Raises `DataError` for one that flaxlm does not have."""
  folder = run_dir / IMPORTED_FILES
  modules = read_imported(folder / MODULES, list) if (folder / MODULES).exists() else []
  pooling = Pooling()
  for number, module in enumerate(modules):
    if not isinstance(module, dict):
      raise DataError(f"{folder / MODULES}: module {number} is not an object")
    kind = str(module.get("type")).rpartition(".")[2]
    if kind == "Pooling":
      path = f"{module.get('path')}/{SETTINGS}"
      # Only these folders have been kept: the file leads nowhere else.
      if path not in {str(p.relative_to(folder)) for p in folder.glob(FILES[-1])}:
        raise DataError(f"{folder / path} is missing", "import the checkpoint again")
      pooling = pooling._replace(modes=read_modes(folder / path))
    elif kind == "Normalize" and number:
      pooling = pooling._replace(normalised=True)
    elif kind != "Transformer" or number:
      raise DataError(
        f"{folder / MODULES}: flaxlm has no module {kind!r} at place {number}",
        "it has Transformer, then Pooling and Normalize",
      )
  if not modules:
    return pooling
  said = read_if_there(folder / ENCODER_SETTINGS)
  most = said.get("max_seq_length")
  if most is not None and (type(most) is not int or most < 3):
    raise DataError(f"{folder / ENCODER_SETTINGS}: max_seq_length is {most!r}")
  return pooling._replace(
    max_tokens=most,
    lowercase=said.get("do_lower_case") is True,
    prompt=read_prompt(folder / PROMPTS),
  )


def read_modes(path: Path) -> tuple[str, ...]:
  said = read_imported(path, dict)
  named = said.get("pooling_mode")  # newer files have a name, or several
  named = [named] if isinstance(named, str) else named
  chosen = named if isinstance(named, list) else [m for m in KEYS if said.get(KEYS[m])]
  if not chosen or not all(mode in KEYS for mode in chosen):
    raise DataError(f"{path}: no pooling that flaxlm has", f"it has {', '.join(KEYS)}")
  return tuple(mode for mode in KEYS if mode in chosen)


def read_prompt(path: Path) -> str:
  """The text before every text: that of the default prompt's name, if there is one."""
  said = read_if_there(path)
  prompts, name = said.get("prompts"), said.get("default_prompt_name")
  if name is None:
    return ""
  if not isinstance(prompts, dict) or not isinstance(prompts.get(name), str):
    raise DataError(f"{path}: there is no prompt {name!r}")
  return prompts[name]


def read_if_there(path: Path) -> dict[str, Any]:
  return read_imported(path, dict) if path.exists() else {}


def pool(
  modes: tuple[str, ...], x_BTD: jax.Array, real_BT: jax.Array, lengths_B: jax.Array
) -> jax.Array:
  """One vector per row, (B, D) for each mode, of hidden vectors right-padded from
  `lengths_B` on."""
  x_BTD, real_BT1 = x_BTD.astype(jnp.float32), real_BT[..., None]
  sums_BD, lengths_B1 = (x_BTD * real_BT1).sum(1), lengths_B[:, None]
  weights_BT1 = real_BT1 * jnp.arange(1, x_BTD.shape[1] + 1)[:, None]
  vectors: Mapping[str, Any] = {
    "cls": lambda: x_BTD[:, 0],
    "max": lambda: jnp.where(real_BT1, x_BTD, -jnp.inf).max(1),
    "mean": lambda: sums_BD / lengths_B1,
    "mean_sqrt_len_tokens": lambda: sums_BD / jnp.sqrt(lengths_B1),
    "weightedmean": lambda: (x_BTD * weights_BT1).sum(1) / weights_BT1.sum(1),
    "lasttoken": lambda: x_BTD[jnp.arange(len(lengths_B)), lengths_B - 1],
  }
  return jnp.concatenate([vectors[mode]() for mode in modes], axis=-1)
