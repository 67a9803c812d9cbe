# SPDX-License-Identifier: Apache-2.0
"""Pictures of a model and of what it does: each is a `View`, saved as a page or a PNG."""
