# SPDX-License-Identifier: Apache-2.0
"""Several processes as one job: which belong to it, whether they agree, which still run."""
