# SPDX-License-Identifier: Apache-2.0
"""An evaluation equals what can be counted by hand, for models that know frequencies only.

All parameters are zero but the head's bias, so that the logits are that bias everywhere.
"""

import jax
import numpy as np
import pytest

from flaxlm.config import DataConfig, ModelConfig
from flaxlm.data.batches import Batches
from flaxlm.data.prepare import TokenStore
from flaxlm.nn.models import abstract_params, build_model
from flaxlm.sharding import make_mesh
from flaxlm.tokenizers import AnyTokenizer, train_tokenizer
from flaxlm.training.evaluation import Evaluator

TEXTS = ["two words", "größer, länger", "an end"]
SIZES = dict(depth=1, width=4, num_heads=1, vocab_size=320, context=16, head_biased=True)


def store_of(tokenizer: AnyTokenizer) -> TokenStore:
  ids = [id_ for text in TEXTS for id_ in (tokenizer.bos_id, *tokenizer.encode(text))]
  return TokenStore(
    np.array(ids, np.uint16),
    tokenizer.bos_id,
    tokenizer.vocab_size,
    num_documents=len(TEXTS),
    num_bytes=sum(len(text.encode()) for text in TEXTS),
    gzip_bits_per_byte=7.5,
    mask_id=tokenizer.mask_id,
    special_ids=tokenizer.special_ids,
  )


def evaluated(cfg: ModelConfig, tokenizer: AnyTokenizer, bias_V, num_batches=None):
  """(what an evaluation says, the batches that it is of)."""
  mesh = make_mesh({"data": 8})
  model = build_model(cfg.resolve())
  params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract_params(model, mesh))
  params["head_bias"] = np.float32(bias_V)
  objective = {"decoder": "next_token", "encoder": "masked"}[cfg.family]
  data = DataConfig(objective=objective, seq_len=5, batch_size=8, mask_fraction=0.4)
  store = store_of(tokenizer)
  batches = Batches(store, data, vocab_size=store.vocab_size)
  return Evaluator(model, tokenizer, batches, num_batches, mesh)(params), batches


def test_nats_bits_and_bytes():
  """Every token but the first is a target; bos takes no bytes, a character up to two."""
  tokenizer = train_tokenizer("byte", TEXTS, 0)
  bias_V = np.random.default_rng(0).normal(size=SIZES["vocab_size"])
  values, _ = evaluated(ModelConfig(**SIZES), tokenizer, bias_V)
  store = store_of(tokenizer)
  nats = np.log(np.exp(bias_V).sum()) - bias_V[store.tokens[1:]]
  assert store.num_bytes == len(nats) - (len(TEXTS) - 1)
  assert values["eval/loss"] == pytest.approx(nats.mean(), rel=1e-5)
  assert values["eval/perplexity"] == pytest.approx(np.exp(nats.mean()), rel=1e-4)
  bits_per_byte = nats.sum() / np.log(2) / store.num_bytes
  assert values["eval/bits_per_byte"] == pytest.approx(bits_per_byte, rel=1e-5)
  assert values["eval/gzip_bits_per_byte"] == 7.5


def test_the_share_of_masks_filled_rightly():
  """By a model that fills in one and the same token; of masked tokens, of no others."""
  tokenizer = train_tokenizer("byte", TEXTS, 0, True)
  bias_V = np.zeros(SIZES["vocab_size"])
  bias_V[tokenizer.encode("r")] = 2.0
  cfg = ModelConfig(family="encoder", **SIZES)
  values, batches = evaluated(cfg, tokenizer, bias_V)
  batch = batches[0]
  targets = batch.targets_BT[batch.weights_BT > 0]
  (rights,) = np.nonzero(targets == tokenizer.encode("r")[0])
  assert batches.num_batches == 1
  assert 0 < len(rights) < len(targets) < batch.tokens_BT.size
  assert values["eval/accuracy"] == pytest.approx(len(rights) / len(targets))
  assert "eval/bits_per_byte" not in values
