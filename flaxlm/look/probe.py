# SPDX-License-Identifier: Apache-2.0
"""What passes through a model while it reads one text: its vectors, queries and experts.

The model runs as it always does. An interceptor of Linen's method calls keeps what goes
into its modules and comes out of them, so that nothing is computed a second time here.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxlm.nn.attention import Attention
from flaxlm.nn.base import LanguageModel
from flaxlm.nn.block import Block
from flaxlm.nn.moe import MoE, route
from flaxlm.nn.rnn import RecurrentBlock
from flaxlm.nn.stack import Stack
from flaxlm.nn.vocabulary import mask_padding_ids

NUM_LENS = 3  # tokens that the stream would say


@functools.partial(jax.jit, static_argnames=("model", "layer"))
def probe(
  model: LanguageModel,
  params: Any,
  tokens_BT: jax.Array,
  source: Any,
  layer: int,
  num_ids: jax.Array,
) -> dict[str, jax.Array]:
  """What the first row becomes, by name; the layer is one of the decoder if there are two.

  `embedded` (T, D), `stream` (L + 1, T, D): before the first layer and after each;
  `logits` (T, V); `lens_ids` and `lens_chances` (L + 1, T, X): what each of `stream` would
  say, if it were the last. Of `layer`: `self` and `cross` (N, T, S): attention weights;
  `queries` (T, N, H), `keys` (S, K, H) and `heads` (N, T): the length of the vector that
  each head adds; `neurons` (T, F); an RNN's `state` (T, D), the h of its cell. `experts`
  and `shares` (L, T, A) of a mixture. What a model has not is left out. `num_ids` are the
  tokenizer's: later ids have no chance.
  """
  found: dict[str, Any] = {}
  blocks: list[dict[str, Any]] = []
  options: dict[str, Any] = {} if source is None else {"source": source}
  if model.cfg.family != "rnn":
    options["capture"] = True
  with nn.intercept_methods(functools.partial(watch, found, blocks)):
    output = model.apply({"params": params}, tokens_BT, **options)
  blocks = blocks[-model.cfg.depth :]  # an encoder's came first
  stream_LBTD = jnp.stack([blocks[0]["input"], *(block["output"] for block in blocks)])

  def say(x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
    logits_TV = model.apply({"params": params}, x_BTD, method=speak)[0]
    chances_TV = jax.nn.softmax(mask_padding_ids(logits_TV, num_ids))
    return jax.lax.top_k(chances_TV, NUM_LENS)

  lens_chances, lens_ids = jax.lax.map(say, stream_LBTD)
  chosen = blocks[layer]
  result = {
    "embedded": found["embedded"][0],
    "stream": stream_LBTD[:, 0],
    "logits": output.value[0],
    "lens_ids": lens_ids,
    "lens_chances": lens_chances,
    **{name: x[0] for name, x in chosen.items() if name in ("queries", "keys", "neurons")},
  }
  if "heads" in chosen:
    result["heads"] = chosen["heads"]
    maps = output.attention
    result |= {name: maps[name][layer, 0] for name in ("self", "cross") if name in maps}
  if model.cfg.family == "rnn":
    result["state"] = (chosen["output"] - chosen["input"])[0]
  if "router" in chosen:
    everyone = jnp.ones(tokens_BT.shape, bool)
    routes = [route(model.cfg, block["router"], everyone) for block in blocks]
    result["shares"] = jnp.stack([weights_BTA[0] for weights_BTA, _ in routes])
    result["experts"] = jnp.stack([experts_BTA[0] for _, experts_BTA in routes])
  is_narrow = lambda x: jnp.issubdtype(x.dtype, jnp.floating)  # NumPy has no bfloat16
  return {n: x.astype(jnp.float32) if is_narrow(x) else x for n, x in result.items()}


def watch(
  found: dict[str, Any],
  blocks: list[dict[str, Any]],
  next_fun: Any,
  args: tuple,
  kwargs: Any,
  context: Any,
) -> Any:
  """Keeps what `probe` tells of: in `found` of the model, in `blocks` of each layer."""
  module, method = context.module, context.method_name
  is_block = isinstance(module, (Block, RecurrentBlock)) and method == "__call__"
  if is_block:
    blocks.append({"input": args[0]})
  if module.path == ("attention", "o"):
    out, blocks[-1]["heads"] = project_heads(next_fun, *args)
    return out
  out = next_fun(*args, **kwargs)
  if is_block:
    blocks[-1]["output"] = out[0]
  elif isinstance(module, LanguageModel) and method == "embed":
    found["embedded"] = out  # of the target, after that of a source
  elif isinstance(module, Attention) and module.name == "attention":
    if method == "queries":
      blocks[-1]["queries"] = out
    elif method == "keys_values":
      blocks[-1]["keys"] = out[0]
  elif isinstance(module, MoE) and method == "project" and args[0] == "router":
    blocks[-1]["router"] = out
  elif module.path == ("ffn", "down"):
    blocks[-1]["neurons"] = args[0]
  return out


def project_heads(project: Any, out_BTNH: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The output projection (B, T, D); and how long a vector each head of the first row adds
  to the stream (N, T), without the bias, which is no head's."""
  B, N = out_BTNH.shape[0], out_BTNH.shape[2]
  only_NN = jnp.eye(N, dtype=out_BTNH.dtype)
  alone_NTNH = out_BTNH[:1] * only_NN[:, None, :, None]
  none_1TNH = jnp.zeros_like(out_BTNH[:1])
  # Linen lets a module be called once: what it adds for each head are more rows.
  out_XTD = project(jnp.concatenate([out_BTNH, alone_NTNH, none_1TNH]))
  added_NTD = (out_XTD[B : B + N] - out_XTD[B + N :]).astype(jnp.float32)
  return out_XTD[:B], jnp.linalg.norm(added_NTD, axis=-1)


def speak(model: Any, x_BTD: jax.Array) -> jax.Array:
  """The logits of a stream, as if its last layer were done (nostalgebraist, 2020)."""
  stack = {"encoder_decoder": "decoder", "rnn": ""}.get(model.cfg.family, "stack")
  owner: Stack | LanguageModel = getattr(model, stack) if stack else model
  if model.cfg.family == "rnn" or model.cfg.norm_placement != "post":
    x_BTD = owner.final_norm(x_BTD)
  return model.logits(x_BTD)
