# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of other libraries: one table per family, read in both directions."""
