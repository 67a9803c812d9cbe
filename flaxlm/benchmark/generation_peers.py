# SPDX-License-Identifier: Apache-2.0
"""The peers of the generation benchmark, with our weights: transformers' `generate`."""

from collections.abc import Callable

import numpy as np
import torch
import transformers

from flaxlm.benchmark.generation import MODEL, NEW_TOKENS, prompts, weights


@torch.no_grad()
def transformers_side(batch: int) -> Callable[[], list[list[int]]]:
  """GPT-2 in float32, greedy, with its own cache; every core is used."""
  model = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
  model.generation_config.eos_token_id = None  # every row has its full length
  put = lambda to, array: to.copy_(torch.from_numpy(np.ascontiguousarray(array)))
  work, D = weights(), MODEL.width
  gpt = model.transformer
  put(gpt.wte.weight, work["embedding/table"])
  put(gpt.wpe.weight, work["positions/table"])
  put(gpt.ln_f.weight, work["final_norm/scale"])
  put(gpt.ln_f.bias, work["final_norm/bias"])
  for n, block in enumerate(gpt.h):
    of = lambda name, n=n: work[f"blocks/{name}"][n]
    kernels = [of(f"attention/{name}/kernel").reshape(D, D) for name in "qkv"]
    biases = [of(f"attention/{name}/bias").reshape(D) for name in "qkv"]
    put(block.attn.c_attn.weight, np.concatenate(kernels, 1))
    put(block.attn.c_attn.bias, np.concatenate(biases))
    put(block.attn.c_proj.weight, of("attention/o/kernel").reshape(D, D))
    put(block.attn.c_proj.bias, of("attention/o/bias"))
    for theirs, ours in ((block.mlp.c_fc, "up"), (block.mlp.c_proj, "down")):
      put(theirs.weight, of(f"ffn/{ours}/kernel"))
      put(theirs.bias, of(f"ffn/{ours}/bias"))
    for theirs, ours in ((block.ln_1, "attention_norm"), (block.ln_2, "ffn_norm")):
      put(theirs.weight, of(f"{ours}/scale"))
      put(theirs.bias, of(f"{ours}/bias"))
  tokens = torch.tensor(prompts(batch))

  def run() -> list[list[int]]:
    whole = model.generate(
      tokens,
      attention_mask=torch.ones_like(tokens),
      max_new_tokens=NEW_TOKENS,
      do_sample=False,
      pad_token_id=0,
    )
    return whole[:, tokens.shape[1] :].tolist()

  return run


PEER_SIDES = {"transformers": transformers_side}
