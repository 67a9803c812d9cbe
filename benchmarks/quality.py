# SPDX-License-Identifier: Apache-2.0
"""The cost of narrow weights and a narrow cache: a text's perplexity under a trained run,
and how often the likeliest token stays the same.

    python -m benchmarks.quality RUN TEXT...

Every choice reads the same windows of the same text through a cache, as decoding does.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.writing import add_output, write
from flaxlm.benchmark.report import Result, summarise
from flaxlm.decoding.loading import Run, load_run, prepare_for_decoding
from flaxlm.errors import ConfigError
from flaxlm.nn.models import init_cache
from flaxlm.platform import start_jax
from flaxlm.sharding import make_mesh, use_mesh

# Name: how matrices are kept, and whether the cache is int8.
CHOICES: dict[str, tuple[str | None, bool]] = {
  "as stored": (None, False),
  "bfloat16 weights and computation": ("bfloat16", False),
  "int8 weights": ("int8", False),
  "int4 weights": ("int4", False),
  "int8 cache": (None, True),
  "int8 weights and cache": ("int8", True),
}
ROWS = 8


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("run", type=Path)
  parser.add_argument("texts", type=Path, nargs="+")
  add_output(parser)
  args = parser.parse_args()
  start_jax()
  run = load_run(args.run, make_mesh({"data": -1}))
  texts = [path.read_text("utf-8") for path in args.texts]
  write(bench_quality(run, texts), args)


def bench_quality(
  run: Run, texts: Sequence[str], max_tokens: int = 100_000
) -> list[Result]:
  """Perplexity of each choice, and how often it agrees with the first. Raises
  `ConfigError` if the text is too short."""
  ids = [id_ for text in texts for id_ in run.tokenizer.encode(text)][:max_tokens]
  window = min(run.model.cfg.context, 512)
  count = len(ids) // window // ROWS * ROWS
  if not count:
    raise ConfigError(f"a text of {len(ids)} tokens", f"give {ROWS * window} or more")
  windows = np.array(ids[: count * window], np.int32).reshape(-1, ROWS, window)
  results: list[Result] = []
  for name, (weights, narrow_cache) in CHOICES.items():
    prepared = prepare_for_decoding(run, weights, narrow_cache)
    figure, likeliest = perplexity(prepared, windows)
    if not results:
      expected = likeliest
    share = float((likeliest == expected).mean())
    results.append(summarise("quality", name, [figure], "perplexity"))
    agreement = f"{name}, likeliest tokens as stored"
    results.append(summarise("quality", agreement, [share], "of the time"))
  return results


def perplexity(run: Run, windows: np.ndarray) -> tuple[float, np.ndarray]:
  """exp of the mean negative log-probability of each token but the first of a window, and
  the likeliest tokens."""
  model = run.model

  @jax.jit
  def loss(params: dict, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    cache = init_cache(model, *tokens_BT.shape)
    logits_BTV = model.apply({"params": params}, tokens_BT, cache=cache).value
    logprobs_BTV = jax.nn.log_softmax(logits_BTV[:, :-1].astype(jnp.float32), -1)
    nats = -jnp.take_along_axis(logprobs_BTV, tokens_BT[:, 1:, None], -1).mean()
    return nats, logprobs_BTV.argmax(-1)

  with use_mesh(run.mesh):
    found = [jax.device_get(loss(run.params, tokens_BT)) for tokens_BT in windows]
  losses, likeliest = zip(*found, strict=True)
  return float(np.exp(np.mean(losses))), np.concatenate(likeliest)


if __name__ == "__main__":
  main()
