# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of a machine: how a time is taken, what it is held against, and the suites.

Every figure comes with its range over rounds, and with a check that the timed program
computed the right thing. Only `suites/` and `peers/` know what is measured.
"""
