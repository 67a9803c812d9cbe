#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Continues a prompt with a trained run: `python infer.py [RUN] --prompt "def "`.

Without RUN: the newest one under runs/. The same as `flaxlm infer`.

The way from here to the drawn token; each name stands in the source of the one before, or
of its class:

`infer.py` -> `cli.main` -> `build_parser` -> `commands.infer.add_infer` -> `run_infer` ->
`print_completions` -> `decoding.completions.complete_samples` -> `complete` ->
`complete_request` -> `grow_completions` -> `answer_all` -> `decoding.engine.Engine.step` ->
`Engine._start_block` -> `decoding.rows.decode_rows` -> `draw_step` ->
`decoding.drawing.sample` -> `next_token` -> `draw` -> `inverse_cdf`
"""

import sys

from flaxlm.cli import main

if __name__ == "__main__":
  sys.exit(main(["infer", *sys.argv[1:]]))
