"""Measure a trained model on shards: tools/evaluate.py RUN --data SHARDS --out results.json.

The same as `mm evaluate`.
"""

from __future__ import annotations

import sys

from mm.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
