# SPDX-License-Identifier: Apache-2.0
"""The device's own limits: the best square product, and passes over memory."""

import sys
from pathlib import Path

from flaxlm.benchmark.measure import BenchOptions
from flaxlm.benchmark.report import as_json
from flaxlm.benchmark.suites.matmul import bench_matmul
from flaxlm.benchmark.suites.memory import bench_memory
from flaxlm.platform import start_jax


def main() -> None:
  """`OUTPUT SMOKE`: writes a line for each."""
  output, smoke = sys.argv[1:]
  start_jax()
  tiny = BenchOptions("tiny", 1, 0.0)
  options = tiny if int(smoke) else BenchOptions("large", 3)
  results = [*bench_memory(options), *bench_matmul(options, square_only=True)]
  Path(output).write_text("".join(as_json(r) + "\n" for r in results), "utf-8")


if __name__ == "__main__":
  main()
