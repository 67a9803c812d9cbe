# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's transformers, with our weights: greedy answers side by side."""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from flaxlm.benchmark.decode import compared, random_request, same_tokens
from flaxlm.benchmark.measure import Setting, Side
from flaxlm.benchmark.report import Result
from flaxlm.config import Config
from flaxlm.decoding.generate import generate
from flaxlm.decoding.sampling import make_sampling
from flaxlm.decoding.weights import prepare_params
from flaxlm.interop.families import FAMILIES
from flaxlm.interop.huggingface import save_checkpoint
from flaxlm.nn.base import LanguageModel


def bench_against_transformers(
  cfg: Config, model: LanguageModel, params: Any, lengths: tuple[int, int], setting: Setting
) -> list[Result]:
  """Whole answers, by batch, against `generate` with PyTorch's best attention."""
  prompt, new = lengths
  prepared = prepare_params(params, cfg.model)
  peer = load_peer(cfg, params)
  results = []
  for batch in setting.pick((2,), (1, 4), (1, 8)):
    request = random_request(cfg, batch, prompt, new)
    greedy = make_sampling(batch, temperature=0.0)
    ours = Side(
      lambda request=request, greedy=greedy: np.concatenate(
        [block.tokens_BT for block in generate(model, prepared, request, greedy)], 1
      )
    )
    ids = torch.tensor(request.prompts, device=peer.device)
    theirs = Side(lambda ids=ids: answer(peer, ids, new))
    sides = ours, {"transformers": theirs}
    results += compared(cfg, sides, (batch, prompt, new), same_tokens, setting)
  return results


def load_peer(cfg: Config, params: Any) -> Any:
  """Our weights as a LLaMA of theirs, through the files that `flaxlm export` writes."""
  transformers.utils.logging.set_verbosity_error()
  transformers.utils.logging.disable_progress_bar()
  with tempfile.TemporaryDirectory() as folder:
    keys = save_checkpoint(
      Path(folder), cfg.model, params, FAMILIES["llama"], cfg.training.dtype, 2**40
    )
    (Path(folder) / "config.json").write_text(json.dumps(keys), "utf-8")
    peer = transformers.AutoModelForCausalLM.from_pretrained(
      folder, dtype=getattr(torch, cfg.training.dtype), attn_implementation="sdpa"
    )
  return peer.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def answer(peer: Any, ids: torch.Tensor, new: int) -> np.ndarray:
  options = dict(do_sample=False, max_new_tokens=new, min_new_tokens=new, pad_token_id=0)
  with torch.inference_mode():
    out = peer.generate(ids, attention_mask=torch.ones_like(ids), **options)
  return out[:, ids.shape[1] :].cpu().numpy()
