# SPDX-License-Identifier: Apache-2.0
"""The layers of a transformer as the papers define them, in float64 numpy loops.

Part of `references`, with the same rules: slow on purpose, no jax, no flaxlm.
"""

import math

import numpy as np


def norm(params, cfg, x_TD):
  """RMSNorm (Zhang & Sennrich, 2019, equation 4) or LayerNorm (Ba et al., 2016, section
  3) of each row."""
  if cfg.norm == "rmsnorm":
    return np.stack([rms_norm(params["scale"], cfg, x_D) for x_D in x_TD])
  if cfg.norm == "layernorm":
    return np.stack([layer_norm(params, cfg, x_D) for x_D in x_TD])
  raise NotImplementedError(cfg.norm)


def rms_norm(scale, cfg, x):
  """x / rms(x) * scale, over all of x (Zhang & Sennrich, 2019, equation 4)."""
  return x / math.sqrt(np.mean(x**2) + cfg.norm_epsilon) * scale


def layer_norm(params, cfg, x_D):
  """(x - mean) / deviation * scale + bias (Ba et al., 2016, section 3)."""
  centred_D = x_D - np.mean(x_D)
  deviation = math.sqrt(np.mean(centred_D**2) + cfg.norm_epsilon)
  y_D = centred_D / deviation * params["scale"]
  return y_D + params["bias"] if cfg.norm_biased else y_D


def soft_cap(x, cap):
  """c tanh(x / c) (Gemma 2, 2024, section 2, after Bello et al., 2016); none = x."""
  return x if cap is None else cap * np.tanh(x / cap)


# -- Attention -------------------------------------------------------------------------


def attention(params, cfg, x_TD, source_SD, sees, bias=None, turn=None):
  """Grouped-query attention (Vaswani et al., 2017, section 3.2; Ainslie et al., 2023,
  section 2.2) of each row of `x_TD` to rows of `source_SD`.

  `sees(t, s)` says whether query t sees key s, `bias(n, t, s)` is added to their score in
  head n, and `turn(x_H, t)` rotates a query or key that lies in slot t. A query that sees
  nothing gets nothing.
  """
  biased = cfg.biased if cfg.qkv_biased is None else cfg.qkv_biased
  q_TNH = normed_heads(params, "q_norm", cfg, project(params["q"], biased, x_TD))
  k_SKH = normed_heads(params, "k_norm", cfg, project(params["k"], biased, source_SD))
  v_SKH = project(params["v"], biased, source_SD)
  T, N, H = q_TNH.shape
  S, K, _ = k_SKH.shape
  scale = cfg.attention_scale or 1 / math.sqrt(H)
  y_TD = np.zeros((T, params["o"]["kernel"].shape[-1]))
  for n in range(N):
    k = n // (N // K)
    q_TH, k_SH = q_TNH[:, n], k_SKH[:, k]
    if turn is not None:
      q_TH = np.stack([turn(q_TH[t], t) for t in range(T)])
      k_SH = np.stack([turn(k_SH[s], s) for s in range(S)])
    for t in range(T):
      seen = [s for s in range(S) if sees(t, s)]
      if not seen:
        continue
      scores = soft_cap(
        np.array([scale * (q_TH[t] @ k_SH[s]) for s in seen]), cfg.attention_softcap
      )
      if bias is not None:
        scores = scores + [bias(n, t, s) for s in seen]
      sinks = [params["sinks"][n]] if cfg.learned_sinks else []
      p = softmax(np.concatenate([scores, sinks]))[: len(seen)]
      average_H = sum(p[i] * v_SKH[s, k] for i, s in enumerate(seen))
      y_TD[t] += average_H @ params["o"]["kernel"][n]
  if cfg.biased if cfg.o_biased is None else cfg.o_biased:
    y_TD = y_TD + params["o"]["bias"]
  return y_TD


def project(params, biased, x_TD):
  """Each row into each head, (T, N, H) (Vaswani et al., 2017, section 3.2.2)."""
  N = params["kernel"].shape[1]
  y_TNH = np.stack([x_TD @ params["kernel"][:, n] for n in range(N)], axis=1)
  return y_TNH + params["bias"] if biased else y_TNH


def normed_heads(params, name, cfg, x_TNH):
  """RMSNorm of queries or keys: of each head (Qwen 3, 2025, section 2, after Dehghani et
  al., 2023, section 2), or over all heads of a token at once (OLMo 2, 2025, section 2).
  """
  if cfg.qk_norm == "none":
    return x_TNH
  scale = params[name]["scale"]
  if cfg.qk_norm == "width":
    return np.stack([rms_norm(scale, cfg, x_NH) for x_NH in x_TNH])
  if cfg.qk_norm == "head":
    return np.stack([[rms_norm(scale, cfg, x_H) for x_H in x_NH] for x_NH in x_TNH])
  raise NotImplementedError(cfg.qk_norm)


def visible(cfg, t, s, segments_T, positions_T, *, causal, local):
  """Whether query slot t sees key slot s of its own row.

  Causality (Vaswani et al., 2017, section 3.2.3) and the window of local layers (Beltagy
  et al., 2020, section 3.1) go by slot, one document's slots being in a row; the first
  `sink_tokens` of each document stay in sight (Xiao et al., 2024, section 3.2).
  """
  if segments_T[s] != segments_T[t] or (causal and s > t):
    return False
  if not local or abs(t - s) < cfg.window:
    return True
  return bool(positions_T[s] < cfg.sink_tokens)


# -- Feed-forward ----------------------------------------------------------------------


def ffn(params, cfg, x_TD, biased):
  """Feed-forward (Vaswani et al., 2017, section 3.3), gated as in Shazeer (2020), section
  2, if `cfg.gated`."""

  def linear(name, x):
    y = x @ params[name]["kernel"]
    return y + params[name]["bias"] if biased else y

  if cfg.gated:
    h_TF = activate(cfg.activation, linear("gate", x_TD)) * linear("up", x_TD)
  else:
    h_TF = activate(cfg.activation, linear("up", x_TD))
  return linear("down", h_TF)


def mixture(params, cfg, x_TD):
  """A mixture of experts (Shazeer et al., 2017, section 2) that drops nothing.

  A token's weights are the softmax over all experts, of which its likeliest A are kept
  and, if `normalized`, made to add up to 1 (Jiang et al., 2024, section 2.1). Shared
  experts see every token (Dai et al., 2024, section 3.2): all of them are one wide
  feed-forward. Its sigmoid gate is Qwen 2's (Yang et al., 2024, section 2.2.2).
  """
  moe = cfg.moe
  assert moe.capacity_factor is None, "nothing is dropped here"
  y_TD = np.zeros_like(x_TD)
  for t, x_D in enumerate(x_TD):
    p_E = softmax(x_D @ params["router"]["kernel"])
    chosen = sorted(range(moe.num_experts), key=lambda e: -p_E[e])[: moe.experts_per_token]
    weights = p_E[chosen]
    if moe.normalized:
      weights = weights / np.sum(weights)
    for e, weight in zip(chosen, weights, strict=True):
      expert = {
        name: {"kernel": child["kernel"][e]} for name, child in params["experts"].items()
      }
      y_TD[t] += weight * ffn(expert, cfg, x_D, biased=False)
    if moe.num_shared_experts:
      shared_D = ffn(params["shared"], cfg, x_D, biased=False)
      if moe.shared_gated:
        shared_D = sigmoid(x_D @ params["shared_gate"]["kernel"]) * shared_D
      y_TD[t] += shared_D
  return y_TD


def activate(name, x):
  """gelu, gelu_tanh (Hendrycks & Gimpel, 2016, section 2), silu (Elfwing et al., 2017,
  section 2), relu (Nair & Hinton, 2010, section 2)."""
  if name == "gelu":
    return x * (1 + np.vectorize(math.erf, otypes=[float])(x / math.sqrt(2))) / 2
  if name == "gelu_tanh":
    return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
  if name == "silu":
    return x * sigmoid(x)
  if name == "relu":
    return np.maximum(x, 0)
  raise NotImplementedError(name)


def sigmoid(x):
  """1 / (1 + exp(-x)), in a form that does not overflow."""
  return (1 + np.tanh(x / 2)) / 2


def softmax(x):
  """Softmax of a vector, less its maximum, which cancels."""
  e = np.exp(x - np.max(x))
  return e / np.sum(e)
