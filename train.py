#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Trains a language model: `python train.py [CONFIG] [--section.field=value ...]`.

Without arguments: a small decoder on Python's own standard library, about 3 minutes on a
laptop. The same as `flaxlm train`.

The way from here to the softmax of attention; each name stands in the source of the one
before, or of its class:

`train.py` -> `cli.main` -> `build_parser` -> `commands.train.add_train` -> `run_train` ->
`training.loop.train` -> `training.program.Compiler.start` -> `build_program` ->
`training.step.jit_train_step` -> `train_step` -> `loss_and_gradient` ->
`training.logprobs.learning_pass` -> `nn.models.Decoder.hidden` -> `nn.stack.Stack` ->
`Stack.run_blocks` -> `Stack.layers` -> `nn.block.Block` -> `Block.attend` ->
`nn.attention.Attention` -> `nn.kernels.blocked.attend_blocked` -> `mix` -> `mix_forward`
"""

import sys

from flaxlm.cli import main

if __name__ == "__main__":
  sys.exit(main(["train", *sys.argv[1:]]))
