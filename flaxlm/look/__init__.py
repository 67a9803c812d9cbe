# SPDX-License-Identifier: Apache-2.0
"""Pictures of what a model is made of: each a `View`, written as one page or one PNG."""
