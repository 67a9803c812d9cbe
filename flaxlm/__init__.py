# SPDX-License-Identifier: Apache-2.0
"""flaxlm: a small, complete language-model package in JAX and Flax.

Importing the package itself loads neither jax nor any backend; its modules do.
"""

__version__ = "0.1.0"
