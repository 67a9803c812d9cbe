# SPDX-License-Identifier: Apache-2.0
"""Preparing a corpus, from files to stored tokens, against the speed at which the library
`tokenizers` encodes the same texts, in memory already, in one call on all cores.

    python -m benchmarks.preparing --megabytes 100

The texts are the sources of installed Python packages. Our own tokenizer splits words by
itself; another one, with GPT-2's pattern, leaves all of it to the library.
"""

import argparse
import os
import statistics
import sysconfig
import tempfile
import time
from pathlib import Path
from unittest import mock

import tokenizers
from tokenizers import pre_tokenizers

from benchmarks.writing import add_output, write
from flaxlm.benchmark.report import Result
from flaxlm.config import TokenizerConfig
from flaxlm.data.prepare import prepare
from flaxlm.strict_json import to_json
from flaxlm.tokenizers import train_tokenizer

VOCAB_SIZE = 4096
SAMPLE = 40  # one text in so many trains the tokenizers


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--megabytes", type=float, default=100.0)
  parser.add_argument("--rounds", type=int, default=3)
  add_output(parser)
  args = parser.parse_args()
  texts = package_sources(args.megabytes * 1e6)
  with tempfile.TemporaryDirectory() as folder:
    write(bench_preparing(texts, Path(folder), args.rounds), args)


def package_sources(num_bytes: float) -> list[str]:
  """Whole files of the standard library and of installed packages, `num_bytes` in all."""
  texts, size = list[str](), 0.0
  for name in ("stdlib", "purelib"):
    for path in sorted(Path(sysconfig.get_path(name)).rglob("*.py")):
      if size >= num_bytes:
        return texts
      text = path.read_text("utf-8", "replace").replace("\0", "")
      if text and (name == "purelib" or "site-packages" not in path.parts):
        texts.append(text)
        size += len(text.encode())
  return texts


def bench_preparing(texts: list[str], folder: Path, rounds: int) -> list[Result]:
  """Text files and JSON lines, each with a tokenizer of ours and one of the library."""
  size = sum(len(text.encode()) for text in texts)
  for name in ("text", "records"):
    (folder / name).mkdir()
  for number, text in enumerate(texts):
    (folder / "text" / f"{number}.txt").write_bytes(text.encode())
  with (folder / "records" / "all.jsonl").open("w") as file:
    file.writelines(to_json({"text": text}) + "\n" for text in texts)
  ours = train_tokenizer("bpe", texts[::SAMPLE], VOCAB_SIZE)
  ours.save(folder / "own.json")
  others = tokenizers.Tokenizer.from_file(str(folder / "own.json"))
  others.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  others.save(str(folder / "library.json"))
  results = []
  for kind in ("own", "library"):
    seconds: dict[str, list[float]] = {"text": [], "records": [], "library": []}
    for _ in range(rounds):
      seconds["library"].append(library_seconds(folder / f"{kind}.json", texts))
      for name in ("text", "records"):
        seconds[name].append(our_seconds(folder / name, folder / f"{kind}.json"))
    for name in ("text", "records"):
      speeds = sorted(size / 1e6 / one for one in seconds[name])
      ratios = [a / b for a, b in zip(seconds["library"], seconds[name], strict=True)]
      results.append(
        Result(
          "preparing",
          f"{name}, {kind} tokenizer, {size / 1e6:.0f} MB",
          statistics.median(speeds),
          speeds[0],
          speeds[-1],
          "MB/s",
          peer="encode_batch_fast",
          ratio=statistics.median(ratios),
          ratio_low=min(ratios),
          ratio_high=max(ratios),
          rounds=rounds,
        )
      )
  return results


def library_seconds(tokenizer: Path, texts: list[str]) -> float:
  backend = tokenizers.Tokenizer.from_file(str(tokenizer))
  start = time.perf_counter()
  backend.encode_batch_fast(texts, add_special_tokens=False)
  return time.perf_counter() - start


def our_seconds(corpus: Path, tokenizer: Path) -> float:
  """Finding, copying, tokenizing and storing, into an empty folder."""
  with (
    tempfile.TemporaryDirectory(dir=tokenizer.parent) as data,
    mock.patch.dict(os.environ, FLAXLM_DATA_DIR=data),
  ):
    start = time.perf_counter()
    prepare(f"files:{corpus}", TokenizerConfig(path=str(tokenizer)))
    return time.perf_counter() - start


if __name__ == "__main__":
  main()
