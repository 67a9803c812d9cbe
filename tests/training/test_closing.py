# SPDX-License-Identifier: Apache-2.0
"""The last words of a run, whatever its prompt and its name are."""

import dataclasses
import shlex
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from meshes import mesh_of

from flaxlm.config import Config, ModelConfig, TrainingConfig
from flaxlm.decoding.loading import Run
from flaxlm.nn.models import abstract_params, build_model
from flaxlm.tokenizers import train_tokenizer
from flaxlm.training.closing import show_sample


def said(folder: Path, prompt: str) -> str:
  """What a run logs at its end."""
  model_cfg = ModelConfig(depth=1, width=8, num_heads=1, vocab_size=257, context=160)
  cfg = Config(name="x", runs_dir=str(folder.parent), model=model_cfg).resolve(257)
  cfg = dataclasses.replace(cfg, training=TrainingConfig(sample_prompt=prompt))
  model, mesh = build_model(cfg.model), mesh_of()
  params = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), abstract_params(model, mesh))
  run = Run(folder, cfg, train_tokenizer("byte", [], 257), 3, model, params, mesh)
  lines: list[str] = []
  show_sample(
    run, SimpleNamespace(end_progress=lambda: None, log=lines.append, writes=True)
  )
  return "\n".join(lines)


@pytest.mark.parametrize("prompt", ["a", 'a "b" $HOME'])
def test_what_to_try_next_can_be_copied(tmp_path: Path, capsys, prompt: str):
  folder = tmp_path / "my run $x"
  folder.mkdir()
  line = said(folder, prompt).split("next, try:\n")[1].splitlines()[0]
  assert shlex.split(line) == ["python", "infer.py", str(folder), "--prompt", prompt]
  assert capsys.readouterr().out.startswith(prompt)


def test_a_prompt_that_does_not_fit_costs_the_sample_alone(tmp_path: Path, capsys):
  """It ended the command with code 2, after all of the training."""
  log = said(tmp_path, "a" * 200)
  assert "no sample of training.sample_prompt: prompt of 201 tokens" in log
  assert "next, try:" in log and not capsys.readouterr().out
