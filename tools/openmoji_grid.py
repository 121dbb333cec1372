"""What the shipped model draws, as the picture that README shows: python tools/openmoji_grid.py SHARDS [MODEL] [OUT]

16 prompts of the training split, 12 people in skin tones that they were never seen in, 4 other held-out names, seeds
0 to 31; nothing is picked by result. SHARDS: the folder that `mm shards openmoji` made.
"""

from __future__ import annotations

import sys
from pathlib import Path

import mm
from mm.evaluation.gallery import make_gallery, sheet
from mm.evaluation.images import png_bytes, write_whole

COMBINATIONS = 12
SIDE = 128  # pixels of a drawing in the sheet


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    shards, model, out = [*sys.argv[1:], *(None, "openmoji", "benchmarks/openmoji-grid.png")[len(sys.argv) - 1 :]]
    files = {split: sorted(map(str, Path(str(shards)).glob(f"{split}-*.tar"))) for split in ("train", "val")}
    inference = mm.load(str(model)).inference
    gallery = make_gallery(
        inference, files["train"], files["val"], [], combinations=COMBINATIONS, progress=sys.stderr.isatty()
    )
    write_whole(Path(str(out)), png_bytes(sheet(gallery.drawings, size=SIDE)))
    print(out)


if __name__ == "__main__":
    main()
