# SPDX-License-Identifier: Apache-2.0
"""Positional encodings as the papers define them, in float64 numpy loops.

Part of `references`, with the same rules: slow on purpose, no jax, no flaxlm.
"""

import math

import numpy as np


def sinusoid(position, D):
  """[sines | cosines] of one position (Vaswani et al., 2017, section 3.5), halves."""
  angles = [float(position) / 10_000 ** (2 * i / D) for i in range(D // 2)]
  return np.array([math.sin(a) for a in angles] + [math.cos(a) for a in angles])


# -- Rotary positions ------------------------------------------------------------------


def rotate(x_H, position, angles, factor=1.0):
  """RoPE (Su et al., 2021, section 3.2.2), of the first 2 * len(angles) dims alone.

  Pair i turns by `position * angles[i]` and grows by `factor`. Pairs are (i, i + R/2) of
  R rotated dims, as in Hugging Face's LLaMA; the paper's (2i, 2i + 1) is a permutation.
  """
  y_H = np.array(x_H, dtype=float)
  half = len(angles)
  for i, angle in enumerate(angles):
    turn = factor * complex(math.cos(position * angle), math.sin(position * angle))
    z = complex(x_H[i], x_H[i + half]) * turn
    y_H[i], y_H[i + half] = z.real, z.imag
  return y_H


def rotation(cfg, H, local):
  """(radians per position of each pair, factor of cos and sin) of a head of H dims.

  Su et al. (2021), section 3.2.2; only a share of the dims turns in Black et al. (2022),
  section 2.1.1; local layers have a base of their own, unstretched, in Gemma 3 (2025),
  section 2; stretching is described where it is done.
  """
  rope = cfg.rope
  R = 2 * int(H * rope.fraction / 2)
  if local and rope.local_theta is not None:
    return plain_angles(rope.local_theta, R), 1.0
  angles = plain_angles(rope.theta, R)
  context = rope.original_context or int(cfg.context / rope.factor)
  if rope.scaling == "none":
    return angles, 1.0
  if rope.scaling == "linear":  # Chen et al., 2023, section 2.3: positions squeezed
    return [angle / rope.factor for angle in angles], 1.0
  if rope.scaling == "ntk":  # Peng et al., 2023, section 3.1: the slowest pair fully so
    return plain_angles(rope.theta * rope.factor ** (R / (R - 2)), R), 1.0
  if rope.scaling == "yarn":
    attention_factor = rope.attention_factor
    if attention_factor is None:  # Peng et al., 2023, section 3
      attention_factor = 0.1 * math.log(rope.factor) + 1
    return yarn_angles(angles, rope, R, context), attention_factor
  if rope.scaling == "llama3":
    return [llama3_angle(angle, rope, context) for angle in angles], 1.0
  raise NotImplementedError(rope.scaling)


def plain_angles(theta, R):
  """Radians per position of each of R/2 pairs (Su et al., 2021, section 3.2.2)."""
  return [theta ** (-2 * i / R) for i in range(R // 2)]


def yarn_angles(angles, rope, R, context):
  """Pairs that turn slowly stretch, fast ones do not (Peng et al., 2023, section 3.2).

  Between the two the share of stretching grows in proportion to the pair's number, from
  and to whole numbers: the authors' code and transformers' do so, where the paper
  makes it linear in the number of turns.
  """

  def pair_that_turns(turns):
    return R * math.log(context / (2 * math.pi * turns)) / (2 * math.log(rope.theta))

  first = max(math.floor(pair_that_turns(rope.fast_turns)), 0)
  last = min(math.ceil(pair_that_turns(rope.slow_turns)), R - 1)
  if first == last:
    last += 0.001
  stretched = []
  for i, angle in enumerate(angles):
    share = min(max((i - first) / (last - first), 0.0), 1.0)
    stretched.append(share * angle / rope.factor + (1 - share) * angle)
  return stretched


def llama3_angle(angle, rope, context):
  """Pairs that turn slowly stretch, fast ones do not, and between the two the share is
  linear in the turns over the original context (Llama 3.1's code, `apply_scaling`)."""
  turns = context * angle / (2 * math.pi)
  if turns < rope.slow_turns:
    return angle / rope.factor
  if turns > rope.fast_turns:
    return angle
  kept = (turns - rope.slow_turns) / (rope.fast_turns - rope.slow_turns)
  return (1 - kept) * angle / rope.factor + kept * angle


# -- Biases of the scores --------------------------------------------------------------


def alibi_slopes(N):
  """The slope of each head (Press et al., 2022, section 3): 2^(-8/N), its powers.

  If N is no power of two, the heads beyond the last one take every other slope of twice
  as many heads (the authors' code, and BLOOM's).
  """
  P = 2 ** int(math.log2(N))
  slopes = [2 ** (-8 * (n + 1) / P) for n in range(P)]
  return slopes + [2 ** (-8 * (2 * n + 1) / (2 * P)) for n in range(N - P)]


def relative_bucket(distance, num_buckets, max_distance, causal):
  """T5's bucket of a key `distance` slots after its query (Raffel et al., 2020, section
  2.1).

  Half of the buckets hold one distance each, the others ranges that grow in proportion to
  the distance, the last one all from `max_distance` on. Both directions share them in
  halves, later keys second; a causal query has none later. In whole numbers throughout,
  so that no rounding decides at a range's end.
  """
  first = 0
  if causal:
    distance = max(-distance, 0)
  else:
    num_buckets //= 2
    first = num_buckets if distance > 0 else 0
    distance = abs(distance)
  exact = num_buckets // 2
  if distance < exact:
    return first + distance
  # Range j begins at exact * (max_distance / exact)^(j / ranges).
  ranges = num_buckets - exact
  j = 0
  while (
    j + 1 < ranges
    and distance**ranges * exact ** (j + 1) >= max_distance ** (j + 1) * exact**ranges
  ):
    j += 1
  return first + exact + j
