#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Continues a prompt with a trained run: `python infer.py [RUN] --prompt "def "`.

Without RUN: the newest one under runs/. The same as `flaxlm infer`.
"""

import sys

from flaxlm.cli import main

if __name__ == "__main__":
  sys.exit(main(["infer", *sys.argv[1:]]))
