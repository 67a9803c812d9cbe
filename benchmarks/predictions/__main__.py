# SPDX-License-Identifier: Apache-2.0
"""The planner's predictions against measured times, for a few small models.

    python -m benchmarks.predictions

The parts of a step are timed separately, with the model's shapes, and their rates define a
`Device`. `planning.roofline` then predicts the time of a whole step on that device, and the
step itself is timed in the same rounds. Nothing is fitted to a model.
"""

import argparse
import dataclasses

from benchmarks.predictions.decoding import predict_decoding
from benchmarks.predictions.models import models
from benchmarks.predictions.training import predict_training
from benchmarks.writing import add_output, write
from flaxlm.benchmark.measure import BenchOptions
from flaxlm.benchmark.report import Result
from flaxlm.benchmark.suites.run import default_size
from flaxlm.platform import start_jax

ROUND_SECONDS = 0.05  # short, because every model has some thirty parts


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--size", choices=("tiny", "small", "large"))
  parser.add_argument("--rounds", type=int, default=5)
  add_output(parser)
  args = parser.parse_args()
  start_jax()
  options = BenchOptions(size=args.size or default_size(), rounds=args.rounds)
  write(bench_predictions(options), args)


def bench_predictions(options: BenchOptions) -> list[Result]:
  """Predicted / measured time of each model's training step, and of a decoded token."""
  seconds = min(ROUND_SECONDS, options.round_seconds)
  short = dataclasses.replace(options, round_seconds=seconds)
  results = []
  for name, cfg in models(options.size).items():
    results += predict_training(name, cfg, short)
    results += predict_decoding(name, cfg, short)
  return results


if __name__ == "__main__":
  main()
