# SPDX-License-Identifier: Apache-2.0
"""What JSON lines and Parquet tables cost: in a step of training, and when a corpus is
prepared.

    python -m benchmarks.reading --megabytes 20

Records are read once: they become stored tokens, and a step reads its batch from these. So
three shares are measured of each format: how long a step waits for its batch, which a
thread makes ahead; how long it would wait if nothing were made ahead; and how much of
preparing is reading the records.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax

from benchmarks.finetuning import GPT2
from benchmarks.preparing import SAMPLE, VOCAB_SIZE, package_sources
from benchmarks.writing import add_output, write
from flaxlm.benchmark.measure import wrong_result
from flaxlm.benchmark.report import Result, summarise
from flaxlm.benchmark.training_case import OPTIMIZER
from flaxlm.config import DataConfig, ResolvedConfig, TokenizerConfig, load_config
from flaxlm.data.batches import Batches
from flaxlm.data.prepare import prepare
from flaxlm.data.records import read_records
from flaxlm.nn.models import build_model
from flaxlm.platform import fused_kernel, start_jax
from flaxlm.sharding import make_mesh
from flaxlm.strict_json import to_json
from flaxlm.tokenizers import train_tokenizer
from flaxlm.training.optimizer import build_optimizer
from flaxlm.training.step import init_state, jit_train_step, put_batch

FORMATS = ("jsonl", "parquet")


class Case(NamedTuple):
  """A config whose steps are timed, and how many of them in a round."""

  name: str
  cfg: ResolvedConfig
  num_steps: int


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--megabytes", type=float, default=20.0)
  parser.add_argument("--rounds", type=int, default=3)
  add_output(parser)
  args = parser.parse_args()
  start_jax()
  tiny = load_config("stdlib_tiny").resolve(VOCAB_SIZE)
  large = ResolvedConfig(
    model=GPT2, data=DataConfig(seq_len=256, batch_size=4), optimizer=OPTIMIZER
  )
  cases = [Case("stdlib_tiny", tiny, 20), Case("gpt2_124m, B4 T256", large, 2)]
  texts = package_sources(args.megabytes * 1e6)
  with tempfile.TemporaryDirectory() as folder:
    write(bench_reading(texts, Path(folder), cases, args.rounds), args)


def bench_reading(
  texts: list[str], folder: Path, cases: Sequence[Case], rounds: int
) -> list[Result]:
  """Shares of the time, of records in either format."""
  for kind in FORMATS:
    (folder / kind).mkdir()
  with (folder / "jsonl" / "all.jsonl").open("w") as file:
    file.writelines(to_json({"text": text}) + "\n" for text in texts)
  write_table(texts, folder / "parquet" / "all.parquet")
  train_tokenizer("bpe", texts[::SAMPLE], VOCAB_SIZE).save(folder / "tokenizer.json")
  results, stores = [], {}
  for kind in FORMATS:
    shares = []
    for number in range(rounds):
      reading = reading_seconds(folder / kind / f"all.{kind}", texts)
      with mock.patch.dict(os.environ, FLAXLM_DATA_DIR=str(folder / f"data{number}")):
        start = time.perf_counter()
        tokenizer = TokenizerConfig(path=str(folder / "tokenizer.json"))
        stores[kind] = prepare(f"files:{folder / kind}", tokenizer).train
        shares.append(reading / (time.perf_counter() - start))
    gate = "the records are the texts"
    results.append(
      summarise("reading", f"{kind}, in preparing", shares, "of the time", gate)
    )
  for case in cases:
    trainer = Trainer(case.cfg)
    for kind in FORMATS:
      waits, makes = trainer.shares(stores[kind], case.num_steps, rounds)
      for what, shares in (("waited for", waits), ("if not made ahead", makes)):
        name = f"{kind}, {case.name}: batch {what}"
        results.append(summarise("reading", name, shares, "of the time"))
  return results


def write_table(texts: list[str], path: Path) -> None:
  import pyarrow
  from pyarrow import parquet

  parquet.write_table(pyarrow.table({"text": texts}), path)


def reading_seconds(path: Path, texts: list[str]) -> float:
  """The time to read all records of a file, and nothing else."""
  start = time.perf_counter()
  found = [record.fields["text"] for record in read_records(path, columns=["text"])]
  seconds = time.perf_counter() - start
  if found != texts:
    raise wrong_result(f"the records of {path.name} are not the texts")
  return seconds


class Trainer:
  """A training step, which begins from a seed."""

  def __init__(self, cfg: ResolvedConfig):
    self.cfg, self.mesh = cfg, make_mesh({"data": -1})
    model = build_model(cfg.model, cfg.training, fused_kernel())
    optimizer = build_optimizer(cfg.optimizer, num_steps=cfg.training.num_steps)
    self.state = init_state(model, optimizer, self.mesh, seed=0)
    self.train_step = jit_train_step(model, optimizer, cfg.training, self.mesh)

  def step(self, batch: Any) -> None:
    placed = put_batch(batch, self.mesh)
    self.state, metrics = self.train_step(self.state, placed, jax.numpy.uint32(0))
    jax.block_until_ready(metrics)

  def shares(
    self, store: Any, num_steps: int, rounds: int
  ) -> tuple[list[float], list[float]]:
    """Of each round of steps, (the share of time that they wait for batches, as training
    does, the time to make these batches without a thread / the time of the steps)."""
    batches = Batches(
      store, self.cfg.data, vocab_size=self.cfg.model.vocab_size, seed=0, num_epochs=None
    )
    self.step(batches[0])  # compiles
    waits, makes, first = [], [], 1
    for _ in range(rounds):
      waited, start = 0.0, time.perf_counter()
      with batches.iterate(first) as ahead:
        next(ahead)  # training waits for its first one while it compiles
        start = time.perf_counter()
        for _ in range(num_steps):
          asked = time.perf_counter()
          batch = next(ahead)
          waited += time.perf_counter() - asked
          self.step(batch)
        total = time.perf_counter() - start
      start = time.perf_counter()
      for n in range(first + 1, first + 1 + num_steps):
        batches[n]
      makes.append((time.perf_counter() - start) / (total - waited))
      waits.append(waited / total)
      first += num_steps + 1
    return waits, makes


if __name__ == "__main__":
  main()
