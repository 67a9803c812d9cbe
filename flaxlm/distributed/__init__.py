# SPDX-License-Identifier: Apache-2.0
"""Several processes as one job: who belongs to it, who agrees, who is still there."""
