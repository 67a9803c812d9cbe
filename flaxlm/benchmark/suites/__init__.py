# SPDX-License-Identifier: Apache-2.0
"""The suites of `flaxlm bench`, one a file; `run` runs them and judges the results."""
