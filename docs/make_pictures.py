# SPDX-License-Identifier: Apache-2.0
"""Makes the pictures of these pages from a run: `python docs/make_pictures.py RUN`.

Those that are stored are of the default run, as `python train.py` makes it.
"""

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "pictures"
TEXT = "def read(path):\n  with open(path) as f:\n    return f.read()"
# What `flaxlm look` draws, and with which options.
PICTURES = {
  "attention": ["--text", TEXT],
  "embeddings": [],
  "positions": [],
  "run": [],
  "story": ["--text", "def read(path):"],
  "tokens": ["--text", TEXT],
}


def main(run: str) -> None:
  for name, options in PICTURES.items():
    command = [sys.executable, "-m", "flaxlm.cli", "look", name, run, *options]
    subprocess.run([*command, "--output", str(FOLDER / f"{name}.png")], check=True)


if __name__ == "__main__":
  if len(sys.argv) != 2:
    sys.exit(__doc__)
  main(sys.argv[1])
