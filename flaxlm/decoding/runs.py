# SPDX-License-Identifier: Apache-2.0
"""Opening a run directory: its config, tokenizer and parameters, ready to use."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from flaxlm.checkpoint.manifest import newest_whole_step, saved_steps
from flaxlm.checkpoint.store import CheckpointStore
from flaxlm.config import ResolvedConfig, from_json
from flaxlm.decoding.weights import prepare_params
from flaxlm.errors import CheckpointError, ConfigError
from flaxlm.nn.base import LanguageModel
from flaxlm.nn.models import abstract_params, build_model
from flaxlm.platform import kernel_head_dim
from flaxlm.tokenizers import AnyTokenizer, load_tokenizer

CONFIG, TOKENIZER, CHECKPOINTS = "config.json", "tokenizer.json", "checkpoints"
METRICS, LOG, SAMPLE = "metrics.jsonl", "log.txt", "sample.txt"
KEPT = "huggingface"  # an imported run's folder of the files that came along


class Run(NamedTuple):
  """A trained model, as stored at one step, and what it needs to read and write text."""

  path: Path
  cfg: ResolvedConfig
  tokenizer: AnyTokenizer
  step: int
  model: LanguageModel
  params: Any
  mesh: Mesh
  draft: Any = None  # a `Draft`, who guesses for this run


def ready(run: Run, weights: str | None = None, narrow_cache: bool = False) -> Run:
  """The run with its parameters as decoding reads them fastest, for many calls.

  `weights` is what its matrices are kept as: bfloat16 is also computed in, int8 is not.
  Raises `ConfigError` for what an RNN has not.
  """
  model = run.model
  if run.cfg.model.family == "rnn" and (weights or narrow_cache):
    raise ConfigError("an RNN has no narrow weights or cache", "leave the flags out")
  execution = dataclasses.replace(model.run, narrow_cache=narrow_cache)
  if weights == "bfloat16":
    execution = dataclasses.replace(execution, dtype=jnp.dtype("bfloat16"))
  with jax.set_mesh(run.mesh):
    params = prepare_params(run.params, model.cfg, weights)
  return run._replace(params=params, model=model.clone(run=execution))


def find_run(path: str | None, runs_dir: str = "runs") -> Path:
  """`path`, or the run under `runs_dir` with the newest checkpoint.

  Raises `CheckpointError`, with what is there, if there is nothing to open.
  """
  if path is not None:
    candidates = [Path(path), Path(runs_dir) / path]
    for candidate in candidates:
      if (candidate / CONFIG).is_file():
        return candidate
    names = ", ".join(sorted(run.name for run in _runs(Path(runs_dir)))) or "none"
    raise CheckpointError(f"{path} is not a run directory", f"runs here: {names}")
  runs = [run for run in _runs(Path(runs_dir)) if saved_steps(run / CHECKPOINTS)]
  if not runs:
    raise CheckpointError(f"no trained run below {runs_dir}/", "python train.py makes one")
  return max(runs, key=lambda run: (run / CHECKPOINTS).stat().st_mtime)


def _runs(runs_dir: Path) -> list[Path]:
  return [path.parent for path in runs_dir.glob(f"*/{CONFIG}")]


def load_config_of(path: Path) -> ResolvedConfig:
  """The resolved config of a run directory; `CheckpointError` if it is unreadable."""
  try:
    return from_json((path / CONFIG).read_text("utf-8"), str(path / CONFIG)).resolve()
  except (OSError, ValueError, ConfigError) as e:
    raise CheckpointError(f"{path / CONFIG} cannot be read: {e}") from e


def load_run(path: Path, mesh: Mesh, warn: Any = None, needs_text: bool = True) -> Run:
  """The newest whole checkpoint of a run, its parameters sharded over `mesh`.

  Without `needs_text` it may lack a tokenizer, which then is None: an imported one can.
  Raises `CheckpointError` when there is none, or it does not fit its own config.
  """
  cfg = load_config_of(path)
  step = newest_whole_step(path / CHECKPOINTS, warn)
  if step is None:
    raise CheckpointError(f"{path} has no checkpoint yet", "train it first")
  tokenizer: Any = None
  if needs_text or (path / TOKENIZER).exists():
    tokenizer = load_tokenizer(path / TOKENIZER)
  model = build_model(cfg.model, cfg.training, kernel_head_dim())
  store = CheckpointStore(path / CHECKPOINTS)
  try:
    params = store.restore(step, params=abstract_params(model, mesh))["params"]
  finally:
    store.close()
  return Run(path, cfg, tokenizer, step, model, params, mesh)
