# SPDX-License-Identifier: Apache-2.0
"""Every family that generates, against `transformers`: the same tokens, with a cache."""

import dataclasses

import numpy as np
import pytest
from conftest import BESIDE_TRANSFORMERS
from test_parity import load, rows
from tiny_models import VARIANTS, tiny

from flaxlm.decoding.generate import generate
from flaxlm.decoding.prefill import Request
from flaxlm.decoding.sampling import make_sampling
from flaxlm.nn.models import build_model

pytestmark = BESIDE_TRANSFORMERS

NEW_TOKENS = 64


@pytest.mark.parametrize("variant", [name for name, v in VARIANTS.items() if v.greedy])
def test_greedy_generations_are_the_same(variant: str):
  import torch

  made = tiny(variant)
  loaded = load(made)
  model = build_model(loaded.cfg)
  tokens, _ = rows(variant)
  prompts = [tokens[0, :9].tolist(), tokens[1, :5].tolist()]
  reads = loaded.cfg.family == "encoder_decoder"
  expected = []
  for prompt in prompts:
    ids = torch.tensor([prompt])
    made.model.generation_config.eos_token_id = None
    whole = made.model.generate(
      ids,
      attention_mask=torch.ones_like(ids),
      do_sample=False,
      max_new_tokens=NEW_TOKENS,
      # With a cache theirs wants an encoder as deep as the decoder.
      **({"decoder_start_token_id": 0, "use_cache": False} if reads else {}),
    )
    expected.append(whole[0, 1 if reads else len(prompt) :].tolist())
  request = Request(prompts, NEW_TOKENS, 67)
  if reads:
    request = dataclasses.replace(request, prompts=[[0], [0]], sources=prompts)
  blocks = generate(model, loaded.params, request, make_sampling(2, temperature=0))
  found = np.concatenate([block.tokens_BT for block in blocks], 1).tolist()
  assert found == expected
