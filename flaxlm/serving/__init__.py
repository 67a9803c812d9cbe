# SPDX-License-Identifier: Apache-2.0
"""A server of OpenAI's protocol over one run, a client of the engine."""
