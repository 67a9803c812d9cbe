# SPDX-License-Identifier: Apache-2.0
"""A whole training step in float64 numpy: models, losses, gradients, update.

Written from the papers, like `references`, and shares no code with flaxlm. Gradients come
from a tape (`Tensor`), so JAX's automatic differentiation is not shared either. `cfg` is a
resolved `ModelConfig`; `batch` has the fields of a `Batch`.

Dropout's masks are inputs: `factors` are the arrays that activations are multiplied by, 0
where a unit is dropped and 1 / (1 - rate) elsewhere, in the order in which they are used.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import references
from reference_positions import relative_bucket, rotation

# -- Reverse-mode differentiation --------------------------------------------------------


class Tensor:
  """A float64 array that remembers what it was computed from.

  `parents` are pairs of a tensor and the function that turns a gradient with respect to
  this tensor into one with respect to that one.
  """

  __array_ufunc__ = None  # numpy_array * tensor is ours to compute
  numbers = itertools.count()  # a tensor has a larger one than all that it comes from

  def __init__(self, value, parents=()):
    self.value = np.asarray(value, np.float64)
    self.parents = parents
    self.number = next(self.numbers)

  def __add__(self, other):
    other = as_tensor(other)
    return Tensor(
      self.value + other.value,
      (
        (self, lambda g: summed_to(g, self.value.shape)),
        (other, lambda g: summed_to(g, other.value.shape)),
      ),
    )

  def __mul__(self, other):
    other = as_tensor(other)
    return Tensor(
      self.value * other.value,
      (
        (self, lambda g: summed_to(g * other.value, self.value.shape)),
        (other, lambda g: summed_to(g * self.value, other.value.shape)),
      ),
    )

  def __pow__(self, exponent: float):
    derivative = exponent * self.value ** (exponent - 1)
    return Tensor(self.value**exponent, ((self, lambda g: g * derivative),))

  def __getitem__(self, index):
    def scattered(g):
      whole = np.zeros_like(self.value)
      np.add.at(whole, index, g)
      return whole

    return Tensor(self.value[index], ((self, scattered),))

  def __sub__(self, other):
    return self + -1 * as_tensor(other)

  def __truediv__(self, other):
    return self * as_tensor(other) ** -1

  __radd__, __rmul__ = __add__, __mul__

  def sum(self, axis=None, keepdims=False):
    def spread(g):
      if axis is not None and not keepdims:
        g = np.expand_dims(g, axis)
      return np.broadcast_to(g, self.value.shape)

    return Tensor(self.value.sum(axis, keepdims=keepdims), ((self, spread),))

  def mean(self, axis):
    return self.sum(axis, keepdims=True) * (1 / self.value.shape[axis])


def as_tensor(x) -> Tensor:
  return x if isinstance(x, Tensor) else Tensor(x)


def summed_to(gradient, shape):
  """The gradient with respect to an operand of `shape` that was broadcast."""
  gradient = gradient.sum(tuple(range(gradient.ndim - len(shape))))
  ones = tuple(axis for axis, size in enumerate(shape) if size == 1)
  return gradient.sum(ones, keepdims=True)


def exp(x: Tensor) -> Tensor:
  y = np.exp(x.value)
  return Tensor(y, ((x, lambda g: g * y),))


def log(x: Tensor) -> Tensor:
  return Tensor(np.log(x.value), ((x, lambda g: g / x.value),))


def tanh(x: Tensor) -> Tensor:
  y = np.tanh(x.value)
  return Tensor(y, ((x, lambda g: g * (1 - y**2)),))


def einsum(equation: str, x: Tensor, y: Tensor) -> Tensor:
  """Of two tensors; each letter of one is also in the other or in the result."""
  x_letters, y_letters, result = equation.replace("->", ",").split(",")
  to_x = f"{result},{y_letters}->{x_letters}"
  to_y = f"{result},{x_letters}->{y_letters}"
  return Tensor(
    np.einsum(equation, x.value, y.value),
    (
      (x, lambda g: np.einsum(to_x, g, y.value)),
      (y, lambda g: np.einsum(to_y, g, x.value)),
    ),
  )


def concatenate(tensors: list[Tensor], axis: int) -> Tensor:
  edges = np.cumsum([0, *(t.value.shape[axis] for t in tensors)])

  def part(n):
    return lambda g: g.take(np.arange(edges[n], edges[n + 1]), axis)

  parents = tuple((tensor, part(n)) for n, tensor in enumerate(tensors))
  return Tensor(np.concatenate([t.value for t in tensors], axis), parents)


def gradients(result: Tensor, leaves: Any) -> Any:
  """d result / d leaf for a nested dict of tensors; the result is a number."""
  reached, waiting = {}, [result]
  while waiting:
    tensor = waiting.pop()
    if tensor.number not in reached:
      reached[tensor.number] = tensor
      waiting.extend(parent for parent, _ in tensor.parents)
  found = {result.number: np.ones(())}
  for number in sorted(reached, reverse=True):  # a tensor's gradient is complete by then
    for parent, to_parent in reached[number].parents:
      more = to_parent(found[number])
      found[parent.number] = found.get(parent.number, 0.0) + more
  return map_tree(lambda leaf: found.get(leaf.number, np.zeros_like(leaf.value)), leaves)


def map_tree(function, tree, *others):
  if not isinstance(tree, dict):
    return function(tree, *others)
  return {
    name: map_tree(function, child, *(other[name] for other in others))
    for name, child in tree.items()
  }


# -- Layers ------------------------------------------------------------------------------


def sigmoid(x: Tensor) -> Tensor:
  return 0.5 * tanh(0.5 * x) + 0.5


def activate(kind: str, x: Tensor) -> Tensor:
  if kind == "silu":
    return x * sigmoid(x)
  assert kind == "gelu_tanh", kind
  return 0.5 * x * (tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)) + 1)


def log_sum_exp(x: Tensor) -> Tensor:
  """Over the last axis, which is dropped."""
  highest = x.value.max(-1, keepdims=True)
  return log(exp(x - highest).sum(-1)) + highest[..., 0]


def softmax(x: Tensor, axis: int) -> Tensor:
  e = exp(x - x.value.max(axis, keepdims=True))
  return e / e.sum(axis, keepdims=True)


def norm(params, cfg, x: Tensor) -> Tensor:
  if cfg.norm == "layernorm":
    x = x - x.mean(-1)
  x = x * ((x * x).mean(-1) + cfg.norm_epsilon) ** -0.5 * params["scale"]
  return x + params["bias"] if "bias" in params else x


def linear(params, equation: str, x: Tensor) -> Tensor:
  y = einsum(equation, x, params["kernel"])
  return y + params["bias"] if "bias" in params else y


def feed_forward(params, cfg, x_BTD: Tensor) -> Tensor:
  h_BTF = linear(params["up"], "BTD,DF->BTF", x_BTD)
  if cfg.gated:
    gate_BTF = linear(params["gate"], "BTD,DF->BTF", x_BTD)
    h_BTF = activate(cfg.activation, gate_BTF) * h_BTF
  else:
    h_BTF = activate(cfg.activation, h_BTF)
  return linear(params["down"], "BTF,FD->BTD", h_BTF)


def mixture(params, cfg, x_BTD: Tensor, real_BT) -> tuple[Tensor, dict[str, Tensor]]:
  """Every expert serves every token, and the weights of those not chosen are zero.

  With the two losses of the router, summed over the tokens that are real.
  """
  E, A = cfg.moe.num_experts, cfg.moe.experts_per_token
  logits_BTE = linear(params["router"], "BTD,DE->BTE", x_BTD)
  p_BTE = softmax(logits_BTE, -1)
  rank_BTE = (-p_BTE.value).argsort(-1).argsort(-1)
  chosen_BTE = (rank_BTE < A) & real_BT[..., None]
  weights_BTE = p_BTE * chosen_BTE
  weights_BTE = weights_BTE / (weights_BTE.sum(-1, keepdims=True) + ~real_BT[..., None])
  y_BTD = Tensor(0.0)
  for e in range(E):
    expert = map_tree(lambda kernel, e=e: kernel[e], params["experts"])
    y_BTD = y_BTD + feed_forward(expert, cfg, x_BTD) * weights_BTE[..., e : e + 1]
  # Fedus et al. (2021), equation 4, of each row, times its tokens; Zoph et al. (2022), 5.
  shares_BE = chosen_BTE.sum(1) / (A * real_BT.sum(1, keepdims=True))
  load_balance = E * ((p_BTE * real_BT[..., None]).sum(1) * shares_BE).sum()
  router_z = (log_sum_exp(logits_BTE) ** 2 * real_BT).sum()
  return y_BTD, {"load_balance": load_balance, "router_z": router_z}


def attention(params, x_BTD, source_BSD, mask_BTS, bias_TSN=0.0, turn=lambda x: x):
  """Grouped-query attention to what the mask shows."""
  q_BTNH = turn(linear(params["q"], "BTD,DNH->BTNH", x_BTD))
  k_BSKH = turn(linear(params["k"], "BSD,DKH->BSKH", source_BSD))
  v_BSKH = linear(params["v"], "BSD,DKH->BSKH", source_BSD)
  N, K, H = q_BTNH.value.shape[2], *k_BSKH.value.shape[2:]
  reads = np.arange(N) // (N // K)
  scores_BTSN = einsum("BTNH,BSNH->BTSN", q_BTNH, k_BSKH[:, :, reads]) * H**-0.5
  scores_BTSN = scores_BTSN + bias_TSN + np.where(mask_BTS, 0, -1e30)[..., None]
  weights_BTSN = softmax(scores_BTSN, 2)
  y_BTNH = einsum("BTSN,BSNH->BTNH", weights_BTSN, v_BSKH[:, :, reads])
  return linear(params["o"], "BTNH,NHD->BTD", y_BTNH)


def score_bias(params, cfg, T: int, causal: bool):
  """T5's bias of every layer's scores (T, S, N), by distance."""
  if cfg.positions != "relative":
    return 0.0
  sizes = (cfg.relative_buckets, cfg.relative_distance, causal)
  buckets_TS = [[relative_bucket(s - t, *sizes) for s in range(T)] for t in range(T)]
  return params["relative_bias"]["table"][np.array(buckets_TS)]


def turned(cfg, positions_BT, local: bool):
  """RoPE as a function of queries or keys (B, T, N, H)."""
  angles, factor = rotation(cfg, cfg.head_dim, local)
  half = len(angles)
  turns = positions_BT[:, :, None, None] * np.array(angles)
  cos, sin = factor * np.cos(turns), factor * np.sin(turns)

  def turn(x: Tensor) -> Tensor:
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return concatenate([first * cos - second * sin, second * cos + first * sin, rest], -1)

  return turn


# -- Models ------------------------------------------------------------------------------


def transformer(params, table, cfg, tokens_BT, places, drop, causal=True, source=None):
  """(hidden vectors, the experts' losses) of one stack; `places` are (positions, segments).

  `source` is what cross-attention reads, (hidden vectors, segments); `drop` is dropout.
  """
  positions_BT, segments_BT = places
  T = tokens_BT.shape[1]
  x_BTD = table[tokens_BT]
  if cfg.positions == "learned":
    x_BTD = x_BTD + params["positions"]["table"][positions_BT]
  if cfg.embedding_norm:
    x_BTD = norm(params["embedding_norm"], cfg, x_BTD)
  x_BTD = drop(x_BTD)
  slots = np.arange(T)
  same_BTS = segments_BT[:, :, None] == segments_BT[:, None]
  mask_BTS = same_BTS & (slots <= slots[:, None]) if causal else same_BTS
  bias_TSN = score_bias(params, cfg, T, causal)
  losses: dict[str, Any] = {}
  for l in range(params["blocks"]["attention"]["q"]["kernel"].value.shape[0]):
    block = map_tree(lambda stacked, l=l: stacked[l], params["blocks"])
    local = cfg.period[l % len(cfg.period)] == "L"
    near = np.abs(slots - slots[:, None]) < cfg.window if local else True
    turn = turned(cfg, positions_BT, local) if cfg.positions == "rope" else lambda x: x

    def attend(x_BTD, block=block, near=near, turn=turn):
      seen = (mask_BTS & near, bias_TSN, turn)
      return attention(block["attention"], x_BTD, x_BTD, *seen)

    def cross_attend(x_BTD, block=block):
      source_BSD, source_segments_BS = source
      mask_BTS = segments_BT[:, :, None] == source_segments_BS[:, None]
      return attention(block["cross_attention"], x_BTD, source_BSD, mask_BTS)

    def feed(x_BTD, block=block):
      if not cfg.moe.num_experts:
        return feed_forward(block["ffn"], cfg, x_BTD)
      y_BTD, found = mixture(block["ffn"], cfg, x_BTD, segments_BT > 0)
      losses.update({name: loss + losses.get(name, 0.0) for name, loss in found.items()})
      return y_BTD

    branches = {"attention": attend, "cross_attention": cross_attend, "ffn": feed}
    if source is None:
      del branches["cross_attention"]
    for name, branch in branches.items():
      if cfg.norm_placement == "post":
        x_BTD = norm(block[f"{name}_norm"], cfg, x_BTD + drop(branch(x_BTD)))
      else:
        x_BTD = x_BTD + drop(branch(norm(block[f"{name}_norm"], cfg, x_BTD)))
  if cfg.norm_placement != "post":
    x_BTD = norm(params["final_norm"], cfg, x_BTD)
  return x_BTD, losses


def lstm(params, cfg, tokens_BT, segments_BT, drop):
  """Layers of LSTMs, each behind a norm and added to its input; a document begins with an
  empty state."""
  x_BTD = drop(params["embedding"]["table"][tokens_BT])
  T = tokens_BT.shape[1]
  for l in range(cfg.depth):
    block = map_tree(lambda stacked, l=l: stacked[l], params["blocks"])
    cell, h_BTD = block["cell"], norm(block["norm"], cfg, x_BTD)
    c_BD, y_BD, outputs = Tensor(0.0), Tensor(np.zeros_like(h_BTD.value[:, 0])), []
    for t in range(T):
      if t:
        continues_B1 = segments_BT[:, t, None] == segments_BT[:, t - 1, None]
        c_BD, y_BD = c_BD * continues_B1, y_BD * continues_B1

      def gate(name, now_BD=h_BTD[:, t], y_BD=y_BD, cell=cell):
        of_input = linear(cell[f"i{name}"], "BD,DE->BE", now_BD)
        return of_input + linear(cell[f"h{name}"], "BD,DE->BE", y_BD)

      c_BD = sigmoid(gate("f")) * c_BD + sigmoid(gate("i")) * tanh(gate("g"))
      y_BD = sigmoid(gate("o")) * tanh(c_BD)
      outputs.append(y_BD[:, None])
    x_BTD = x_BTD + drop(concatenate(outputs, 1))
  return norm(params["final_norm"], cfg, x_BTD)


def logits_and_losses(params, cfg, batch, factors: Iterator):
  """Logits (B, T, V) of the ids that stand for tokens, and the experts' losses."""
  drop = lambda x: x * next(factors)
  table = params["embedding"]["table"]
  losses: dict[str, Tensor] = {}
  places = (batch.positions_BT, batch.segments_BT)
  if cfg.family == "rnn":
    x_BTD = lstm(params, cfg, batch.tokens_BT, batch.segments_BT, drop)
  elif cfg.family == "encoder_decoder":
    read = (batch.source_BS, (batch.source_positions_BS, batch.source_segments_BS))
    memory_BSD, _ = transformer(params["encoder"], table, cfg, *read, drop, causal=False)
    source = (memory_BSD, batch.source_segments_BS)
    written = (batch.tokens_BT, places)
    x_BTD, _ = transformer(params["decoder"], table, cfg, *written, drop, source=source)
  else:
    causal = cfg.family == "decoder"
    x_BTD, losses = transformer(
      params, table, cfg, batch.tokens_BT, places, drop, causal=causal
    )
  if cfg.tied_embeddings:
    logits_BTV = einsum("BTD,VD->BTV", x_BTD, table)
  else:
    logits_BTV = linear(params["head"], "BTD,DV->BTV", x_BTD)
  if cfg.head_biased:
    logits_BTV = logits_BTV + params["head_bias"]
  if cfg.logit_softcap is not None:
    logits_BTV = cfg.logit_softcap * tanh(logits_BTV * (1 / cfg.logit_softcap))
  return logits_BTV[..., : cfg.num_ids or cfg.vocab_size], losses


# -- One step ----------------------------------------------------------------------------


def loss_and_gradient(params, cfg, batch, factors, smoothing: float):
  """(loss, gradient, minimised) of part of a batch.

  The loss is the sum of weighted nats. What is minimised differs from it by smoothing
  (Szegedy et al., 2016, section 7) and by the experts' losses times their weights. The
  gradient is the gradient of that.
  """
  leaves = map_tree(Tensor, params)
  logits_BTV, losses = logits_and_losses(leaves, cfg, batch, iter(factors))
  B, T = batch.targets_BT.shape
  at_targets = np.arange(B)[:, None], np.arange(T), batch.targets_BT
  normaliser_BT = log_sum_exp(logits_BTV)
  nats_BT = normaliser_BT - logits_BTV[at_targets]
  uniform_BT = normaliser_BT - logits_BTV.mean(-1)[..., 0]
  smoothed_BT = (1 - smoothing) * nats_BT + smoothing * uniform_BT
  total = (smoothed_BT * batch.weights_BT).sum()
  if losses:
    total = total + cfg.moe.load_balance_weight * losses["load_balance"]
    total = total + cfg.moe.router_z_weight * losses["router_z"]
  loss = float((nats_BT.value * batch.weights_BT).sum())
  return loss, gradients(total, leaves), float(total.value)


def step(params, moments, number, parts, weight, *, cfg, optimizer, training):
  """One AdamW step, the first being number 0, on a batch that comes in parts.

  `parts` are pairs of rows and their dropout factors, `weight` is the weight of all rows
  together. Returns parameters, moments, and what a step reports.
  """
  losses, parts_gradients = [], []
  for batch, factors in parts:
    found = loss_and_gradient(params, cfg, batch, factors, training.label_smoothing)
    losses.append(found[0])
    parts_gradients.append(found[1])
  loss = math.fsum(losses) / weight
  gradient = map_tree(lambda *gs: sum(gs) / weight, *parts_gradients)
  rate = references.learning_rate(
    optimizer.schedule,
    number,
    optimizer.learning_rate,
    optimizer.warmup_steps,
    training.num_steps,
    optimizer.final_fraction,
  )
  params, *moments = references.adamw_step(
    params,
    gradient,
    *moments,
    number + 1,
    lr=rate,
    beta1=optimizer.beta1,
    beta2=optimizer.beta2,
    epsilon=optimizer.epsilon,
    weight_decay=optimizer.weight_decay,
    decay_mask=matrices(params),
    clip_norm=optimizer.clip_norm,
  )
  real = lambda segments: 0 if segments is None else np.sum(np.asarray(segments) > 0)
  squares: list[float] = []
  map_tree(lambda g: squares.append(np.sum(g**2)), gradient)
  reported = {
    "loss": loss,
    "gradient_norm": math.sqrt(sum(squares)),
    "learning_rate": rate,
    "tokens": sum(
      real(rows.segments_BT) + real(rows.source_segments_BS) for rows, _ in parts
    ),
  }
  return params, moments, reported


def matrices(params, name=""):
  """True for what multiplies vectors or is looked up: norms and biases do neither."""
  if isinstance(params, dict):
    return {name: matrices(child, name) for name, child in params.items()}
  return name not in ("scale", "bias", "head_bias", "sinks")
