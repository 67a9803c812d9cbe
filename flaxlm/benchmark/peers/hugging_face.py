# SPDX-License-Identifier: Apache-2.0
"""transformers' greedy `generate` with our weights, on PyTorch's fused attention."""

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from flaxlm.config import ResolvedConfig
from flaxlm.interop.families import FAMILIES
from flaxlm.interop.huggingface import save_checkpoint


def load_transformers(cfg: ResolvedConfig, params: Any) -> Callable[..., np.ndarray]:
  """A function that answers prompts of one length; their GPT-2 gets our weights through the
  files that `flaxlm export` writes."""
  transformers.utils.logging.set_verbosity_error()
  transformers.utils.logging.disable_progress_bar()
  dtype = cfg.training.dtype
  with tempfile.TemporaryDirectory() as folder:
    keys = save_checkpoint(Path(folder), cfg.model, params, FAMILIES["gpt2"], dtype, 2**40)
    (Path(folder) / "config.json").write_text(json.dumps(keys, allow_nan=False), "utf-8")
    peer = transformers.AutoModelForCausalLM.from_pretrained(
      folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    )
  peer = peer.eval().to("cuda" if torch.cuda.is_available() else "cpu")

  def answer(prompts: Sequence[Sequence[int]], new: int) -> np.ndarray:
    ids = torch.tensor(prompts, device=peer.device)
    options = dict(do_sample=False, max_new_tokens=new, min_new_tokens=new, pad_token_id=0)
    with torch.inference_mode():
      out = peer.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return out[:, ids.shape[1] :].cpu().numpy()

  return answer
