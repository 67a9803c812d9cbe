# SPDX-License-Identifier: Apache-2.0
"""llama.cpp with our weights, through the GGUF that `flaxlm export` writes: greedy answers
to one prompt, side by side."""

import itertools
import os
import tempfile
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from flaxlm.benchmark.data import python_sources
from flaxlm.benchmark.decode import compared, random_request, same_tokens
from flaxlm.benchmark.measure import Setting, Side
from flaxlm.benchmark.report import Result
from flaxlm.config import Config
from flaxlm.decoding.generate import generate
from flaxlm.decoding.runs import Run
from flaxlm.decoding.sampling import make_sampling
from flaxlm.decoding.weights import prepare_params
from flaxlm.interop.gguf import export_gguf
from flaxlm.nn.base import LanguageModel
from flaxlm.sharding import make_mesh
from flaxlm.tokenizers import train_tokenizer


def bench_against_llama_cpp(
  cfg: Config, model: LanguageModel, params: Any, lengths: tuple[int, int], setting: Setting
) -> list[Result]:
  """Whole answers of one row, the weights in our dtype, on as many threads as cores."""
  prompt, new = lengths
  prepared = prepare_params(params, cfg.model)
  peer = load_peer(cfg, model, params)
  request = random_request(cfg, 1, prompt, new)
  greedy = make_sampling(1, temperature=0.0)
  ours = Side(
    lambda: np.concatenate(
      [block.tokens_BT for block in generate(model, prepared, request, greedy)], 1
    )
  )
  theirs = Side(lambda: answer(peer, [*request.prompts[0]], new))
  sides = ours, {"llama.cpp": theirs}
  return compared(cfg, sides, (1, prompt, new), same_tokens, setting)


def load_peer(cfg: Config, model: LanguageModel, params: Any) -> Any:
  # A GGUF has a tokenizer, though ids go in and ids come out here.
  texts = python_sources(100_000)
  assert cfg.model.vocab_size is not None
  tokenizer = train_tokenizer("bpe", texts, max(257, cfg.model.vocab_size))
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "model.gguf"
    mesh = make_mesh({"data": -1})
    export_gguf(Run(Path(folder), cfg, tokenizer, 0, model, params, mesh), path, None)
    threads = len(os.sched_getaffinity(0))
    return llama_cpp.Llama(
      str(path),
      n_ctx=cfg.model.context,
      n_threads=threads,
      n_threads_batch=threads,
      verbose=False,
      use_mmap=False,  # the file goes
    )


def answer(peer: Any, ids: list[int], new: int) -> np.ndarray:
  peer.reset()  # else it would remember the prompt
  tokens = peer.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0)
  return np.array([[*itertools.islice(tokens, new)]])
