# SPDX-License-Identifier: Apache-2.0
"""The commands: each is parsed here and calls one function of the package.

What a command needs is imported when it runs, so that --help is instant.
"""
