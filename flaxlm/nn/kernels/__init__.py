# SPDX-License-Identifier: Apache-2.0
"""The same mathematics in forms that compilers and chips run fast.

Each function says which plain form it equals, why it exists, and what it gains (the
measurements are in docs/LOG.md). tests/nn/kernels/ compares each with its plain form.

- paths.py: which kernel computes attention on the devices at hand, and why
- blocked.py: attention over whole rows in XLA's operations
- cudnn.py: attention by NVIDIA's fused kernel
- tiled.py: attention over long rows on a CPU
- cached.py: attention over a cache, where one token is decoded at a time
- outline.py: what attention keeps for the backward pass, for the planner
- products.py: products with weights, in training and in decoding
- int4.py: matrices of 4-bit numbers, for decoding
- few_rows.py: few rows times a narrow matrix, as one kernel for NVIDIA GPUs
- grouped.py: products of groups of rows, each with a kernel of its own, for experts
- fusion.py: norms and activations, which are recomputed, and RoPE's tables
"""
