# SPDX-License-Identifier: Apache-2.0
"""Conversations as text: chat templates, and the process that renders them.

`decoding` has a prompt rendered for an answer, `data` whole conversations to learn from.
"""
