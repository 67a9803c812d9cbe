# SPDX-License-Identifier: Apache-2.0
"""What compilers and chips need: the same mathematics in the form that runs fast.

Each function says which plain form it equals, why it is there, and what it gains (the
measurements are in docs/LOG.md). tests/nn/kernels/ holds each to its plain form.

- paths.py: which way attention takes on the devices at hand, and why
- blocked.py: attention over whole rows in XLA's operations
- cudnn.py: attention by NVIDIA's fused kernel
- cached.py: attention over a cache, where one token is decoded at a time
- outline.py: what attention keeps, for the planner, which computes nothing
- products.py: products with weights, in training and in decoding
- fused.py: norms, activations and RoPE's tables, recomputed or kept apart
"""
