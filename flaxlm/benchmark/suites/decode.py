# SPDX-License-Identifier: Apache-2.0
"""Greedy decoding by batch: the prefill of the prompts, and the decoding after it.

A decoding step reads every weight and the cache (`planning.decoding.decode_work`); a
prefill is a forward pass in which the head sees only the last token. With a peer, whole
answers of GPT-2's smallest shape are timed, prefill included, because peers do not report
the two separately.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flaxlm.benchmark.measure import (
  BenchOptions,
  Side,
  measure,
  measure_alone,
  timed,
  wrong_result,
)
from flaxlm.benchmark.report import Demand, Result, summarise, with_ratio
from flaxlm.benchmark.suites.memory import PASSES, ROW
from flaxlm.config import (
  ModelConfig,
  ResolvedConfig,
  ResolvedModel,
  TrainingConfig,
  load_config,
)
from flaxlm.cost import forward_work
from flaxlm.decoding.generate import generate
from flaxlm.decoding.prefill import Request
from flaxlm.decoding.sampling import make_sampling
from flaxlm.decoding.weights import prepare_params
from flaxlm.nn.base import LanguageModel
from flaxlm.nn.models import build_model, init_params
from flaxlm.planning.decoding import decode_work, read_parameters
from flaxlm.platform import fused_kernel

CHECKED_TOKENS = 8
# How far a token's logit may be below the highest to count as the likeliest, / their range.
LOGIT_TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
ROUNDED_TOLERANCE = 0.05  # the same for weights in int8


def bench_decode(options: BenchOptions) -> list[Result]:
  """Tokens per second of prefills and of answers, by batch."""
  cfg, prompt, new = llama_shape(options)
  model, params = random_model(cfg)
  results = []
  for batch in options.pick((2,), (1, 4, 16), (1, 8, 64)):
    request = random_request(cfg, batch, prompt, new)
    results += bench_request(cfg, model, params, request, options)
  results += bench_narrow(options)
  if options.peer is not None:
    results += bench_against(options.peer, options)
  return results


def bench_request(
  cfg: ResolvedConfig,
  model: LanguageModel,
  params: Any,
  request: Request,
  options: BenchOptions,
) -> list[Result]:
  """Prefill and decoding of one batch, checked against a forward pass without a cache."""
  sides = answer_sides(model, params, request)
  prefill = measure_alone(sides["prefill"], options)
  decode = measure_alone(sides["steps"], options)
  answer = whole_answer(decode.result)[:, :CHECKED_TOKENS]
  gate = check_likeliest(model, params, request, answer)
  batch, prompt, steps = (
    len(request.prompts),
    len(request.prompts[0]),
    request.max_new_tokens - 1,
  )
  shape = f"{cfg.model.depth}x{cfg.model.width} B{batch}"
  figures = (
    (f"prefill {shape} {prompt}", prefill, prompt, prefill_demand(cfg, batch, prompt)),
    (f"decode {shape} {prompt}+{steps}", decode, steps, answer_demand(cfg, request)),
  )
  return [
    timed("decode", case, timing, "tokens/s", gate, batch * tokens, demand)
    for case, timing, tokens, demand in figures
  ]


def bench_narrow(options: BenchOptions) -> list[Result]:
  """Steps of one row with weights in int8, beside the same in the weights' own dtype."""
  cfg, prompt, new = gpt2_shape(options)
  model, params = random_model(cfg)
  request = random_request(cfg, 1, prompt, new)
  dtype = cfg.training.dtype
  kinds: dict[str, str | None] = {dtype: None, "int8": "int8"}
  sides = {
    name: answer_sides(model, params, request, kind)["steps"]
    for name, kind in kinds.items()
  }
  timings = measure(sides, options)
  tokens = {name: whole_answer(timing.result) for name, timing in timings.items()}
  gate = check_likeliest(model, params, request, tokens[dtype])
  gate = f"{check_rounded(model, params, request, tokens['int8'])}; in {dtype} {gate}"
  case = f"decode {cfg.model.depth}x{cfg.model.width} B1 {prompt}+{new - 1}, int8 weights"
  result = timed("decode", case, timings["int8"], "tokens/s", gate, new - 1)
  ours, theirs = timings["int8"].rounds, timings[dtype].rounds
  return [with_ratio(result, dtype, ours, theirs, gate)]


# -- Against a peer ------------------------------------------------------------------------


def bench_against(peer: str, options: BenchOptions) -> list[Result]:
  """Whole answers, ours and the peer's in turn, with the same weights.

  Two more figures say which share of our time, of the whole answer and of the steps after
  the prefill, it would take only to read the memory that they read.
  """
  cfg, prompt, new = gpt2_shape(options)
  model, params = random_model(cfg)
  answer = load_peer(peer, cfg, model, params)
  results = []
  for batch in options.pick((2,), (1, 8), (1, 8, 64)):
    if batch > 1 and peer == "llama.cpp":
      continue  # its Python binding answers one row at a time
    request = random_request(cfg, batch, prompt, new)
    own = answer_sides(model, params, request)
    # As many bytes as a step reads of weights, read by the fastest pass of `memory`.
    length = read_parameters(cfg, batch) // ROW * ROW
    numbers = jnp.ones(length, cfg.training.dtype)
    sides = {
      "flaxlm": own["whole"],
      peer: Side(functools.partial(answer, request.prompts, new)),
      "prefill": own["prefill"],
      "read": Side(jax.jit(PASSES["read"][0]), functools.partial(tuple, (numbers, None))),
    }
    timings = measure(sides, options)
    ours, theirs = timings["flaxlm"], timings[peer]
    gate = check_both(model, params, request, ours.result, theirs.result)
    case = f"answer {cfg.model.depth}x{cfg.model.width} B{batch} {prompt}+{new}"
    demand = answer_demand(cfg, request)
    result = timed("decode", case, ours, "tokens/s", gate, batch * new, demand)
    results.append(with_ratio(result, peer, ours.rounds, theirs.rounds, gate))
    # A step reads the weights and the cache; the prefill reads the weights once.
    whole, prefill, read = (
      np.array(timings[name].rounds) for name in ("flaxlm", "prefill", "read")
    )
    read_by_steps = read * demand.bytes / numbers.nbytes
    shares = {
      "answer": (read + read_by_steps) / whole,
      "steps": read_by_steps / (whole - prefill),
    }
    for part, share in shares.items():
      name = f"{case}, of reading in {part}"
      results.append(summarise("decode", name, share.tolist(), "of the time", gate))
  return results


def load_peer(
  peer: str, cfg: ResolvedConfig, model: LanguageModel, params: Any
) -> Callable[..., np.ndarray]:
  """A function of prompts and a number of new tokens that the peer answers greedily."""
  if peer == "torch":
    from flaxlm.benchmark.peers.hugging_face import load_transformers

    return load_transformers(cfg, params)
  from flaxlm.benchmark.peers.llama_cpp import load_llama_cpp

  return load_llama_cpp(cfg, model, params)


# -- Models and requests -------------------------------------------------------------------


def llama_shape(options: BenchOptions) -> tuple[ResolvedConfig, int, int]:
  """A LLaMA shape, the prompt's length, and the number of new tokens."""
  depth, width, heads, vocab, prompt, new = options.pick(
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
  return with_precision(model, options), prompt, new


def gpt2_shape(options: BenchOptions) -> tuple[ResolvedConfig, int, int]:
  """GPT-2 with 124M parameters, the prompt's length, and the number of new tokens."""
  model = load_config("gpt2_124m").model
  if options.size == "tiny":
    shape = dict(depth=1, width=16, num_heads=2, vocab_size=512, context=64, ffn_width=None)
    model = dataclasses.replace(model, **shape)  # type: ignore[arg-type]
  return with_precision(model.resolve(), options), 32, options.pick(9, 128, 128)


def with_precision(model: ResolvedModel, options: BenchOptions) -> ResolvedConfig:
  """Weights are as wide as the computation."""
  dtype = options.float_dtype
  training = TrainingConfig(dtype=dtype, param_dtype=dtype)
  return ResolvedConfig(model=model, training=training)


def whole_answer(blocks: Iterable[Any]) -> np.ndarray:
  return np.concatenate([block.tokens_BT for block in blocks], 1)


def random_model(cfg: ResolvedConfig) -> tuple[LanguageModel, Any]:
  model = build_model(cfg.model, cfg.training, fused_kernel())
  init = jax.jit(lambda seed: nn.unbox(init_params(model, seed)))
  return model, init(jnp.uint32(0))


def random_request(cfg: ResolvedConfig, batch: int, prompt: int, new: int) -> Request:
  V = cfg.model.vocab_size
  prompts = np.random.default_rng(0).integers(0, V, (batch, prompt)).tolist()
  return Request(prompts, new, num_ids=V)


def answer_sides(
  model: LanguageModel, params: Any, request: Request, kind: str | None = None
) -> dict[str, Side]:
  """The prefill, the steps after it, and the whole of a greedy answer; the parameters are
  prepared once for many calls, stored as `kind`."""
  prepared = prepare_params(params, model.cfg, kind)
  greedy = make_sampling(len(request.prompts), temperature=0.0)
  start = functools.partial(generate, model, prepared, request, greedy)

  def started() -> tuple[Any, Callable[[], list]]:
    answer = start()
    return next(answer), lambda: list(answer)

  return {
    "prefill": Side(lambda: next(start())),
    "steps": Side(lambda first, rest: [first, *rest()], started),
    "whole": Side(lambda: whole_answer(start())),
  }


# -- What is checked -----------------------------------------------------------------------


def check_likeliest(
  model: LanguageModel, params: Any, request: Request, tokens: np.ndarray
) -> str:
  """Checks that each answer consists of the likeliest tokens of a forward pass."""
  text = (
    f"{tokens.shape[1]} tokens of each answer are the likeliest of an uncached forward pass"
  )
  allowed = LOGIT_TOLERANCE[jnp.dtype(model.execution.dtype).name]
  if not deficit_of(model, params, request, tokens) <= allowed:
    raise wrong_result(f"it is not true that {text}")
  return text


def check_rounded(
  model: LanguageModel, params: Any, request: Request, tokens: np.ndarray
) -> str:
  """Checks that rounded weights choose tokens that are nearly the likeliest, or are."""
  deficit = deficit_of(model, params, request, tokens)
  if not deficit <= ROUNDED_TOLERANCE:
    raise wrong_result(f"with int8 weights a logit is {deficit:.1%} below the highest")
  return f"int8 chooses tokens whose logits are at most {deficit:.1%} below the highest"


def deficit_of(
  model: LanguageModel, params: Any, request: Request, tokens: np.ndarray
) -> float:
  """`largest_deficit` of answers, read after their prompts."""
  rows = np.concatenate([np.asarray(request.prompts), tokens], 1)
  return float(largest_deficit(model, params, rows, tokens.shape[1]))


@functools.partial(jax.jit, static_argnames=("model", "count"))
def largest_deficit(
  model: LanguageModel, params: Any, rows: jax.Array, count: int
) -> jax.Array:
  """How far the logits of the last `count` tokens are below the highest at most, as a share
  of the logits' range."""
  logits = model.apply({"params": params}, rows).value[:, -count - 1 : -1]
  logits = logits.astype(jnp.float32)
  chosen = jnp.take_along_axis(logits, rows[:, -count:, None], -1)[..., 0]
  return ((logits.max(-1) - chosen) / (logits.max(-1) - logits.min(-1))).max()


def check_both(
  model: LanguageModel, params: Any, request: Request, ours: Any, theirs: Any
) -> str:
  """Checks every token of both sides; after a near tie their answers may differ."""
  for tokens in (ours, theirs):
    text = check_likeliest(model, params, request, tokens)
  return f"{(ours == theirs).mean():.1%} of the tokens are the same; {text}"


# -- What there is to do -------------------------------------------------------------------


def prefill_demand(cfg: ResolvedConfig, batch: int, prompt: int) -> Demand:
  work = forward_work(cfg.model, batch, prompt)
  dtype = cfg.training.dtype
  weights = float(read_parameters(cfg, batch * prompt) * jnp.dtype(dtype).itemsize)
  return Demand(work.matmul + work.head / prompt + work.attention, weights, dtype, weights)


def answer_demand(cfg: ResolvedConfig, request: Request) -> Demand:
  """All steps of an answer, with the cache at its mean length."""
  steps = request.max_new_tokens - 1
  length = len(request.prompts[0]) + request.max_new_tokens // 2
  flops, weights, cache = decode_work(cfg, len(request.prompts), length)
  num_bytes = weights + cache
  return Demand(steps * flops, steps * num_bytes, cfg.training.dtype, num_bytes)
