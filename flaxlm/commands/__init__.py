# SPDX-License-Identifier: Apache-2.0
"""The commands: what each one reads and prints; the work is done by other packages.

A command imports what it needs when it runs, so that --help is instant.
"""
