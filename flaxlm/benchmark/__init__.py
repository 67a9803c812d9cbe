# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: one file per suite; figures come with their spread and a correctness gate."""
