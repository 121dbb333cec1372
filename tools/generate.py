"""Draw images from text, as a grid: tools/generate.py RUN PROMPT... --n 4 --out grid.png.

The same as `mm generate`.
"""

from __future__ import annotations

import sys

from mm.cli import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
