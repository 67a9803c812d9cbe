# SPDX-License-Identifier: Apache-2.0
"""Random runs of every family, in memory and on disk."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from meshes import mesh_of

from flaxlm.checkpoint.store import CheckpointStore
from flaxlm.config import OBJECTIVES, Config, DataConfig, ModelConfig, to_json
from flaxlm.decoding.loading import Run
from flaxlm.nn.models import abstract_params, build_model
from flaxlm.runs import CHECKPOINTS, CONFIG, TOKENIZER
from flaxlm.tokenizers import train_tokenizer

BYTES = train_tokenizer("byte", [], 0)
MASKED = train_tokenizer("byte", [], 0, masked=True)
FAMILIES = ("decoder", "encoder", "encoder_decoder", "rnn")
TINY: dict[str, Any] = dict(depth=2, width=16, num_heads=4, vocab_size=320, context=48)
# What would break out of a page that did not watch, and what no font shows.
HOSTILE = "</script><script>document.title='broken'</script><!-- & \u2028 \u202e $x$ é\t\n"


def make_run(family: str = "decoder", name: str = "random", **model: Any) -> Run:
  """A model with random parameters, large enough that it clearly prefers some tokens."""
  model_cfg = ModelConfig(**{"family": family} | TINY | model).resolve()
  data = DataConfig(objective=OBJECTIVES[family], seq_len=16)
  cfg = Config(name=name, model=model_cfg, data=data)
  lm = build_model(cfg.model)
  mesh = mesh_of()
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: (0.3 * rng.normal(size=x.shape)).astype(np.float32),
    abstract_params(lm, mesh),
  )
  tokenizer = MASKED if family == "encoder" else BYTES
  return Run(Path("nowhere"), cfg, tokenizer, 7, lm, params, mesh)


def save_run(run: Run, folder: Path) -> Path:
  """The run as a directory that the commands open."""
  folder.mkdir(parents=True)
  (folder / CONFIG).write_text(to_json(run.cfg))
  run.tokenizer.save(folder / TOKENIZER)
  store = CheckpointStore(folder / CHECKPOINTS)
  try:
    store.save(run.step, run.params, None, {"step": run.step})
  finally:
    store.close()
  return folder
