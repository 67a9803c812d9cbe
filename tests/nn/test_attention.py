# SPDX-License-Identifier: Apache-2.0
"""The attention paths agree, forward and backward, for every mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxlm.nn.attention import Visibility, attend, attend_blocked, query_blocks, visible


@pytest.mark.parametrize("num_tokens", [9, 130, 256])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_blocked_equals_reference_with_gradients(num_tokens, kv_heads):
  B, T, N, H = 2, num_tokens, 4, 8
  keys = jax.random.split(jax.random.key(num_tokens), 4)
  q = jax.random.normal(keys[0], (B, T, N, H))
  k, v = jax.random.normal(keys[1], (2, B, T, kv_heads, H))
  cotangent = jax.random.normal(keys[2], (B, T, N, H))
  slots = jnp.broadcast_to(jnp.arange(T), (B, T))
  segments = 1 + (slots > T // 3) + (slots > T // 2)
  mask = visible(Visibility(slots, segments, segments), T, window=T // 2)

  def output_and_gradients(attention):
    return jax.jit(lambda *x: (attention(*x), jax.vjp(attention, *x)[1](cotangent)))(
      q, k, v
    )

  expected = output_and_gradients(lambda q, k, v: attend(q, k, v, mask)[0])
  actual = output_and_gradients(lambda q, k, v: attend_blocked(q, k, v, mask))
  jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, atol=2e-5), actual, expected)


@pytest.mark.parametrize("num_queries", [1, 63, 64, 130, 256, 1000])
def test_query_blocks_cover_every_query_once(num_queries):
  covered = [i for start, end in query_blocks(num_queries) for i in range(start, end)]
  assert covered == list(range(num_queries))


def test_bfloat16_stays_close_to_float32():
  """The softmax runs in float32 whatever the inputs: errors stay at bfloat16's rounding."""
  q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 128, 2, 16))
  slots = jnp.arange(128)[None]
  mask = visible(Visibility(slots), 128, None)
  exact = attend(q, k, v, mask)[0]
  narrow = attend_blocked(*(x.astype(jnp.bfloat16) for x in (q, k, v)), mask)
  assert narrow.dtype == jnp.bfloat16
  np.testing.assert_allclose(narrow.astype(jnp.float32), exact, atol=0.03)
