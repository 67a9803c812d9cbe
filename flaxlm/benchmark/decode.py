# SPDX-License-Identifier: Apache-2.0
"""Decoding by batch: reading the prompts, and then token after token, both through
`decoding.generate`, greedily.

A step reads every weight and the cache (`planning.roofline.decode_work`); reading a
prompt is a forward pass of which the head sees the last token only. Against a peer whole
answers of GPT-2's smallest shape are timed, prompt and all: others do not tell the two
apart.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxlm.benchmark.measure import Setting, Side, against, measure, timed
from flaxlm.benchmark.memory import PASSES, ROW
from flaxlm.benchmark.report import Result, Work, summarise
from flaxlm.config import (
  ModelConfig,
  ResolvedConfig,
  TrainingConfig,
  load_config,
)
from flaxlm.decoding.generate import generate
from flaxlm.decoding.prefill import Request
from flaxlm.decoding.sampling import make_sampling
from flaxlm.decoding.weights import prepare_params
from flaxlm.errors import FlaxLMError
from flaxlm.nn.base import LanguageModel
from flaxlm.nn.models import build_model, init_params
from flaxlm.planning.cost import forward_work
from flaxlm.planning.roofline import decode_work, read_parameters
from flaxlm.platform import kernel_head_dim

CHECKED_TOKENS = 8
# A token counts as the likeliest if its logit is this close to the highest: / their range.
LOGIT_TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}


def shape_of(setting: Setting) -> tuple[ResolvedConfig, int, int]:
  """A LLaMA shape, the prompt's length, and the number of new tokens."""
  depth, width, heads, vocab, prompt, new = setting.pick(
    (1, 16, 2, 64, 4, 9), (6, 384, 6, 8192, 64, 65), (16, 2048, 16, 32_000, 512, 129)
  )
  model = ModelConfig(
    depth=depth,
    width=width,
    num_heads=heads,
    num_kv_heads=heads // 2,
    vocab_size=vocab,
    context=max(64, 2 * (prompt + new)),
  ).resolve()
  dtype = setting.pick("float32", "float32", "bfloat16")
  return (
    ResolvedConfig(model=model, training=TrainingConfig(dtype=dtype, param_dtype=dtype)),
    prompt,
    new,
  )


def bench_decode(setting: Setting) -> list[Result]:
  """Tokens per second of prompts and of answers, by batch."""
  cfg, prompt, new = shape_of(setting)
  model, params = random_model(cfg)
  results = []
  for batch in setting.pick((2,), (1, 4, 16), (1, 8, 64)):
    results += bench_batch(cfg, model, params, (batch, prompt, new), setting)
  if setting.peer is not None:
    results += bench_against(setting.peer, setting)
  return results


def bench_against(peer: str, setting: Setting) -> list[Result]:
  """Whole answers, ours and the peer's in turn, with the same weights. And which share of
  ours, and of our steps after the prompt, it takes to read alone what they read."""
  cfg, prompt, new = peer_shape(setting)
  model, params = random_model(cfg)
  prepared = prepare_params(params, cfg.model)
  if peer == "torch":
    from flaxlm.benchmark import transformers_peer as module
  else:
    from flaxlm.benchmark import llama_cpp_peer as module  # type: ignore[no-redef]
  answer = module.load(cfg, model, params)
  results = []
  for batch in setting.pick((2,), (1, 8), (1, 8, 64)):
    if batch > 1 and peer == "llama.cpp":
      continue  # its Python binding answers one row at a time
    request = random_request(cfg, batch, prompt, new)
    greedy = make_sampling(batch, temperature=0.0)
    ours = functools.partial(generate, model, prepared, request, greedy)
    theirs = functools.partial(answer, request.prompts, new)
    sides = {
      "flaxlm": Side(lambda ours=ours: whole_answer(ours())),
      peer: Side(theirs),
      "first": Side(lambda ours=ours: next(ours())),  # the prompt, and a token
      "read": read_side(cfg, batch),
    }
    timings = measure(sides, setting)
    case = f"answer {cfg.model.depth}x{cfg.model.width} B{batch} {prompt}+{new}"
    work = answer_work(cfg, batch, prompt, new)
    result = timed(("decode", case), timings["flaxlm"], "tokens/s", batch * new, work)
    gate = check_both(
      model, params, request, *(timings[n].result for n in ("flaxlm", peer))
    )
    results.append(against(result, peer, timings[peer], timings["flaxlm"], gate))
    # A step reads its weights and the cache; the prompt, computing, reads weights once.
    weights = read_parameters(cfg, batch) * jnp.dtype(cfg.training.dtype).itemsize
    read = np.array(timings["read"].rounds)
    steps = read * work.bytes / weights
    whole, start = (np.array(timings[name].rounds) for name in ("flaxlm", "first"))
    shares = {"answer": (read + steps) / whole, "steps": steps / (whole - start)}
    for part, share in shares.items():
      name = f"{case}, of reading in {part}"
      results.append(summarise("decode", name, share.tolist(), "of the time"))
      results[-1].correct = gate
  return results


def read_side(cfg: ResolvedConfig, batch: int) -> Side:
  """Reads as many bytes as a step reads of weights, as fast as `memory` knows how to."""
  length = read_parameters(cfg, batch) // ROW * ROW
  numbers = jnp.ones(length, cfg.training.dtype)
  return Side(jax.jit(PASSES["read"][0]), lambda: (numbers, None))


def peer_shape(setting: Setting) -> tuple[ResolvedConfig, int, int]:
  """As `shape_of`: GPT-2 with 124M parameters, 32 + 128 tokens."""
  model = load_config("gpt2_124m").model
  if setting.size == "tiny":
    shape = dict(depth=1, width=16, num_heads=2, vocab_size=512, context=64, ffn_width=None)
    model = dataclasses.replace(model, **shape)  # type: ignore[arg-type]
  dtype = setting.pick("float32", "float32", "bfloat16")
  training = TrainingConfig(dtype=dtype, param_dtype=dtype)
  return (
    ResolvedConfig(model=model.resolve(), training=training),
    32,
    setting.pick(9, 128, 128),
  )


def whole_answer(blocks: Iterable[Any]) -> np.ndarray:
  return np.concatenate([block.tokens_BT for block in blocks], 1)


def random_model(cfg: ResolvedConfig) -> tuple[LanguageModel, Any]:
  import flax.linen as nn

  model = build_model(cfg.model, cfg.training, kernel_head_dim())
  init = jax.jit(lambda seed: nn.unbox(init_params(model, seed)))
  return model, init(jnp.uint32(0))


def random_request(cfg: ResolvedConfig, batch: int, prompt: int, new: int) -> Request:
  V = cfg.model.vocab_size
  assert V is not None
  prompts = np.random.default_rng(0).integers(0, V, (batch, prompt)).tolist()
  return Request(prompts, new, num_ids=V)


def bench_batch(
  cfg: ResolvedConfig,
  model: LanguageModel,
  params: Any,
  lengths: tuple[int, int, int],
  setting: Setting,
) -> list[Result]:
  """Prompts and answers of one batch, checked against a forward pass without a cache."""
  batch, prompt, new = lengths
  request = random_request(cfg, *lengths)
  greedy = make_sampling(batch, temperature=0.0)
  prepared = prepare_params(params, cfg.model)  # once for many calls
  start = functools.partial(generate, model, prepared, request, greedy)

  def started() -> tuple[Any, Callable[[], list]]:
    answer = start()
    return next(answer), lambda: list(answer)

  sides = {
    "prefill": Side(lambda: next(start())),
    "decode": Side(lambda first, rest: [first, *rest()], started),
  }
  timings = {name: measure({name: side}, setting)[name] for name, side in sides.items()}
  tokens = whole_answer(timings["decode"].result)
  gate = check(model, params, request, tokens)
  shape = f"{cfg.model.depth}x{cfg.model.width} B{batch}"
  amounts = {"prefill": batch * prompt, "decode": batch * (new - 1)}
  works = {
    "prefill": prefill_work(cfg, batch, prompt),
    "decode": answer_work(cfg, batch, prompt, new),
  }
  results = []
  for name, amount in amounts.items():
    case = f"{name} {shape} {prompt if name == 'prefill' else f'{prompt}+{new - 1}'}"
    result = timed(("decode", case), timings[name], "tokens/s", amount, works[name])
    result.correct = gate
    results.append(result)
  return results


def check(
  model: LanguageModel,
  params: Any,
  request: Request,
  tokens: np.ndarray,
  count: int = CHECKED_TOKENS,
) -> str:
  """The first tokens of each answer are the likeliest of a forward pass over all."""
  count = min(count, tokens.shape[1])
  rows = np.concatenate([np.asarray(request.prompts), tokens[:, :count]], 1)
  text = f"{count} tokens of each answer are the likeliest of an uncached forward pass"
  allowed = LOGIT_TOLERANCE[jnp.dtype(model.run.dtype).name]
  if not behind(model, params, rows, count) <= allowed:
    raise FlaxLMError(f"a speed without a result: it is not so that {text}")
  return text


@functools.partial(jax.jit, static_argnames=("model", "count"))
def behind(model: LanguageModel, params: Any, rows: jax.Array, count: int) -> jax.Array:
  """How far below the highest logit those of the last `count` tokens are, at most: / the
  logits' range."""
  logits = model.apply({"params": params}, rows).value[:, -count - 1 : -1]
  logits = logits.astype(jnp.float32)
  chosen = jnp.take_along_axis(logits, rows[:, -count:, None], -1)[..., 0]
  return ((logits.max(-1) - chosen) / (logits.max(-1) - logits.min(-1))).max()


def check_both(
  model: LanguageModel, params: Any, request: Request, ours: Any, theirs: Any
) -> str:
  """As `check`, of every token and either side; where a near tie falls either way they go
  on differently."""
  for tokens in (ours, theirs):
    text = check(model, params, request, tokens, tokens.shape[1])
  return f"{(ours == theirs).mean():.1%} of the tokens are the same; {text}"


def prefill_work(cfg: ResolvedConfig, batch: int, prompt: int) -> Work:
  work = forward_work(cfg.model, batch, prompt)
  dtype = cfg.training.dtype
  weights = float(read_parameters(cfg, batch * prompt) * jnp.dtype(dtype).itemsize)
  return Work(work.matmul + work.head / prompt + work.attention, weights, dtype, weights)


def answer_work(cfg: ResolvedConfig, batch: int, prompt: int, new: int) -> Work:
  """All steps of an answer; the cache at its mean length."""
  steps = new - 1
  flops, weights, cache = decode_work(cfg, batch, prompt + new // 2)
  touched = weights + cache
  return Work(steps * flops, steps * touched, cfg.training.dtype, touched)
