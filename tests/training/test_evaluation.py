# SPDX-License-Identifier: Apache-2.0
"""An evaluation equals what can be counted by hand, for models that know frequencies only.

All parameters are zero but the head's bias, so that the logits are that bias everywhere.
"""

import itertools
import types
from typing import Any

import jax
import numpy as np
import pytest
from parameters import random_params
from tiny_tokenizers import bert

from flaxlm.config import Config, DataConfig, ModelConfig
from flaxlm.data.batches import Batches
from flaxlm.data.corpus import WHOLE
from flaxlm.data.stores import MixedStore, TokenStore
from flaxlm.nn.models import abstract_params, build_model
from flaxlm.sharding import make_mesh
from flaxlm.tokenizers import AnyTokenizer, ImportedTokenizer, Specials, train_tokenizer
from flaxlm.training.evaluation import (
  Evaluator,
  batches_by_source,
  describe_evaluation,
  scored,
  split_batches,
)

TEXTS = ["two words", "größer, länger", "an end"]
SIZES = dict(depth=1, width=4, num_heads=1, vocab_size=320, context=16, head_biased=True)


def store_of(tokenizer: AnyTokenizer, texts: list[str] = TEXTS) -> TokenStore:
  ids = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts]
  return TokenStore(
    np.concatenate(ids).astype(np.uint16),
    np.cumsum([0, *map(len, ids)]),
    end_id=tokenizer.eos_id,
    vocab_size=tokenizer.vocab_size,
    num_bytes=sum(len(text.encode()) for text in texts),
    gzip_bits_per_byte=7.5,
    mask_id=tokenizer.mask_id,
    special_ids=tokenizer.special_ids,
  )


def evaluated(
  cfg: ModelConfig, tokenizer: AnyTokenizer, bias_V, num_batches=None, store=None
):
  """(what an evaluation says, the batches that it is of)."""
  mesh = make_mesh({"data": 8})
  model = build_model(cfg.resolve())
  params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract_params(model, mesh))
  params["head_bias"] = np.float32(bias_V)
  objective = {"decoder": "next_token", "encoder": "masked"}[cfg.family]
  data = DataConfig(objective=objective, seq_len=3, batch_size=8, mask_fraction=0.7)
  store = store or store_of(tokenizer)
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


@pytest.mark.parametrize("num_batches", [None, 1])
def test_what_is_unknown_costs_eight_bits_a_byte(num_batches: int | None):
  """Its token alone could cost nothing: a model soon learns where it stands."""
  texts = ["a b a qqq b", "b a zzz\n", "qqq b a a"]
  tokenizer = train_tokenizer("word", ["a b a b a b"], 4 + 1)
  store = store_of(tokenizer, texts)
  size = -(-tokenizer.vocab_size // 64) * 64
  bias_V = np.random.default_rng(0).normal(size=size)
  cfg = ModelConfig(**SIZES | dict(vocab_size=size))
  values, _ = evaluated(cfg, tokenizer, bias_V, num_batches, store)
  targets = store.tokens[1:] if num_batches is None else store.tokens[1 : 1 + 8 * 3]
  nats = np.log(np.exp(bias_V).sum()) - bias_V[targets]
  unknown = targets == tokenizer.unknown_id
  assert values["eval/unknown"] == pytest.approx(unknown.mean())
  text = "".join(texts)
  lost = len(text) - tokenizer.token_bytes()[store.tokens].sum()
  assert lost == len(" qqq" + "b" + " zzz\n" + "qqq")
  bits = nats.sum() / np.log(2) + 8 * lost
  assert values["eval/bits_per_byte"] == pytest.approx(bits / len(text), rel=1e-5)
  assert "unknown, at 8 bits for each" in describe_evaluation(values)


def test_a_part_of_what_is_unknown_is_charged_at_its_mean():
  texts = ["a b a qqq b a", "b a zzzzz a b a b a b a b a b a b a b b a b a b a b a"]
  tokenizer = train_tokenizer("word", ["a b a b a b"], 4 + 1)
  store = store_of(tokenizer, texts)
  mesh = make_mesh({"data": 8})
  batches = Batches(store, DataConfig(seq_len=1, batch_size=8), vocab_size=store.vocab_size)
  model = build_model(ModelConfig(**SIZES | dict(vocab_size=64)).resolve())
  evaluator = Evaluator(model, tokenizer, batches, 1, mesh)
  known = tokenizer.token_bytes()[store.tokens[1:9]].sum()
  assert np.sum(store.tokens[1:9] == tokenizer.unknown_id) == 2
  mean = (len(" qqq") + len("b") + len(" zzzzz")) / 3
  assert evaluator.num_bytes == known + round(2 * mean)


END = "<|im_end|>"


def chat_tokenizer() -> ImportedTokenizer:
  """With no bos of its own, as many have: the end of text stands in."""
  backend = train_tokenizer("byte", [], 0)._backend
  backend.encode_special_tokens = False
  backend.add_special_tokens([END])
  return ImportedTokenizer(backend, Specials(eos_ids=(257,)))


def test_a_special_token_in_a_text_ends_nothing():
  """The loss is that of each document read by itself, from its first token to its end."""
  tokenizer = chat_tokenizer()
  texts = [f"hi{END} and{END}", f"{END}ho{END}"]
  cfg = ModelConfig(**SIZES | dict(head_biased=False)).resolve()
  mesh, model = make_mesh({"data": 8}), build_model(cfg)
  params = random_params(model, spread=1.0)
  store = store_of(tokenizer, texts)
  data = DataConfig(seq_len=16, batch_size=8)
  batches = Batches(store, data, vocab_size=store.vocab_size)
  values = Evaluator(model, tokenizer, batches, None, mesh)(params)
  rows = [store.tokens[a:b].tolist() for a, b in itertools.pairwise(store.bounds)]
  tokens_BT = np.array(
    [(ids + 16 * [0])[:16] for ids in rows]
  )  # what comes later is unseen
  forward = jax.jit(lambda params, tokens_BT: model.apply(params, tokens_BT).value)
  logits_BTV = np.float64(forward({"params": params}, tokens_BT))[..., : cfg.num_ids]
  nats = []
  for ids, logits_TV in zip(rows, logits_BTV, strict=True):
    for id_, logits_V in zip([*ids[1:], tokenizer.eos_id], logits_TV, strict=False):
      nats.append(np.log(np.exp(logits_V).sum()) - logits_V[id_])
  assert len(nats) == store.num_tokens <= 1 + data.seq_len
  assert values["eval/loss"] == pytest.approx(np.mean(nats[:-1]), rel=1e-5)


@pytest.mark.parametrize("num_batches", [None, 1, 2])
def test_special_tokens_in_a_text_count_their_bytes_as_they_count_their_loss(num_batches):
  """What ends a document has none, though here it is the same id."""
  tokenizer = chat_tokenizer()
  texts = [f"a{END}é", f"{END}{END}{END} and more than two rows", f"end {END}"]
  store = store_of(tokenizer, texts)
  bias_V = np.random.default_rng(0).normal(size=SIZES["vocab_size"])
  cfg = ModelConfig(**SIZES)
  values, _ = evaluated(cfg, tokenizer, bias_V, num_batches, store)
  count = 24 * (num_batches or 99)
  nats = np.log(np.exp(bias_V).sum()) - bias_V[store.tokens[1 : 1 + count]]
  ids = [i for text in texts for i in (None, *tokenizer.encode(text))][1 : 1 + count]
  sizes = [0 if i is None else len(END) if i == 257 else 1 for i in ids]
  assert values["eval/bits_per_byte"] == pytest.approx(
    nats.sum() / np.log(2) / sum(sizes), rel=1e-5
  )
  assert num_batches is not None or sum(sizes) == store.num_bytes


def test_the_bytes_of_a_whole_text_are_known_whatever_its_tokens_stand_for():
  """Of a tokenizer that knows no capital letters and drops what it does not know."""
  tokenizer = ImportedTokenizer(bert(), Specials(bos_id=2, eos_ids=(3,)))
  store = store_of(tokenizer, ["The CAT  sat", "漢字 \n\n the cat"])
  bias_V = np.random.default_rng(0).normal(size=SIZES["vocab_size"])
  values, _ = evaluated(ModelConfig(**SIZES), tokenizer, bias_V, None, store)
  targets = np.where(np.isin(np.arange(store.num_tokens), store.bounds), 3, store.tokens)
  nats = np.log(np.exp(bias_V).sum()) - bias_V[targets[1:]]
  assert values["eval/loss"] == pytest.approx(nats.mean(), rel=1e-5)
  bits = nats.sum() / np.log(2) + 8 * (store.num_bytes - len("thecatsatthecat"))
  assert values["eval/bits_per_byte"] == pytest.approx(bits / store.num_bytes, rel=1e-5)


@pytest.mark.parametrize(
  ("corpus", "split", "expected"),
  [
    (None, None, ("stdlib", "validation")),
    (None, "train", ("stdlib", "train")),
    ("files:a", None, ("files:a", WHOLE)),
    ("files:a", "validation", ("files:a", "validation")),
    ("stdlib", None, ("stdlib", WHOLE)),
  ],
)
def test_a_corpus_that_is_named_is_scored_whole(corpus, split, expected):
  lines: list[str] = []
  run = types.SimpleNamespace(path="runs/a", cfg=Config(), step=3)
  assert scored(run, corpus, split, lines.append) == expected
  assert bool(lines) == (corpus == "stdlib"), "what the run has learnt from is in it"
  run.step = 0  # imported
  assert scored(run, corpus, split, lines.clear) == expected


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


def test_a_mixture_is_evaluated_by_source_and_together():
  """Each source has the figures that it has alone; together every token counts alike."""
  tokenizer = train_tokenizer("byte", TEXTS, 0)
  bias_V = np.random.default_rng(0).normal(size=SIZES["vocab_size"])
  stores = {"stdlib": store_of(tokenizer), "files:a b/*": store_of(tokenizer, ["é" * 40])}
  cfg = Config(data=DataConfig(seq_len=3, batch_size=8), model=ModelConfig(**SIZES))
  mesh = make_mesh({"data": 8})
  batches = batches_by_source(cfg.resolve(), MixedStore(stores, (99, 1)), mesh)
  model = build_model(cfg.model.resolve())
  params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract_params(model, mesh))
  params["head_bias"] = np.float32(bias_V)

  def figures(batches: Any, num_batches: int | None = None) -> dict[str, float]:
    return Evaluator(model, tokenizer, batches, num_batches, mesh)(params)

  values = figures(batches)
  alone = {name: figures(batches[name]) for name in stores}
  nats = num_tokens = num_bytes = 0
  for name, store in stores.items():
    for key, value in alone[name].items():
      assert values[f"{key}/{name}"] == value
    nats += alone[name]["eval/loss"] * (store.num_tokens - 1)
    num_tokens += store.num_tokens - 1
    num_bytes += store.num_bytes
  assert values["eval/loss"] == pytest.approx(nats / num_tokens)
  assert values["eval/bits_per_byte"] == pytest.approx(nats / np.log(2) / num_bytes)
  assert values["eval/gzip_bits_per_byte"] == pytest.approx(7.5)
  line = describe_evaluation(values)
  assert f"stdlib {values['eval/loss/stdlib']:.3f}, files:a b/* " in line
  first = figures(batches, 1)
  for name in stores:
    assert first[f"eval/loss/{name}"] == figures(batches[name], 1)["eval/loss"]
  assert "eval/gzip_bits_per_byte" not in first
