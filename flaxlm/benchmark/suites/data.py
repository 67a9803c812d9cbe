# SPDX-License-Identifier: Apache-2.0
"""The input pipeline, on the host: text to ids, and ids to batches through Grain.

The text is the source of Python's standard library. No accelerator takes part.
"""

import tempfile
from pathlib import Path

import numpy as np

from flaxlm.benchmark.measure import (
  BenchOptions,
  Side,
  agree,
  measure_alone,
  timed,
  wrong_result,
)
from flaxlm.benchmark.report import Result
from flaxlm.benchmark.texts import python_sources
from flaxlm.config import DataConfig
from flaxlm.data.batches import Batches
from flaxlm.data.stores import TokenStore
from flaxlm.tokenizers import Tokenizer, train_tokenizer

BATCHES = 50  # per call


def bench_data(options: BenchOptions) -> list[Result]:
  """Training a tokenizer, encoding with it, and making batches by index and ahead."""
  texts = python_sources(options.pick(20_000, 2_000_000, 8_000_000))
  vocab_size = options.pick(300, 4096, 32_000)
  results, tokenizer = bench_tokenizer(texts, vocab_size, options)
  ids = [np.append(tokenizer.bos_id, x) for x in tokenizer.encode_batch(texts)]
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "tokens.npy"
    np.save(path, np.concatenate(ids).astype(np.uint16), allow_pickle=False)
    store = TokenStore(
      tokens=np.load(path, mmap_mode="r"),
      bounds=np.cumsum([0, *map(len, ids)]),
      end_id=tokenizer.eos_id,
      vocab_size=tokenizer.vocab_size,
      num_bytes=sum(map(len, texts)),
      gzip_bits_per_byte=None,
    )
    results += bench_batches(store, options)
  return results


def bench_tokenizer(
  texts: list[str], vocab_size: int, options: BenchOptions
) -> tuple[list[Result], Tokenizer]:
  num_bytes = float(sum(len(text.encode()) for text in texts))
  train = Side(lambda: train_tokenizer("bpe", texts, vocab_size))
  training = measure_alone(train, options)
  tokenizer: Tokenizer = training.result
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "tokenizer.json"
    tokenizer.save(path)
    # A tokenizer caches words, so each call gets a new one.
    encode = Side(lambda fresh: fresh.encode_batch(texts), lambda: (Tokenizer.load(path),))
    encoding = measure_alone(encode, options)
  ids = encoding.result
  if [tokenizer.decode(x.tolist()) for x in ids] != texts:
    raise wrong_result("decode(encode(text)) is not the text")
  gate = "decode(encode(text)) is the text"
  count = float(sum(map(len, ids)))
  results = [
    timed("data", f"train bpe {vocab_size}", training, "MB/s", gate, num_bytes),
    timed("data", f"encode bpe {vocab_size}", encoding, "MB/s", gate, num_bytes),
    timed("data", f"encode bpe {vocab_size}, tokens", encoding, "tokens/s", gate, count),
  ]
  return results, tokenizer


def bench_batches(store: TokenStore, options: BenchOptions) -> list[Result]:
  """Batches per second, made on demand and made ahead on Grain's thread."""
  batch_size, seq_len = options.pick((2, 8), (16, 256), (64, 2048))
  cfg = DataConfig(seq_len=seq_len, batch_size=batch_size)
  batches = Batches(store, cfg, vocab_size=store.vocab_size, seed=0, num_epochs=None)
  count = options.pick(2, BATCHES, BATCHES)
  wanted = [batches[n].tokens_BT for n in range(count)]
  case = f"B{batch_size} T{seq_len}"
  results = []
  with batches.iterate() as ahead:
    calls = {
      "by index": lambda: [batches[n].tokens_BT for n in range(count)],
      "read ahead": lambda: [next(ahead).tokens_BT for _ in range(count)],
    }
    for name, call in calls.items():
      timing = measure_alone(Side(call), options)
      gate = agree("every token", timing.result, wanted, 0.0)
      name = f"batches {name} {case}"
      results.append(timed("data", name, timing, "batches/s", gate, count))
  return results
