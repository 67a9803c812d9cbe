# SPDX-License-Identifier: Apache-2.0
"""What the papers say, in float64 numpy loops: slow on purpose, and sharing no code.

The rest of the suite compares flaxlm with these. Nothing here imports jax or flaxlm;
`cfg` is a `ModelConfig`, and sizes are read from the arrays, resolved config or not.
"""

import math

import numpy as np

# -- The model -------------------------------------------------------------------------


def decoder(params, cfg, tokens_BT, segments_BT=None, positions_BT=None):
  """Logits (B, T, V) of a decoder-only transformer (Vaswani et al., 2017), no dropout.

  Positions default to the slot index, also when there are segments.
  """
  params = _float64(params)
  tokens_BT = np.asarray(tokens_BT)
  B, T = tokens_BT.shape
  if segments_BT is None:
    segments_BT = np.ones((B, T), dtype=int)
  if positions_BT is None:
    positions_BT = np.tile(np.arange(T), (B, 1))
  return np.stack(
    [
      _decode_row(params, cfg, tokens_BT[b], segments_BT[b], positions_BT[b])
      for b in range(B)
    ]
  )


def _decode_row(params, cfg, tokens_T, segments_T, positions_T):
  """Logits (T, V) of one row of the batch."""
  x_TD = _embed(params, cfg, tokens_T, positions_T)
  for l in range(_depth(params["blocks"])):
    block = _layer(params["blocks"], l)

    def attend(x_TD, block=block):
      return attention(block["attention"], cfg, x_TD, segments_T, positions_T)

    def feed_forward(x_TD, block=block):
      return ffn(block["ffn"], cfg, x_TD)

    if cfg.norm_placement == "pre":
      x_TD = x_TD + attend(norm(block["attention_norm"], cfg, x_TD))
      x_TD = x_TD + feed_forward(norm(block["ffn_norm"], cfg, x_TD))
    elif cfg.norm_placement == "post":
      x_TD = norm(block["attention_norm"], cfg, x_TD + attend(x_TD))
      x_TD = norm(block["ffn_norm"], cfg, x_TD + feed_forward(x_TD))
    else:
      raise NotImplementedError(cfg.norm_placement)
  if cfg.norm_placement == "pre":
    x_TD = norm(params["final_norm"], cfg, x_TD)
  if cfg.tied_embeddings:
    return x_TD @ params["embedding"]["table"].T
  return x_TD @ params["head"]["kernel"]


def _embed(params, cfg, tokens_T, positions_T):
  rows = []
  for token, position in zip(tokens_T, positions_T, strict=True):
    x_D = params["embedding"]["table"][token]
    if cfg.embedding_scaled:
      x_D = math.sqrt(len(x_D)) * x_D
    if cfg.positions == "learned":
      x_D = x_D + params["positions"]["table"][position]
    elif cfg.positions == "sinusoidal":
      x_D = x_D + sinusoid(position, len(x_D))
    elif cfg.positions not in ("rope", "none"):
      raise NotImplementedError(cfg.positions)
    rows.append(x_D)
  return np.stack(rows)


def sinusoid(position, D):
  """[sines | cosines] of one position (Vaswani et al., 2017, section 3.5), halves."""
  angles = [float(position) / 10_000 ** (2 * i / D) for i in range(D // 2)]
  return np.array([math.sin(a) for a in angles] + [math.cos(a) for a in angles])


def norm(params, cfg, x_TD):
  """RMSNorm (Zhang & Sennrich, 2019) or LayerNorm (Ba et al., 2016) of each row."""
  rows = []
  for x_D in x_TD:
    if cfg.norm == "rmsnorm":
      rms = math.sqrt(np.mean(x_D**2) + cfg.norm_epsilon)
      rows.append(x_D / rms * params["scale"])
    elif cfg.norm == "layernorm":
      centred_D = x_D - np.mean(x_D)
      deviation = math.sqrt(np.mean(centred_D**2) + cfg.norm_epsilon)
      rows.append(centred_D / deviation * params["scale"] + params["bias"])
    else:
      raise NotImplementedError(cfg.norm)
  return np.stack(rows)


def attention(params, cfg, x_TD, segments_T, positions_T):
  """Causal grouped-query attention (Vaswani et al., 2017; Ainslie et al., 2023).

  Causality and the window go by slot; positions only turn the queries and keys.
  """
  T = len(x_TD)
  N, H = params["q"]["kernel"].shape[1:]
  K = params["k"]["kernel"].shape[1]
  G = N // K
  y_TD = np.zeros_like(x_TD)
  for n in range(N):
    q_TH = _project(params["q"], cfg, x_TD, n)
    k_SH = _project(params["k"], cfg, x_TD, n // G)
    v_SH = _project(params["v"], cfg, x_TD, n // G)
    if cfg.positions == "rope":
      q_TH = np.stack([rotate(q_TH[t], positions_T[t], cfg.rope.theta) for t in range(T)])
      k_SH = np.stack([rotate(k_SH[s], positions_T[s], cfg.rope.theta) for s in range(T)])
    for t in range(T):
      seen = [s for s in range(T) if visible(t, s, cfg.window, segments_T)]
      scores = np.array([q_TH[t] @ k_SH[s] / math.sqrt(H) for s in seen])
      average_H = sum(p * v_SH[s] for p, s in zip(softmax(scores), seen, strict=True))
      y_TD[t] += average_H @ params["o"]["kernel"][n]
  if cfg.biased:
    y_TD = y_TD + params["o"]["bias"]
  return y_TD


def _project(params, cfg, x_TD, head):
  y_TH = x_TD @ params["kernel"][:, head, :]
  return y_TH + params["bias"][head] if cfg.biased else y_TH


def visible(t, s, window, segments_T):
  """Whether query slot t sees key slot s (window: Beltagy et al., 2020)."""
  if s > t:
    return False
  if window is not None and s <= t - window:
    return False
  return bool(segments_T[s] == segments_T[t])


def rotate(x_H, position, theta):
  """RoPE (Su et al., 2021); pairs are (i, i + H/2), as in Hugging Face's LLaMA."""
  H = len(x_H)
  y_H = np.zeros(H)
  for i in range(H // 2):
    angle = float(position) * theta ** (-2 * i / H)
    z = complex(x_H[i], x_H[i + H // 2]) * complex(math.cos(angle), math.sin(angle))
    y_H[i], y_H[i + H // 2] = z.real, z.imag
  return y_H


def ffn(params, cfg, x_TD):
  """Feed-forward (Vaswani et al., 2017), gated as in Shazeer (2020) if `cfg.gated`."""

  def linear(name, x):
    y = x @ params[name]["kernel"]
    return y + params[name]["bias"] if cfg.biased else y

  if cfg.gated:
    h_TF = activate(cfg.activation, linear("gate", x_TD)) * linear("up", x_TD)
  else:
    h_TF = activate(cfg.activation, linear("up", x_TD))
  return linear("down", h_TF)


def activate(name, x):
  """gelu, gelu_tanh (Hendrycks & Gimpel, 2016), silu (Elfwing et al., 2017), relu."""
  if name == "gelu":
    return x * (1 + np.vectorize(math.erf, otypes=[float])(x / math.sqrt(2))) / 2
  if name == "gelu_tanh":
    return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
  if name == "silu":  # x * sigmoid(x), in a form that does not overflow
    return x * (1 + np.tanh(x / 2)) / 2
  if name == "relu":
    return np.maximum(x, 0)
  raise NotImplementedError(name)


def softmax(x):
  """Softmax of a vector, less its maximum, which cancels."""
  e = np.exp(x - np.max(x))
  return e / np.sum(e)


def _float64(tree):
  if isinstance(tree, dict):
    return {name: _float64(child) for name, child in tree.items()}
  return np.asarray(tree, dtype=np.float64)


def _layer(tree, l):
  """Layer l of a tree whose arrays lead with L."""
  if isinstance(tree, dict):
    return {name: _layer(child, l) for name, child in tree.items()}
  return tree[l]


def _depth(blocks):
  return len(blocks["attention"]["q"]["kernel"])


# -- The loss --------------------------------------------------------------------------


def next_token_loss(logits_BTV, targets_BT, weights_BT):
  """Mean cross-entropy in nats per unit of weight; some weight must not be zero."""
  logits_BTV = np.asarray(logits_BTV, dtype=np.float64)
  total = weight = 0.0
  for b, t in np.ndindex(np.shape(targets_BT)):
    logits_V = logits_BTV[b, t] - np.max(logits_BTV[b, t])
    log_p = logits_V[targets_BT[b][t]] - math.log(np.sum(np.exp(logits_V)))
    total -= float(weights_BT[b][t]) * float(log_p)
    weight += float(weights_BT[b][t])
  return total / weight


# -- The optimizer ---------------------------------------------------------------------


def adamw_step(
  params,
  grads,
  mu,
  nu,
  step,
  *,
  lr,
  beta1,
  beta2,
  epsilon,
  weight_decay,
  decay_mask,
  clip_norm,
):
  """(params, mu, nu) after one AdamW step (Loshchilov & Hutter, 2019, algorithm 2).

  All but the numbers are nested dicts alike; `decay_mask` holds booleans, `mu` and `nu`
  start at zero. `step` counts from 1, as the paper's t. The gradients are first scaled
  down to a global norm of `clip_norm` (Pascanu et al., 2013); none = no clipping. The
  decay is lr * weight_decay * the old parameters.
  """
  assert step >= 1, step
  params, grads, mu, nu = map(_float64, (params, grads, mu, nu))
  clip = 1.0
  if clip_norm is not None:
    global_norm = math.sqrt(_sum_of_squares(grads))
    if global_norm > clip_norm:
      clip = clip_norm / global_norm

  def update(p, g, m, v, decayed):
    if isinstance(p, dict):
      new = {name: update(p[name], g[name], m[name], v[name], decayed[name]) for name in p}
      return tuple({name: new[name][i] for name in p} for i in range(3))
    g = clip * g
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    m_hat = m / (1 - beta1**step)
    v_hat = v / (1 - beta2**step)
    decay = weight_decay * p if decayed else 0.0
    return p - lr * (m_hat / (np.sqrt(v_hat) + epsilon) + decay), m, v

  return update(params, grads, mu, nu, decay_mask)


def _sum_of_squares(tree):
  if isinstance(tree, dict):
    return sum(_sum_of_squares(child) for child in tree.values())
  return float(np.sum(tree**2))


def learning_rate(schedule, step, peak, warmup_steps, num_steps=None, final_fraction=None):
  """The rate at `step`, the first being 0; cosine is Loshchilov & Hutter (2017).

  Linear warm-up from 0 to `peak` at `warmup_steps`. Then cosine and linear reach
  `final_fraction * peak` at `num_steps` and stay there, constant stays at the peak, and
  inverse_sqrt is peak * sqrt(warmup_steps / step) (Vaswani et al., 2017, section 5.3).
  Without a warm-up, inverse_sqrt counts as if it had taken one step.
  """
  if step < warmup_steps:
    return peak * step / warmup_steps
  if schedule == "constant":
    return peak
  if schedule == "inverse_sqrt":
    return peak * math.sqrt(max(warmup_steps, 1) / max(step, 1))
  progress = (step - warmup_steps) / max(num_steps - warmup_steps, 1)
  progress = min(progress, 1.0)
  if schedule == "cosine":
    remaining = (1 + math.cos(math.pi * progress)) / 2
  elif schedule == "linear":
    remaining = 1 - progress
  else:
    raise NotImplementedError(schedule)
  return peak * (final_fraction + (1 - final_fraction) * remaining)


# -- Sampling --------------------------------------------------------------------------


def filtered_distribution(logits_V, temperature=None, top_k=None, top_p=None, min_p=None):
  """The probabilities (V,) that a sampler must draw from; none = that filter is off.

  After the temperature (0 = the likeliest token alone), in this order and renormalised
  after each: the `top_k` likeliest tokens (Fan et al., 2018), the smallest set whose
  mass reaches `top_p` (Holtzman et al., 2020), and the tokens at least `min_p` times as
  likely as the likeliest (Nguyen et al., 2024). Of equals, the lower id is likelier.
  """
  logits_V = np.asarray(logits_V, dtype=np.float64)
  if temperature == 0:
    return _keep(np.ones(len(logits_V)), [int(np.argmax(logits_V))])
  p_V = softmax(logits_V / (1.0 if temperature is None else temperature))
  if top_k is not None:
    p_V = _keep(p_V, _likeliest_first(p_V)[:top_k])
  if top_p is not None and top_p < 1:
    nucleus = []
    for token in _likeliest_first(p_V):
      nucleus.append(token)
      if math.fsum(p_V[nucleus]) >= top_p:
        break
    p_V = _keep(p_V, nucleus)
  if min_p is not None:
    threshold = min_p * np.max(p_V)
    p_V = _keep(p_V, [token for token in range(len(p_V)) if p_V[token] >= threshold])
  return p_V


def _likeliest_first(p_V):
  return sorted(range(len(p_V)), key=lambda token: (-p_V[token], token))


def _keep(p_V, tokens):
  """`p_V` with all but `tokens` at zero, renormalised."""
  kept_V = np.zeros_like(p_V)
  for token in tokens:
    kept_V[token] = p_V[token]
  return kept_V / np.sum(kept_V)
