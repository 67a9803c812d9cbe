# SPDX-License-Identifier: Apache-2.0
"""An evaluation equals what can be counted by hand, for models that know frequencies only.

All parameters are zero but the head's bias, so that the logits are that bias everywhere.
"""

import jax
import numpy as np
import pytest

from flaxlm.config import Config, DataConfig, ModelConfig
from flaxlm.data.batches import Batches
from flaxlm.data.prepare import TokenStore
from flaxlm.nn.models import abstract_params, build_model
from flaxlm.sharding import make_mesh
from flaxlm.tokenizers import AnyTokenizer, train_tokenizer
from flaxlm.training.evaluation import Evaluator, split_batches

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
  data = DataConfig(objective=objective, seq_len=3, batch_size=8, mask_fraction=0.7)
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


def test_some_batches_are_the_first_ones():
  """And what gzip made of the whole text is then left out."""
  tokenizer = train_tokenizer("byte", TEXTS, 0)
  bias_V = np.random.default_rng(0).normal(size=SIZES["vocab_size"])
  values, _ = evaluated(ModelConfig(**SIZES), tokenizer, bias_V, num_batches=1)
  targets = store_of(tokenizer).tokens[1 : 1 + 8 * 3]
  nats = np.log(np.exp(bias_V).sum()) - bias_V[targets]
  assert values["eval/loss"] == pytest.approx(nats.mean(), rel=1e-5)
  assert "eval/gzip_bits_per_byte" not in values


def test_training_is_shuffled_by_the_seed_and_evaluation_is_in_order():
  tokenizer = train_tokenizer("byte", TEXTS, 0)
  store, mesh = store_of(tokenizer), make_mesh({"data": 8})

  def rows(seed: int, shuffled: bool) -> list:
    data = DataConfig(seq_len=3, batch_size=8)
    cfg = Config(seed=seed, data=data, model=ModelConfig(**SIZES)).resolve()
    return split_batches(cfg, store, mesh, shuffled)[0].tokens_BT.tolist()

  ordered = np.reshape(store.tokens[: 8 * 3], (8, 3)).tolist()
  assert rows(0, False) == rows(1, False) == ordered
  assert rows(0, True) == rows(0, True)
  assert len({str(rows(seed, True)) for seed in range(3)} | {str(ordered)}) == 4


def test_the_share_of_masks_filled_rightly():
  """By a model that always fills in one token. What was not masked does not count."""
  tokenizer = train_tokenizer("byte", TEXTS, 0, True)
  bias_V = np.zeros(SIZES["vocab_size"])
  bias_V[tokenizer.encode("r")] = 2.0
  cfg = ModelConfig(family="encoder", **SIZES)
  values, batches = evaluated(cfg, tokenizer, bias_V)
  targets = np.concatenate(
    [b.targets_BT[b.weights_BT > 0] for b in map(batches.__getitem__, (0, 1))]
  )
  (rights,) = np.nonzero(targets == tokenizer.encode("r")[0])
  assert batches.num_batches == 2
  assert 0 < len(rights) < len(targets) < len(store_of(tokenizer).tokens)
  assert values["eval/accuracy"] == pytest.approx(len(rights) / len(targets))
  assert "eval/bits_per_byte" not in values
