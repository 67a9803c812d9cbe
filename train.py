#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Trains a language model: `python train.py [CONFIG] [--section.field=value ...]`.

Without arguments: a small decoder on Python's own standard library, about 3 minutes on a
laptop. The same as `flaxlm train`.

The way from here to the mathematics: `flaxlm.training.loop.train` ->
`flaxlm.training.step.train_step` -> `flaxlm.nn.models.Decoder` -> `Block` ->
`flaxlm.nn.attention.Attention` -> `attend`.
"""

import sys

from flaxlm.cli import main

if __name__ == "__main__":
  sys.exit(main(["train", *sys.argv[1:]]))
