# SPDX-License-Identifier: Apache-2.0
"""The model families side by side: similar parameters and tokens, the same optimizer.

    python -m benchmarks.families

Each is trained by `flaxlm train` in its own process, then decodes here. Only the speeds can
be compared, because the losses are of different objectives (an encoder sees both sides of
what it predicts, and an encoder-decoder is trained on another text).
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks.writing import add_output, write
from flaxlm.benchmark.measure import run_python
from flaxlm.benchmark.report import Result, summarise
from flaxlm.decoding.completions import complete, search
from flaxlm.decoding.encoding import fill_masks
from flaxlm.decoding.loading import Run, load_run
from flaxlm.decoding.sampling import SamplingSettings
from flaxlm.platform import start_jax
from flaxlm.sharding import make_mesh

# Each has about 1.3 million parameters and reads about 0.3 million tokens.
FAMILIES = {
  "decoder": ["stdlib_tiny"],
  "rnn_lstm": ["rnn_lstm", "--model.depth=6", "--model.cell=lstm"],
  "rnn_gru": ["rnn_lstm", "--model.depth=8", "--model.cell=gru"],
  "encoder": ["bert_tiny", "--data.seq_len=128", "--data.batch_size=16"],
  "encoder_decoder": [
    "transformer_2017",
    "--model.depth=2",
    "--model.ffn_width=384",
    "--tokenizer.vocab_size=4096",
    "--data.seq_len=128",
    "--data.batch_size=8",
  ],
}
NUM_STEPS = 150
OPTIMIZER = [
  "--optimizer.kind=adamw",
  "--optimizer.learning_rate=3e-3",
  "--optimizer.schedule=cosine",
]
PROMPT = "def __init__(self"
NEW_TOKENS = 65  # one from the prefill, and four blocks
ROUNDS = 5


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("names", nargs="*", metavar="FAMILY", help=", ".join(FAMILIES))
  parser.add_argument("--num-steps", type=int, default=NUM_STEPS)
  add_output(parser)
  args = parser.parse_args()
  if unknown := set(args.names) - FAMILIES.keys():
    parser.error(f"unknown: {', '.join(sorted(unknown))}")
  start_jax()
  write(bench_families(args.names or list(FAMILIES), args.num_steps), args)


def bench_families(names: Sequence[str], num_steps: int) -> list[Result]:
  """Each family's parameters, held-out loss, training speed, and time per token."""
  results = []
  for name in names:
    print(f"{name} ...", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
      path = train_family(name, num_steps, Path(folder))
      text = (path / "metrics.jsonl").read_text("utf-8")
      lines = [json.loads(line) for line in text.splitlines()]
      run = load_run(path, make_mesh({"data": -1}))
    tokens = column(lines, "train/tokens")
    num_parameters = sum(x.size for x in jax.tree.leaves(run.params))
    figures = {
      "parameters": ([float(num_parameters)], "parameters"),
      "tokens": ([num_steps * sum(tokens) / len(tokens)], "tokens"),
      "held-out loss": (column(lines, "eval/loss")[-1:], "nats per token"),
      "training": (column(lines, "perf/tokens_per_sec"), "tokens/s"),
      "decoding": (milliseconds_per_token(run), "ms per token"),
    }
    for figure, (values, unit) in figures.items():
      results.append(summarise("families", f"{name} {figure}", values, unit))
  return results


def train_family(name: str, num_steps: int, folder: Path) -> Path:
  """Trains in a separate process; returns the run's directory."""
  steps = [
    f"--training.num_steps={num_steps}",
    f"--training.log_every_steps={max(1, num_steps // 3)}",
    f"--optimizer.warmup_steps={num_steps // 5}",
  ]
  place = [f"--runs_dir={folder}", f"--name={name}"]
  run_python("-m", "flaxlm.cli", "train", *FAMILIES[name], *OPTIMIZER, *steps, *place)
  return folder / name


def column(lines: Sequence[dict[str, Any]], key: str) -> list[float]:
  return [line[key] for line in lines if key in line]


def milliseconds_per_token(run: Run) -> list[float]:
  """Time per token of an answer, or per filled mask, for each round after a first call."""
  rounds = []
  for number in range(ROUNDS + 1):
    started = time.perf_counter()
    count = decode_once(run, seed=number)
    rounds.append(1e3 * (time.perf_counter() - started) / count)
  return rounds[1:]


def decode_once(run: Run, seed: int) -> int:
  """Decodes as the family does; returns the number of new tokens."""
  if run.cfg.model.family == "encoder":
    fill_masks(run, ["import [MASK]"])
    return 1
  if run.cfg.model.family == "encoder_decoder":
    (found,) = search(run, ["Search the files"], 1, max_new_tokens=NEW_TOKENS)
  else:
    (found,) = complete(run, [PROMPT], [SamplingSettings(seed=seed)], NEW_TOKENS)
  return len(found.tokens)


if __name__ == "__main__":
  main()
