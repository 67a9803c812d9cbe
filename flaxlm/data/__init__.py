# SPDX-License-Identifier: Apache-2.0
"""From a corpus to batches: corpus, builders, sources -> prepare -> rows, batches.

Nothing here imports jax or TensorFlow (Grain itself loads jax where it is installed).
"""
