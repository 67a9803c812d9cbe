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

from flaxlm.benchmark.data import python_sources
from flaxlm.config import ResolvedConfig
from flaxlm.decoding.loading import Run
from flaxlm.interop.gguf import export_gguf
from flaxlm.nn.base import LanguageModel
from flaxlm.sharding import make_mesh
from flaxlm.tokenizers import train_tokenizer


def load(
  cfg: ResolvedConfig, model: LanguageModel, params: Any
) -> Callable[..., np.ndarray]:
  """Answers one prompt, the weights in our dtype, on as many threads as cores."""
  # A GGUF has a tokenizer, though ids go in and ids come out here.
  size = min(4096, cfg.model.vocab_size)
  tokenizer = train_tokenizer("bpe", python_sources(100_000), size)
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
      use_mmap=False,  # the file goes
    )

  def answer(prompts: Sequence[Sequence[int]], new: int) -> np.ndarray:
    peer.reset()  # else it would remember the prompt
    (ids,) = prompts
    tokens = peer.generate([*ids], temp=0.0, top_k=1, repeat_penalty=1.0)
    return np.array([[*itertools.islice(tokens, new)]])

  return answer
