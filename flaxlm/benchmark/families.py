# SPDX-License-Identifier: Apache-2.0
"""The four families side by side: about as many parameters and tokens, the same optimizer.

Each is trained by `flaxlm train` in a process of its own, then decodes here. Losses of
different objectives are not comparable (an encoder sees both sides of what it guesses,
an encoder-decoder learns other text); speeds are.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax

from flaxlm.benchmark.measure import Setting
from flaxlm.benchmark.report import Result, summarise
from flaxlm.config import load_config, override
from flaxlm.decoding.completions import complete, search
from flaxlm.decoding.encoding import fill_masks
from flaxlm.decoding.loading import Run, load_run
from flaxlm.decoding.sampling import make_sampling
from flaxlm.errors import FlaxLMError
from flaxlm.sharding import make_mesh

# 1.3 million parameters and 0.3 million tokens each.
OVERRIDES = {
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
OPTIMIZER = [
  "--optimizer.kind=adamw",
  "--optimizer.learning_rate=3e-3",
  "--optimizer.schedule=cosine",
  "--optimizer.warmup_steps=30",
  "--training.num_steps=150",
  "--training.log_every_steps=50",
]
PROMPT = "def __init__(self"
NEW_TOKENS = 65  # the prefill's, and four blocks
ROUNDS = 5


def bench_families(_: Setting) -> list[Result]:
  """Of each family its parameters, held-out loss, training speed, and time per token."""
  results = []
  for name, (config, *changes) in OVERRIDES.items():
    cfg = override(load_config(config), [*changes, *OPTIMIZER])
    with tempfile.TemporaryDirectory() as folder:
      arguments = [config, *changes, *OPTIMIZER, f"--runs_dir={folder}", f"--name={name}"]
      command = [sys.executable, "-m", "flaxlm.cli", "train", *arguments]
      run = subprocess.run(command, capture_output=True, text=True, check=False)
      if run.returncode:
        raise FlaxLMError(f"training {name} failed: {run.stderr.strip()[-400:]}")
      path = Path(folder) / name
      lines = [json.loads(line) for line in (path / "metrics.jsonl").open()]
      rates = [
        line["perf/tokens_per_sec"] for line in lines if "perf/tokens_per_sec" in line
      ]
      loaded = load_run(path, make_mesh({"data": -1}))
    tokens = [line["train/tokens"] for line in lines if "train/tokens" in line]
    total = cfg.training.num_steps * sum(tokens) / len(tokens)
    figures = {
      "parameters": ([float(num_parameters(loaded))], "parameters"),
      "tokens": ([total], "tokens"),
      "held-out loss": ([lines[-1]["eval/loss"]], "nats per token"),
      "training": (rates, "tokens/s"),
      "decoding": (latencies(loaded), "ms per token"),
    }
    for figure, (values, unit) in figures.items():
      results.append(summarise("families", f"{name} {figure}", values, unit))
  return results


def num_parameters(run: Run) -> int:
  return sum(x.size for x in jax.tree.leaves(run.params))


def latencies(run: Run) -> list[float]:
  """Milliseconds per new token of one text, or of one filled mask, once compiled."""
  family, rounds = run.cfg.model.family, []
  for number in range(ROUNDS + 1):
    started = time.perf_counter()
    if family == "encoder":
      fill_masks(run, ["import [MASK]"])
      count = 1
    elif family == "encoder_decoder":
      (found,) = search(run, ["Search the files"], 1, max_new_tokens=NEW_TOKENS)
      count = len(found.tokens)
    else:
      sampling = make_sampling(1, temperature=1.0, seed=number)
      (found,) = complete(run, [PROMPT], sampling, NEW_TOKENS)
      count = len(found.tokens)
    rounds.append(1e3 * (time.perf_counter() - started) / count)
  return rounds[1:]
