# SPDX-License-Identifier: Apache-2.0
"""Training: `step` is traced and pure; `loop` is the host's side, with all effects."""
