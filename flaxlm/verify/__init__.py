# SPDX-License-Identifier: Apache-2.0
"""The laws of docs/design.md, checked on a user's own config, which is shrunk first."""
