# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: Orbax stores them; a manifest of hashes proves that they are whole."""
