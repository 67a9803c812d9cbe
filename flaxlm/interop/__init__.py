# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of other libraries: two tables per family, read in both directions."""
