"""Label images with words of your own: tools/classify.py RUN IMAGE... --labels cat,dog.

The same as `mm classify`.
"""

from __future__ import annotations

import sys

from mm.cli import main

if __name__ == "__main__":
    sys.exit(main(["classify", *sys.argv[1:]]))
