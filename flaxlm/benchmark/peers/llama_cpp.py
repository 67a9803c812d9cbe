# SPDX-License-Identifier: Apache-2.0
"""llama.cpp with our weights, greedily, through the GGUF that `flaxlm export` writes."""

import itertools
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from flaxlm.config import ResolvedConfig
from flaxlm.decoding.loading import Run
from flaxlm.interop.gguf import export_gguf
from flaxlm.nn.base import LanguageModel
from flaxlm.sharding import make_mesh
from flaxlm.tokenizers import train_tokenizer


def load_llama_cpp(
  cfg: ResolvedConfig, model: LanguageModel, params: Any
) -> Callable[..., np.ndarray]:
  """A function that answers one prompt, with weights in our dtype, on every core."""
  # A GGUF file must have a tokenizer, although only ids go in and come out here.
  tokenizer = train_tokenizer("byte", [], 0)
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "model.gguf"
    mesh = make_mesh({"data": -1})
    export_gguf(Run(Path(folder), cfg, tokenizer, 0, model, params, mesh), path, None)
    threads = len(os.sched_getaffinity(0))
    peer = llama_cpp.Llama(
      str(path),
      n_ctx=cfg.model.context,
      n_threads=threads,
      n_threads_batch=threads,
      verbose=False,
      use_mmap=False,  # because the file is deleted
    )

  def answer(prompts: Sequence[Sequence[int]], new: int) -> np.ndarray:
    peer.reset()  # or it would reuse the prompt's cache
    (ids,) = prompts
    tokens = peer.generate([*ids], temp=0.0, top_k=1, repeat_penalty=1.0)
    return np.array([[*itertools.islice(tokens, new)]])

  return answer
