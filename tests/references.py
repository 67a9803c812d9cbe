# SPDX-License-Identifier: Apache-2.0
"""The papers' definitions in float64 numpy loops: slow on purpose, and sharing no code.

The rest of the suite compares flaxlm with these. Nothing here imports jax or flaxlm;
`cfg` is a `ModelConfig`, and sizes are read from the arrays, resolved config or not.
Layers are in `reference_layers`, positions in `reference_positions`; `test_references`
compares all of it with other people's code.
"""

import math
from typing import NamedTuple

import numpy as np
from reference_layers import (
  activate,
  attention,
  ffn,
  mixture,
  norm,
  soft_cap,
  softmax,
  visible,
)
from reference_positions import alibi_slopes, relative_bucket, rotate, rotation, sinusoid

# -- The models ------------------------------------------------------------------------


class Row(NamedTuple):
  """One row of a batch: ids, the document of each (0 = padding), its place, its type."""

  tokens_T: np.ndarray
  segments_T: np.ndarray
  positions_T: np.ndarray
  types_T: np.ndarray


def decoder(params, cfg, tokens_BT, segments_BT=None, positions_BT=None):
  """Logits (B, T, V) of a decoder-only transformer (Radford et al., 2018, section 3.1), no
  dropout.

  Positions default to the slot index, also when there are segments.
  """
  params = _float64(params)
  hidden = [
    _stack(params, params["embedding"], cfg, row, causal=True)
    for row in _rows(tokens_BT, segments_BT, positions_BT)
  ]
  return np.stack([_logits(params, cfg, x_TD) for x_TD in hidden])


def encoder(params, cfg, tokens_BT, segments_BT=None, positions_BT=None, types_BT=None):
  """Logits (B, T, V) of a bidirectional encoder (Devlin et al., 2019, section 3.1)."""
  hidden_BTD = encoder_hidden(params, cfg, tokens_BT, segments_BT, positions_BT, types_BT)
  return np.stack([_logits(_float64(params), cfg, x_TD) for x_TD in hidden_BTD])


def encoder_hidden(
  params, cfg, tokens_BT, segments_BT=None, positions_BT=None, types_BT=None
):
  """The encoder's output (B, T, D), before any head (Devlin et al., 2019, section 3)."""
  params = _float64(params)
  rows = _rows(tokens_BT, segments_BT, positions_BT, types_BT)
  return np.stack(
    [_stack(params, params["embedding"], cfg, row, causal=False) for row in rows]
  )


def pooled(params, hidden_BTD):
  """tanh of a dense layer over each row's first token, (B, D) (Devlin et al., 2019, section
  3.1, whose released code has the dense layer)."""
  pooler = _float64(params)["pooler"]
  return np.tanh(np.asarray(hidden_BTD)[:, 0] @ pooler["kernel"] + pooler["bias"])


def encoder_decoder(
  params,
  cfg,
  source_BS,
  tokens_BT,
  *,
  source_segments_BS=None,
  segments_BT=None,
  source_positions_BS=None,
  positions_BT=None,
):
  """Logits (B, T, V) of an encoder-decoder (Vaswani et al., 2017, section 3.1).

  Rows may hold several pairs: target document i reads source document i and no other
  (packing as in Raffel et al., 2020, section 3.1.2).
  """
  params = _float64(params)
  table = params["embedding"]
  sources = _rows(source_BS, source_segments_BS, source_positions_BS)
  targets = _rows(tokens_BT, segments_BT, positions_BT)
  logits = []
  for source, target in zip(sources, targets, strict=True):
    memory_SD = _stack(params["encoder"], table, cfg, source, causal=False)
    x_TD = _stack(
      params["decoder"], table, cfg, target, causal=True, source=(memory_SD, source)
    )
    logits.append(_logits(params, cfg, x_TD))
  return np.stack(logits)


def _rows(tokens_BT, segments_BT=None, positions_BT=None, types_BT=None):
  tokens_BT = np.asarray(tokens_BT)
  B, T = tokens_BT.shape
  if segments_BT is None:
    segments_BT = np.ones((B, T), dtype=int)
  if positions_BT is None:
    positions_BT = np.tile(np.arange(T), (B, 1))
  if types_BT is None:
    types_BT = np.zeros((B, T), dtype=int)
  columns = (tokens_BT, segments_BT, positions_BT, types_BT)
  return [Row(*(np.asarray(column[b]) for column in columns)) for b in range(B)]


def _stack(params, embedding, cfg, row, *, causal, source=None):
  """Output (T, D) of the embedding, all blocks and the last norm, for one row.

  `source` is what cross-attention reads: the encoder's output (S, D) and its row.
  """
  x_TD = _embed(params, embedding, cfg, row)
  pattern = cfg.layer_pattern or ("G" if cfg.window is None else "L")
  for l in range(_depth(params["blocks"])):
    block = _layer(params["blocks"], l)
    local = pattern[l % len(pattern)] == "L"  # Gemma 2 (2024), section 2

    def attend(x_TD, block=block, local=local):
      attention_params = block["attention"]
      return self_attention(
        attention_params, params, cfg, x_TD, row, causal=causal, local=local
      )

    def cross_attend(x_TD, block=block):
      return _cross_attention(block["cross_attention"], cfg, x_TD, row, *source)

    def feed_forward(x_TD, block=block):
      if cfg.moe.num_experts:
        return mixture(block["ffn"], cfg, x_TD)
      return ffn(block["ffn"], cfg, x_TD, cfg.biased)

    branches = {"attention": attend, "cross_attention": cross_attend, "ffn": feed_forward}
    if source is None:
      del branches["cross_attention"]
    x_TD = _block(block, cfg, x_TD, branches)
  if cfg.norm_placement == "post":
    return x_TD
  return norm(params["final_norm"], cfg, x_TD)


def _embed(params, embedding, cfg, row):
  """Tokens (Vaswani et al., 2017, section 3.4) plus positions (section 3.5) plus types
  (Devlin et al., 2019, section 3), then a norm (their code; BLOOM, 2022, section 3.2.2).
  """
  rows = []
  for token, position, kind in zip(row.tokens_T, row.positions_T, row.types_T, strict=True):
    x_D = embedding["table"][token]
    if cfg.embedding_scaled:
      x_D = math.sqrt(len(x_D)) * x_D
    if cfg.positions == "learned":
      x_D = x_D + params["positions"]["table"][position]
    elif cfg.positions == "sinusoidal":
      x_D = x_D + sinusoid(position, len(x_D))
    elif cfg.positions not in ("rope", "alibi", "relative", "none"):
      raise NotImplementedError(cfg.positions)
    if cfg.num_token_types:
      x_D = x_D + params["token_types"]["table"][kind]
    rows.append(x_D)
  x_TD = np.stack(rows)
  return norm(params["embedding_norm"], cfg, x_TD) if cfg.embedding_norm else x_TD


def _block(params, cfg, x_TD, branches):
  """One block: its branches in a row, or side by side, around the residual stream.

  Norms behind the sum (Vaswani et al., 2017, section 3.1), in front (Xiong et al., 2020,
  section 3.1), behind each branch (Liu et al., 2022, section 3.2), or around it (Ding et
  al., 2021, section 2.4). Side by side behind one norm (Wang & Komatsuzaki, 2021; Chowdhery
  et al., 2022, section 2), or two (Black et al., 2022, section 2.1.2).
  """

  def normed(name, x_TD):
    return norm(params[f"{name}_norm"], cfg, x_TD)

  if cfg.parallel != "none":
    first_TD = normed("attention", x_TD)
    second_TD = first_TD if cfg.parallel == "one_norm" else normed("ffn", x_TD)
    assert set(branches) == {"attention", "ffn"}
    return x_TD + branches["attention"](first_TD) + branches["ffn"](second_TD)
  for name, branch in branches.items():
    if cfg.norm_placement == "pre":
      x_TD = x_TD + branch(normed(name, x_TD))
    elif cfg.norm_placement == "post":
      x_TD = normed(name, x_TD + branch(x_TD))
    elif cfg.norm_placement == "output":
      x_TD = x_TD + normed(f"{name}_output", branch(x_TD))
    elif cfg.norm_placement == "both":
      x_TD = x_TD + normed(f"{name}_output", branch(normed(name, x_TD)))
    else:
      raise NotImplementedError(cfg.norm_placement)
  return x_TD


def self_attention(params, stack_params, cfg, x_TD, row, *, causal, local):
  """A row's attention to itself: what it sees, and how it tells distances apart.

  Distances in slots (ALiBi: Press et al., 2022, section 3; T5's buckets, one table for all
  layers: Raffel et al., 2020, section 2.1) or in positions (RoPE: Su et al., 2021, section
  3.2.2). A bidirectional query takes the distance either way for ALiBi.
  """
  N, H = params["q"]["kernel"].shape[1:]

  def sees(t, s):
    return visible(cfg, t, s, row.segments_T, row.positions_T, causal=causal, local=local)

  turn = bias = None
  if cfg.positions == "rope":
    angles, factor = rotation(cfg, H, local)
    turn = lambda x_H, t: rotate(x_H, float(row.positions_T[t]), angles, factor)
  elif cfg.positions == "alibi":
    slopes = alibi_slopes(N)
    bias = lambda n, t, s: -slopes[n] * abs(t - s)
  elif cfg.positions == "relative":
    table = stack_params["relative_bias"]["table"]
    buckets = (cfg.relative_buckets, cfg.relative_distance, causal)
    bias = lambda n, t, s: table[relative_bucket(s - t, *buckets), n]
  return attention(params, cfg, x_TD, x_TD, sees, bias, turn)


def _cross_attention(params, cfg, x_TD, row, memory_SD, source):
  """Attention to all of the source that has the same number, without any notion of
  distance (Vaswani et al., 2017, section 3.2.3; Raffel et al., 2020, section 2.1)."""

  def sees(t, s):
    return row.segments_T[t] == source.segments_T[s]

  return attention(params, cfg, x_TD, memory_SD, sees)


def _logits(params, cfg, x_TD):
  """Logits (T, V): Vaswani et al. (2017), section 3.4; before it dense, activation, norm
  (Devlin et al., 2019, code); after it scale (Raffel et al., 2020, code; Cohere), bias,
  and soft-cap (Gemma 2, 2024, section 2)."""
  if cfg.head_transform:
    transform = params["head_transform"]
    x_TD = x_TD @ transform["dense"]["kernel"] + transform["dense"]["bias"]
    x_TD = norm(transform["norm"], cfg, activate(cfg.activation, x_TD))
  if cfg.tied_embeddings:
    logits_TV = x_TD @ params["embedding"]["table"].T
  else:
    logits_TV = x_TD @ params["head"]["kernel"]
  logits_TV = cfg.logit_scale * logits_TV
  if cfg.head_biased:
    logits_TV = logits_TV + params["head_bias"]
  return soft_cap(logits_TV, cfg.logit_softcap)


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


def filtered_distribution(
  logits_V, temperature=None, top_k=None, top_p=None, min_p=None, typical_p=None
):
  """The probabilities (V,) that a sampler must draw from; none = that filter is off.

  After the temperature (0 = the likeliest token alone), in this order and renormalised
  after each: the `top_k` likeliest tokens (Fan et al., 2018), the smallest set whose
  mass reaches `top_p` (Holtzman et al., 2020), the tokens at least `min_p` times as
  likely as the likeliest (Nguyen et al., 2024), and the smallest set of mass `typical_p`
  whose surprise is nearest the entropy (Meister et al., 2023). Equals stay together.
  """
  logits_V = np.asarray(logits_V, dtype=np.float64)
  if temperature == 0:
    return _keep(np.ones(len(logits_V)), [int(np.argmax(logits_V))])
  p_V = softmax(logits_V / (1.0 if temperature is None else temperature))
  if top_k is not None:
    p_V = _keep(p_V, _foremost(p_V, np.ones_like(p_V), top_k))
  if top_p is not None and top_p < 1:
    p_V = _keep(p_V, _foremost(p_V, p_V, top_p))
  if min_p is not None:
    threshold = min_p * np.max(p_V)
    p_V = _keep(p_V, [token for token in range(len(p_V)) if p_V[token] >= threshold])
  if typical_p is not None and typical_p < 1:
    possible = np.flatnonzero(p_V)
    surprise_V = np.full(len(p_V), np.inf)
    surprise_V[possible] = -np.log(p_V[possible])
    entropy = math.fsum(p_V[possible] * surprise_V[possible])
    p_V = _keep(p_V, _foremost(-np.abs(surprise_V - entropy), p_V, typical_p))
  return p_V


def adjusted_logits(
  logits_V,
  prompt,
  answer,
  repetition_penalty=1.0,
  presence_penalty=0.0,
  frequency_penalty=0.0,
  logit_bias=(),
):
  """Logits with a bias per token, CTRL's penalty (Keskar et al., 2019) for what occurred
  in prompt or answer, and OpenAI's two for what occurred in the answer, token by token."""
  adjusted = [float(x) for x in logits_V]
  for token, bias in dict(logit_bias).items():
    adjusted[token] += bias
  for token in {*prompt, *answer}:
    x = adjusted[token]
    adjusted[token] = x / repetition_penalty if x > 0 else x * repetition_penalty
  for token in answer:
    adjusted[token] -= frequency_penalty
  for token in {*answer}:
    adjusted[token] -= presence_penalty
  return np.array(adjusted)


def _foremost(keys_V, weights_V, budget):
  """The tokens for which all better tokens together weigh less than the budget."""
  betters = (weights_V[keys_V > key] for key in keys_V)
  return [token for token, weights in enumerate(betters) if math.fsum(weights) < budget]


def _keep(p_V, tokens):
  """`p_V` with all but `tokens` at zero, renormalised."""
  kept_V = np.zeros_like(p_V)
  for token in tokens:
    kept_V[token] = p_V[token]
  return kept_V / np.sum(kept_V)
