"""Pictures that lie in files of their own: found, opened some at a time, classified in the order they were named."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from mm.data.index import Entry
from mm.evaluation.files import open_image
from mm.evaluation.predictions import Prediction, check_k, ranked

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from mm.adapters.base import Processor

BATCH = 32  # pictures opened and classified at once
EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "pbm", "avif", "jfif")
STDIN = "-"  # as a picture: a path a line on standard input


def found(names: Sequence[str]) -> list[str]:
    """The files that are named, and of each folder all pictures in it at any depth, by name; hidden ones left out.

    Raises ValueError for a folder without a picture. A name that is no folder is taken as a file, there or not.
    """
    paths: list[str] = []
    for name in names:
        if not os.path.isdir(name):
            paths.append(name)
            continue
        inside = []
        for folder, folders, files in os.walk(name):
            folders[:] = sorted(one for one in folders if not one.startswith("."))
            pictures = (one for one in sorted(files) if Path(one).suffix.lower()[1:] in EXTENSIONS)
            inside += [os.path.join(folder, one) for one in pictures if not one.startswith(".")]
        if not inside:
            raise ValueError(f"{name}: no picture in this folder; looked for {', '.join(EXTENSIONS)}")
        paths += inside
    return paths


def listed(stream: BinaryIO) -> Iterator[str]:
    """A path a line, as they come; blank lines are passed over."""
    for line in stream:
        if name := os.fsdecode(line.rstrip(b"\r\n")).strip():
            yield name


class FilePredictions:
    """Iterates over picture files, a `Prediction` each whose key is the path; memory does not grow with their number.

    `classify`: pictures to probabilities `[B, L]`. `workers`: threads that open pictures, 0 for none. After and during
    an iteration `lost` says which could not be read and why.
    """

    def __init__(
        self,
        classify: Callable[[list[Image.Image]], Tensor],
        labels: Sequence[str],
        processor: Processor,
        paths: Iterable[str],
        *,
        k: int = 5,
        workers: int = 0,
        progress: bool = False,
    ) -> None:
        check_k(k)
        self.classify, self.labels, self.processor, self.paths = classify, labels, processor, paths
        self.k, self.workers, self.progress = k, workers, progress
        self.lost: list[Entry] = []

    def __iter__(self) -> Iterator[Prediction]:
        from tqdm import tqdm

        self.lost, paths = [], iter(self.paths)
        total = len(self.paths) if isinstance(self.paths, Sequence) else None
        quiet = None if self.progress else True  # None: shown on a terminal only
        bar = tqdm(total=total, desc="classifying", unit="image", disable=quiet, leave=False)
        with bar, ThreadPoolExecutor(max(1, self.workers)) as pool:
            while names := list(islice(paths, BATCH)):
                opened = list(pool.map(self._open, names) if self.workers else map(self._open, names))
                self.lost += [one for one in opened if isinstance(one, Entry)]
                good = [(name, one) for name, one in zip(names, opened, strict=True) if not isinstance(one, Entry)]
                bar.update(len(names))
                if good:
                    tops = ranked(self.labels, self.classify([picture for _, picture in good]), self.k)
                    for (name, _), top in zip(good, tops, strict=True):
                        yield Prediction(name, "", top)

    def _open(self, path: str) -> Image.Image | Entry:
        """The picture as the model sees it: 32 large ones need not be held at once. Or why it cannot be read."""
        from PIL import Image

        try:
            item: dict[str, Any] = self.processor.prepare(open_image(path), train=False)
            return Image.fromarray(item["pixels"])
        except OSError as error:
            return Entry("", path, error.strerror or str(error))
        except ValueError as error:
            return Entry("", path, str(error).removeprefix(f"{path}: "))
