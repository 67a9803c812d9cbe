# SPDX-License-Identifier: Apache-2.0
"""Pure Flax Linen modules: numbers in, numbers out. No files, no devices, no experiment.

Letters, in the suffix of a tensor's name as in an einsum (docs/design.md, section 4):
B batch, T query positions, S key positions, D width, N query heads, K kv heads,
G = N / K, H head dim, F feed-forward width, V vocabulary, L layers.
"""
