"""Train what a config file describes; the same command resumes: tools/train.py configs/debug.py --data.train SHARDS.

The same as `mm train`.
"""

from __future__ import annotations

import sys

from mm.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
