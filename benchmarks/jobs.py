# SPDX-License-Identifier: Apache-2.0
"""A file of prompts of mixed lengths, answered by this checkout and by another one.

    git worktree add ../before v1.0
    python -m benchmarks.jobs --before ../before

Each side is a process of its own, and they work in turn: round by round the machine is the
same. The other checkout may be any that has `flaxlm.decoding.jobs.complete_jobs`. Both have
the same random weights in the shape of GPT-2 with 124M parameters, in float32, and must
write the same tokens. The processor's time is measured too, which other programs on the
machine change less than the time on the clock.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PROMPTS, ANSWERS = (32, 256), (16, 128)  # tokens, from and to
ONE = 128  # tokens of the one stream's answer


def main() -> None:
  from benchmarks.writing import add_output, write

  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--before", required=True, help="a checkout to compare with")
  parser.add_argument(
    "--batch-sizes", type=int, nargs="+", default=[0, 8, 32], help="0: one stream"
  )
  parser.add_argument("--prompts", type=int, default=64)
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--config", default="gpt2_124m")
  add_output(parser)
  args = parser.parse_args()
  results = []
  for batch in args.batch_sizes:
    results += compare(args, batch)
  write(results, args)


def compare(args: argparse.Namespace, batch: int) -> list[Any]:
  """The figures of one batch size; 0: of one stream, as `flaxlm infer --prompt`."""
  from flaxlm.benchmark.report import figures, summarise, with_ratio

  places = {"now": ROOT, "before": Path(args.before).resolve()}
  sides = {
    name: start_side(place, args.config, batch, args.prompts)
    for name, place in places.items()
  }
  rounds: dict[str, list[dict]] = {name: [] for name in sides}
  try:
    for number in range(args.rounds + 1):  # the first compiles
      for name, side in sides.items():
        rounds[name].append(ask(side))
        times = "{seconds:.1f} s, {processor:.1f} s of processors".format(
          **rounds[name][-1]
        )
        print(f"batch {batch}, round {number}, {name}: {times}", file=sys.stderr)
  finally:
    for side in sides.values():
      side.kill()
  answers = {json.dumps(one["tokens"]) for found in rounds.values() for one in found}
  if len(answers) > 1:
    raise SystemExit(f"batch {batch}: the two sides have written different tokens")
  count = sum(map(len, rounds["now"][0]["tokens"]))
  gate = f"all {count} tokens are the same"
  case = f"{args.prompts} prompts, batch {batch}" if batch else "one stream"
  results = []
  for clock, name in (("seconds", case), ("processor", f"{case}, processor time")):
    now, before = ([one[clock] for one in rounds[side][1:]] for side in sides)
    speeds = figures(now, "tokens/s", count)
    result = summarise("jobs", name, speeds, "tokens/s", gate)
    results.append(with_ratio(result, "before", now, before, gate))
  return results


def start_side(place: Path, config: str, batch: int, prompts: int) -> subprocess.Popen:
  """A process of a checkout that answers all prompts whenever it is asked to."""
  return subprocess.Popen(
    [sys.executable, __file__, "--side", config, str(batch), str(prompts)],
    env=os.environ | {"PYTHONPATH": str(place)},
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )


def ask(side: subprocess.Popen) -> dict[str, Any]:
  assert side.stdin is not None and side.stdout is not None
  print(file=side.stdin, flush=True)
  line = side.stdout.readline()
  if not line:
    raise SystemExit("a side has ended: see above")
  return json.loads(line)


# -- One side, which must run in older checkouts, too -------------------------------------


def run_side(config: str, batch: int, num_prompts: int) -> None:
  """Answers once for each line of stdin, and writes a line of JSON."""
  answer = prepare(config, batch, num_prompts)
  for _ in sys.stdin:
    started, used = time.perf_counter(), time.process_time()
    tokens = answer()
    now, processor = time.perf_counter(), time.process_time()
    found = dict(seconds=now - started, processor=processor - used, tokens=tokens)
    print(json.dumps(found), flush=True)


def prepare(config: str, batch: int, num_prompts: int) -> Callable[[], list[list[int]]]:
  """A function that returns the tokens of all answers."""
  import flax.linen as nn
  import jax
  import jax.numpy as jnp
  import numpy as np

  from flaxlm.config import ResolvedConfig, load_config
  from flaxlm.decoding.completions import Stopping, complete_samples
  from flaxlm.decoding.jobs import PromptJob, complete_jobs
  from flaxlm.decoding.loading import Run, prepare_for_decoding
  from flaxlm.decoding.sampling import SamplingSettings
  from flaxlm.nn.models import build_model, init_params
  from flaxlm.sharding import make_mesh, use_mesh
  from flaxlm.tokenizers import train_tokenizer

  cfg = ResolvedConfig(model=load_config(config).model.resolve())
  model, mesh = build_model(cfg.model), make_mesh({"data": -1})
  with use_mesh(mesh):
    params = jax.jit(lambda: nn.unbox(init_params(model, jnp.uint32(0))))()
  tokenizer = train_tokenizer("byte", [], 0)
  run = Run(Path("nowhere"), cfg, tokenizer, 0, model, params, mesh)
  run = prepare_for_decoding(run)
  rng = np.random.default_rng(0)
  letters = np.array([*"abcdefghijklmnopqrstuvwxyz     "])
  greedy = SamplingSettings(temperature=0.0)
  jobs = []
  for _ in range(num_prompts):
    text = "".join(rng.choice(letters, rng.integers(PROMPTS[0], PROMPTS[1] + 1) - 1))
    num_new = int(rng.integers(ANSWERS[0], ANSWERS[1] + 1))
    jobs.append(PromptJob(text, greedy, Stopping(), num_new))

  def answer_one() -> list[list[int]]:
    found = complete_samples(run, jobs[0].prompt, greedy, 1, ONE)
    return [one.tokens for one in found]

  def answer_file() -> list[list[int]]:
    with tempfile.TemporaryDirectory() as folder:
      output = Path(folder) / "out.jsonl"
      complete_jobs(run, jobs, output, batch)
      lines = output.read_text("utf-8").splitlines()
    return [json.loads(line)["tokens"] for line in lines]

  return answer_file if batch else answer_one


if __name__ == "__main__":
  if sys.argv[1:2] == ["--side"]:
    run_side(sys.argv[2], *map(int, sys.argv[3:]))
  else:
    main()
