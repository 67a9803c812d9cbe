# SPDX-License-Identifier: Apache-2.0
"""Decoding: prompts in, completions out, through one jitted loop over a cache."""
