# SPDX-License-Identifier: Apache-2.0
"""The other parts of a layer as the papers define them, in float64 numpy: norms,
feed-forward, experts, recurrent cells, and how a layer is put together from them.

Nothing of `flaxlm.nn` is used but the parameters and what goes in and out of each part.
"""

import functools
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from flaxlm.config import ResolvedModel
from flaxlm.verify.attention_laws import attention_to_source, self_attention
from flaxlm.verify.case import ROUNDING, Case, Finding, Law, distance, does_not_apply
from flaxlm.verify.layer import Call, Layer, layer_of

Function = Callable[[np.ndarray], np.ndarray]


def kind_of(case: Case) -> str:
  """The kind of layer to look at: a global one, if the model has such."""
  return min(case.model_cfg.period)


# -- Norms ---------------------------------------------------------------------------------


def norms(case: Case) -> Finding:
  """Every norm of a model of one layer, but those of heads."""
  layer = layer_of(case, kind_of(case))
  errors = [
    distance(y_BTD, norm_by_hand(layer.cfg, params, x_BTD))
    for (x_BTD, y_BTD), params in norms_of(layer)
  ]
  return Finding(max(errors))


def norms_of(layer: Layer) -> Iterator[tuple[Call, Any]]:
  """(input and output, parameters) of each norm."""
  for path, call in layer.calls.items():
    if path.endswith("norm"):
      names = [name for name in path.split("/") if name != "stack"]  # it shares its scope
      tree = layer.params if names[0] in layer.params else layer.others
      yield call, functools.reduce(operator.getitem, names, tree)


def norm_by_hand(cfg: ResolvedModel, params: Any, x_BTD: np.ndarray) -> np.ndarray:
  """LayerNorm (Ba et al., 2016) or RMSNorm (Zhang & Sennrich, 2019)."""
  x_BTD = x_BTD.astype(np.float64)
  if cfg.norm == "layernorm":
    x_BTD = x_BTD - x_BTD.mean(-1, keepdims=True)
  size = np.sqrt(np.square(x_BTD).mean(-1, keepdims=True) + cfg.norm_epsilon)
  return x_BTD / size * params["scale"] + params.get("bias", 0.0)


# -- Feed-forward --------------------------------------------------------------------------


def feed_forward(case: Case) -> Finding:
  if case.family == "rnn":
    return does_not_apply("an RNN has no feed-forward")
  if case.model_cfg.moe.num_experts:
    return does_not_apply("there are experts in its place")
  layer = layer_of(case, kind_of(case))
  x_BTD, y_BTD = layer.calls["ffn"]
  return Finding(distance(y_BTD, ffn_by_hand(layer.cfg, layer.params["ffn"], x_BTD)))


def ffn_by_hand(cfg: ResolvedModel, params: Any, x: np.ndarray) -> np.ndarray:
  """down(f(up(x))), or down(f(gate(x)) up(x)) (Shazeer, 2020)."""
  dense = lambda name, x: x @ params[name]["kernel"] + params[name].get("bias", 0.0)
  function, h = ACTIVATIONS[cfg.activation], dense("up", x.astype(np.float64))
  return dense("down", function(dense("gate", x)) * h if cfg.gated else function(h))


def sigmoid(x: np.ndarray) -> np.ndarray:
  return 1 / (1 + np.exp(-x))


def gelu(x: np.ndarray) -> np.ndarray:
  """x times the chance that a normal number is below x (Hendrycks & Gimpel, 2016)."""
  return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def gelu_tanh(x: np.ndarray) -> np.ndarray:
  return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS: dict[str, Function] = {
  "gelu": gelu,
  "gelu_tanh": gelu_tanh,
  "silu": lambda x: x * sigmoid(x),
  "relu": lambda x: np.maximum(x, 0),
}


# -- Experts -------------------------------------------------------------------------------


def experts(case: Case) -> Finding:
  """A mixture of experts, token by token, without a capacity."""
  if not case.model_cfg.moe.num_experts:
    return does_not_apply("there are no experts")
  layer = layer_of(case, kind_of(case))
  x_BTD, y_BTD = layer.calls["ffn"]
  return Finding(distance(y_BTD, experts_by_hand(layer.cfg, layer.params["ffn"], x_BTD)))


def experts_by_hand(
  cfg: ResolvedModel, params: Any, x_BTD: np.ndarray, capacity: int | None = None
) -> np.ndarray:
  """The sum over a token's likeliest experts, weighted, and the shared ones (Shazeer et
  al., 2017; Dai et al., 2024). An expert serves so many tokens of a row, the first that
  choose it; a token's better choices go before its others (Lepikhin et al., 2020)."""
  x_BTD, moe = x_BTD.astype(np.float64), cfg.moe
  kernels = params["experts"]
  y_BTD = np.zeros_like(x_BTD)
  for x_TD, y_TD in zip(x_BTD, y_BTD, strict=True):
    served = [0] * moe.num_experts
    for t, x_D in enumerate(x_TD):
      shares_E = np.exp(x_D @ params["router"]["kernel"])
      shares_E /= shares_E.sum()
      chosen = np.argsort(-shares_E, kind="stable")[: moe.experts_per_token]
      total = shares_E[chosen].sum() if moe.normalized else 1.0
      for expert in chosen:
        if capacity is None or served[expert] < capacity:
          own = {name: {"kernel": k["kernel"][expert]} for name, k in kernels.items()}
          y_TD[t] += shares_E[expert] / total * ffn_by_hand(cfg, own, x_D)
        served[expert] += 1
  if moe.num_shared_experts:
    shared_BTD = ffn_by_hand(cfg, params["shared"], x_BTD)
    if moe.shared_gated:
      shared_BTD = shared_BTD * sigmoid(x_BTD @ params["shared_gate"]["kernel"])
    y_BTD += shared_BTD
  return y_BTD


# -- Recurrent cells -----------------------------------------------------------------------


def cell(case: Case) -> Finding:
  """x + cell(norm(x)) over two documents in a row, with a state that begins anew."""
  if case.family != "rnn":
    return does_not_apply("there is no recurrent cell")
  layer = layer_of(case, kind_of(case))
  x_BTD, y_BTD = layer.calls["RecurrentBlock"]
  h_BTD = norm_by_hand(layer.cfg, layer.params["norm"], x_BTD)
  step = {"lstm": lstm, "gru": gru}[layer.cfg.cell]
  expected_BTD = x_BTD.astype(np.float64)
  zeros_BD = np.zeros_like(h_BTD[:, 0])
  state = zeros_BD, zeros_BD
  for t, document in enumerate(layer.documents_T):
    if t and document != layer.documents_T[t - 1]:
      state = zeros_BD, zeros_BD
    state = step(layer.params["cell"], *state, h_BTD[:, t])
    expected_BTD[:, t] += state[1]
  return Finding(distance(y_BTD, expected_BTD))


State = tuple[np.ndarray, np.ndarray]


def lstm(params: Any, c_BD: np.ndarray, h_BD: np.ndarray, x_BD: np.ndarray) -> State:
  """Hochreiter & Schmidhuber (1997), with the forget gate of Gers et al. (2000)."""
  gate = lambda name: (
    x_BD @ params[f"i{name}"]["kernel"]
    + h_BD @ params[f"h{name}"]["kernel"]
    + params[f"h{name}"]["bias"]
  )
  c_BD = sigmoid(gate("f")) * c_BD + sigmoid(gate("i")) * np.tanh(gate("g"))
  return c_BD, sigmoid(gate("o")) * np.tanh(c_BD)


def gru(params: Any, c_BD: np.ndarray, h_BD: np.ndarray, x_BD: np.ndarray) -> State:
  """Cho et al. (2014); the reset gate acts on the product, as in cuDNN."""
  outer = lambda name: x_BD @ params[f"i{name}"]["kernel"] + params[f"i{name}"]["bias"]
  inner = lambda name: h_BD @ params[f"h{name}"]["kernel"]
  reset_BD, keep_BD = (sigmoid(outer(name) + inner(name)) for name in "rz")
  new_BD = np.tanh(outer("n") + reset_BD * (inner("n") + params["hn"]["bias"]))
  return c_BD, (1 - keep_BD) * new_BD + keep_BD * h_BD


# -- A whole layer -------------------------------------------------------------------------


def whole_layer(case: Case) -> Finding:
  """A layer of each kind, from its input to its output."""
  if case.family == "rnn":
    return does_not_apply("`cell` is about the layers of an RNN")
  errors = []
  for kind in sorted(set(case.model_cfg.period)):
    layer = layer_of(case, kind)
    x_BTD, y_BTD = layer.calls["Block"]
    errors.append(distance(y_BTD, layer_by_hand(layer, x_BTD.astype(np.float64))))
  return Finding(max(errors))


def layer_by_hand(layer: Layer, x_BTD: np.ndarray) -> np.ndarray:
  """Branches that are added to the residual stream, with norms where the config has them:
  Vaswani et al. (2017), Xiong et al. (2020), OLMo 2 (2024), Gemma 2 (2024); in parallel as
  in GPT-J and PaLM (Chowdhery et al., 2022)."""
  cfg, params = layer.cfg, layer.params
  norm = lambda name, x_BTD: norm_by_hand(cfg, params[name], x_BTD)
  by_hand = experts_by_hand if cfg.moe.num_experts else ffn_by_hand
  ffn = functools.partial(by_hand, cfg, params["ffn"])
  attend = functools.partial(self_attention, layer)
  if cfg.parallel != "none":
    name = "attention_norm" if cfg.parallel == "one_norm" else "ffn_norm"
    return x_BTD + attend(norm("attention_norm", x_BTD)) + ffn(norm(name, x_BTD))
  branches: dict[str, Function] = {"attention": attend}
  if cfg.family == "encoder_decoder":
    branches["cross_attention"] = functools.partial(attention_to_source, layer)
  for name, branch in (branches | {"ffn": ffn}).items():
    before, after = f"{name}_norm", f"{name}_output_norm"
    match cfg.norm_placement:
      case "pre":
        x_BTD = x_BTD + branch(norm(before, x_BTD))
      case "post":
        x_BTD = norm(before, x_BTD + branch(x_BTD))
      case "output":
        x_BTD = x_BTD + norm(after, branch(x_BTD))
      case "both":
        x_BTD = x_BTD + norm(after, branch(norm(before, x_BTD)))
  return x_BTD


LAWS = (
  Law("norms", "norms are the papers' formulas", norms, 1e-5, ROUNDING),
  Law("feed-forward", "so is the feed-forward", feed_forward, 1e-5, ROUNDING),
  Law("experts", "so is the mixture of experts", experts, 1e-5, ROUNDING),
  Law("cell", "so is the recurrent cell", cell, 1e-5, ROUNDING),
  Law("layer", "so is the whole layer", whole_layer, 1e-5, ROUNDING),
)
