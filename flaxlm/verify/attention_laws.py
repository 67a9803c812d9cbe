# SPDX-License-Identifier: Apache-2.0
"""Attention as the papers define it, in a page of float64 numpy, against the model's.

Nothing of `flaxlm.nn` is used but the parameters and what goes in and out of the layer.
"""

from typing import Any

import jax
import numpy as np

from flaxlm.config import ResolvedModel
from flaxlm.nn.positions import rotate, rotation
from flaxlm.verify.case import ROUNDING, Case, Finding, Law, distance, does_not_apply
from flaxlm.verify.layer import Layer, layer_of
from flaxlm.verify.shrink import SEQ_LEN


def attention(case: Case) -> Finding:
  """What the only layer of a model computes, one of each kind."""
  if case.family == "rnn":
    return does_not_apply("an RNN has no attention")
  errors = []
  for kind in sorted(set(case.model_cfg.period)):
    layer = layer_of(case, kind)
    x_BTD, y_BTD = layer.calls["attention"]
    errors.append(distance(y_BTD, self_attention(layer, x_BTD)))
  return Finding(max(errors))


def cross_attention(case: Case) -> Finding:
  """What a decoder's only layer reads from a source of two documents."""
  if case.family != "encoder_decoder":
    return does_not_apply("there is no source")
  layer = layer_of(case, sorted(set(case.model_cfg.period))[0])
  x_BTD, y_BTD = layer.calls["cross_attention"]
  return Finding(distance(y_BTD, attention_to_source(layer, x_BTD)))


def self_attention(layer: Layer, x_BTD: np.ndarray) -> np.ndarray:
  cfg, params = layer.cfg, layer.params["attention"]
  visible_TS = seen_by_hand(cfg, layer.kind, layer.positions_T, layer.documents_T)
  bias_NTS = bias_by_hand(cfg, layer.others.get("decoder", layer.others))
  q_BTNH, k_BTNH, v_BTNH = projected(cfg, params, x_BTD, x_BTD)
  if cfg.positions == "rope":
    q_BTNH = turned(cfg, layer.kind, q_BTNH, layer.positions_T)
    k_BTNH = turned(cfg, layer.kind, k_BTNH, layer.positions_T)
  return by_hand(cfg, params, q_BTNH, k_BTNH, v_BTNH, visible_TS, bias_NTS)


def attention_to_source(layer: Layer, x_BTD: np.ndarray) -> np.ndarray:
  """A token sees all of the document of the same number, and positions play no part."""
  cfg, params = layer.cfg, layer.params["cross_attention"]
  source_BSD, _ = layer.calls["source_keys_values"]
  visible_TS = layer.documents_T[:, None] == layer.source_documents_S
  qkv = projected(cfg, params, x_BTD, source_BSD)
  return by_hand(cfg, params, *qkv, visible_TS, 0.0)


def projected(
  cfg: ResolvedModel, params: Any, x_BTD: np.ndarray, source_BSD: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Queries, and keys and values of what they look at, normalised if the config says."""
  sides = zip("qkv", (x_BTD, source_BSD, source_BSD), strict=True)
  q_BTNH, k_BSKH, v_BSKH = (project(params[name], x) for name, x in sides)
  if cfg.qk_norm != "none":
    q_BTNH = normed(cfg, params["q_norm"], q_BTNH)
    k_BSKH = normed(cfg, params["k_norm"], k_BSKH)
  return q_BTNH, k_BSKH, v_BSKH


def by_hand(
  cfg: ResolvedModel,
  params: Any,
  q_BTNH: np.ndarray,
  k_BSKH: np.ndarray,
  v_BSKH: np.ndarray,
  visible_TS: np.ndarray,
  bias_NTS: np.ndarray | float,
) -> np.ndarray:
  """softmax(scale q k^T + bias) v for each head, with the other heads' kv where heads share
  it (Vaswani et al., 2017, section 3.2; Ainslie et al., 2023)."""
  group = cfg.num_heads // cfg.num_kv_heads
  k_BSNH, v_BSNH = (np.repeat(x, group, 2) for x in (k_BSKH, v_BSKH))
  scores = cfg.attention_scale * np.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH)
  if cfg.attention_softcap is not None:
    scores = cfg.attention_softcap * np.tanh(scores / cfg.attention_softcap)
  shares = np.where(visible_TS, np.exp(scores + bias_NTS), 0.0)
  total = shares.sum(-1, keepdims=True)
  if cfg.learned_sinks:
    total = total + np.exp(params["sinks"])[:, None, None]
  mixed = np.einsum("BNTS,BSNH->BTNH", shares / total, v_BSNH)
  y_BTD = np.einsum("BTNH,NHD->BTD", mixed, params["o"]["kernel"])
  return y_BTD + params["o"].get("bias", 0.0)


def project(params: Any, x_BTD: np.ndarray) -> np.ndarray:
  y_BTNH = np.einsum("BTD,DNH->BTNH", x_BTD.astype(np.float64), params["kernel"])
  return y_BTNH + params.get("bias", 0.0)


def normed(cfg: ResolvedModel, params: Any, x_BTNH: np.ndarray) -> np.ndarray:
  """RMSNorm over each head, or over all heads of a token together."""
  dims = -1 if cfg.qk_norm == "head" else (-2, -1)
  squares = np.mean(x_BTNH**2, dims, keepdims=True)
  return x_BTNH / np.sqrt(squares + cfg.norm_epsilon) * params["scale"]


def seen_by_hand(
  cfg: ResolvedModel, kind: str, positions_T: np.ndarray, document_T: np.ndarray
) -> np.ndarray:
  """visible_TS, pair by pair."""
  visible_TS = np.zeros((SEQ_LEN, SEQ_LEN), bool)
  for t in range(SEQ_LEN):
    for s in range(SEQ_LEN):
      is_near = kind == "G" or abs(t - s) < (cfg.window or 0)
      is_near |= bool(positions_T[s] < cfg.sink_tokens)
      is_earlier = cfg.family == "encoder" or s <= t
      visible_TS[t, s] = document_T[s] == document_T[t] and is_earlier and is_near
  return visible_TS


# -- Positions -----------------------------------------------------------------------------


def turned(
  cfg: ResolvedModel, kind: str, x_BTNH: np.ndarray, positions_T: np.ndarray
) -> np.ndarray:
  """RoPE (Su et al., 2021): each pair of dims (i, i + R/2) is a complex number that turns
  by position times frequency; dims beyond the first R stay."""
  num_pairs = int(cfg.head_dim * cfg.rope.fraction / 2)
  factor, frequencies = frequencies_by_hand(cfg, kind, num_pairs)
  pairs = x_BTNH[..., :num_pairs] + 1j * x_BTNH[..., num_pairs : 2 * num_pairs]
  pairs = pairs * factor * np.exp(1j * positions_T[:, None, None] * frequencies)
  return np.concatenate([pairs.real, pairs.imag, x_BTNH[..., 2 * num_pairs :]], -1)


def frequencies_by_hand(
  cfg: ResolvedModel, kind: str, num_pairs: int
) -> tuple[float, np.ndarray]:
  """(factor of every pair, radians per position of each): Su et al. (2021), section 3.2.2,
  stretched as Chen et al. (2023), Peng et al. (2023) or Llama 3.1's authors do."""
  rope, pair = cfg.rope, np.arange(num_pairs)
  local_theta = rope.local_theta if kind == "L" else None
  theta = float(local_theta or rope.theta)
  plain = theta ** (-pair / num_pairs)
  if local_theta is not None or rope.scaling == "none":
    return 1.0, plain
  context = rope.original_context
  if rope.scaling == "linear":
    return 1.0, plain / rope.factor
  if rope.scaling == "ntk":
    more = rope.factor ** (2 * num_pairs / max(1, 2 * num_pairs - 2))
    return 1.0, (theta * more) ** (-pair / num_pairs)
  if rope.scaling == "llama3":
    turns = context * plain / (2 * np.pi)
    kept = (turns - rope.slow_turns) / (rope.fast_turns - rope.slow_turns)
    kept = np.clip(kept, 0, 1)
    return 1.0, plain * kept + plain / rope.factor * (1 - kept)
  # yarn: the pair that turns n times over the context, rounded outwards
  at = lambda n: num_pairs * np.log(context / (2 * np.pi * max(n, 1e-9))) / np.log(theta)
  low = max(0, np.floor(max(0.0, at(rope.fast_turns))))
  high = np.ceil(min(2 * num_pairs - 1, at(rope.slow_turns)))
  kept = 1 - np.clip((pair - low) / ((high - low) or 0.001), 0, 1)
  size = rope.attention_factor
  if size is None:
    size = 0.1 * np.log(rope.factor) + 1 if rope.factor > 1 else 1.0
  return float(size), plain * kept + plain / rope.factor * (1 - kept)


def rope(case: Case) -> Finding:
  """`flaxlm.nn.positions` alone, at positions that do not begin at 0."""
  cfg = case.model_cfg
  if cfg.positions != "rope" or case.family == "rnn":
    return does_not_apply("there is no RoPE")
  x_BTNH = np.random.default_rng(4).normal(size=(1, SEQ_LEN, 2, cfg.head_dim))
  x_BTNH, positions_BT = x_BTNH.astype(np.float32), np.arange(SEQ_LEN)[None] + 3
  errors = []
  for kind in sorted(set(cfg.period)):
    turn = lambda x, at, local=kind == "L": rotate(
      x, rotation(at, cfg.head_dim, cfg.rope, local)
    )
    found = jax.jit(turn)(x_BTNH, positions_BT)
    errors.append(distance(found, turned(cfg, kind, x_BTNH, positions_BT[0])))
  return Finding(max(errors))


def bias_by_hand(cfg: ResolvedModel, stack: Any) -> np.ndarray | float:
  """bias_NTS: ALiBi's (Press et al., 2022) or T5's (Raffel et al., 2020, section 2.1)."""
  N, index_T = cfg.num_heads, np.arange(SEQ_LEN)
  distance_TS = index_T[:, None] - index_T  # of the key, backwards
  is_encoder = cfg.family == "encoder"
  if cfg.positions == "alibi":
    power = 2 ** int(np.log2(N))
    slopes = [2 ** (-8 * (n + 1) / power) for n in range(power)]
    slopes += [2 ** (-8 * (n + 1) / (2 * power)) for n in range(0, 2 * (N - power), 2)]
    return -np.array(slopes)[:, None, None] * np.abs(distance_TS)
  if cfg.positions != "relative":
    return 0.0
  table, buckets = np.asarray(stack["relative_bias"]["table"], np.float64), []
  half = cfg.relative_buckets // (2 if is_encoder else 1)
  for distance_ in distance_TS.flat:
    first = half if is_encoder and distance_ < 0 else 0
    far = abs(int(distance_)) if is_encoder else max(int(distance_), 0)
    exact = half // 2
    if far >= exact:
      share = np.log(far / exact) / np.log(cfg.relative_distance / exact)
      far = min(half - 1, exact + int(share * (half - exact) + 1e-6))
    buckets.append(first + far)
  return table[np.reshape(buckets, distance_TS.shape)].transpose(2, 0, 1)


LAWS = (
  Law("attention", "attention is the papers' formula", attention, 1e-4, ROUNDING),
  Law("cross-attention", "so is attention to a source", cross_attention, 1e-5, ROUNDING),
  Law("rope", "RoPE turns complex numbers", rope, 1e-4, "float32 angles of some radians"),
)
