# SPDX-License-Identifier: Apache-2.0
"""Memory, time and cost of a config on a mesh of chips, before any is rented."""
