"""What `--data` names: mm's own shards, any others, or a folder in CLIP_benchmark's webdataset layout.

FOLDER/classnames.txt                          a class name a line, in the order of the labels
FOLDER/zeroshot_classification_templates.txt   such as "a photo of a {c}."
FOLDER/dataset_type.txt                        "retrieval", "multilabel", or no such file: classification
FOLDER/test/nshards.txt                        how many of 0.tar, 1.tar, ... there are
FOLDER/test/0.tar                              samples: webp, png or jpg, with cls (a number) or txt (lines)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mm.config import ConfigError
from mm.data.remote import is_remote
from mm.data.shards import expand
from mm.evaluation import hashes, samples

COUNT, CLASSES, TEMPLATES = "nshards.txt", "classnames.txt", "zeroshot_classification_templates.txt"
TYPE, TYPES = "dataset_type.txt", ("classification", "retrieval", "multilabel")
LARGEST = 64 << 20  # bytes of such a file


@dataclass
class DataSet:
    """Held-out shards `files` with those that they are told from; `folder` holds the lists of words, if any.

    `type`: of dataset_type.txt, "" for shards in no layout; `name` as CLIP_benchmark has it, `wds/FOLDER`.
    """

    name: str
    files: list[str]
    reference: list[str]
    folder: Path | None = None
    type: str = ""
    split: str = ""

    def classes(self) -> list[str]:
        """Class names, one a label. Raises ConfigError where there are none beside the shards."""
        return self._lines(CLASSES, "classes")

    def templates(self) -> list[str]:
        """Templates with `{}` where the class name goes. Raises ConfigError where there are none beside the shards."""
        return [line.replace("{c}", "{}") for line in self._lines(TEMPLATES, "templates")]

    def words_hash(self) -> str | None:
        """Of the lists of words beside the shards; None where there are none."""
        there = [self.folder / name for name in (CLASSES, TEMPLATES, TYPE)] if self.folder is not None else []
        texts = [_read(path) if path.is_file() else "" for path in there]
        return hashes.of_words(texts) if any(texts) else None

    def split_files(self, split: str) -> list[str]:
        """The shards of another split of the same data. Raises ConfigError where there is none."""
        if self.folder is None:
            raise ConfigError(f"split {split!r}: {self.name} is no folder of splits; name its shards")
        return split_files(self.folder, split)

    def _lines(self, file: str, what: str) -> list[str]:
        if self.folder is None or not (self.folder / file).is_file():
            raise ConfigError(
                f"{what}: no {file} beside the shards of {self.name}; put it there, or set {what} in a task's file"
            )
        return [line.strip() for line in _read(self.folder / file).rstrip().splitlines()]


def data_set(data: str, candidates: str | None = None, split: str | None = None) -> DataSet:
    """What `data` names. `split`: of a folder that holds several, "test" in CLIP_benchmark's layout by default.

    `candidates`: shards of the whole label set, as in `mm.evaluation.samples.around`. Raises ConfigError where nothing
    is there, or a file of the layout is damaged.
    """
    folder = Path(data).expanduser()
    if (folder / COUNT).is_file():
        if split not in (None, folder.name):
            raise ConfigError(f"split = {split!r}: {data} is the split {folder.name!r}; name the folder above it")
        folder, split = folder.parent, folder.name
    if is_remote(data) or not folder.is_dir() or not _in_layout(folder):
        said = ""
        if split is not None:
            if is_remote(data) or not folder.is_dir():
                raise ConfigError(f"split = {split!r}: {data} is no folder of splits; leave --split out")
            data, said = str(folder / f"{split}-*.tar"), f"{folder.resolve().name}/{split}"
        files, reference = samples.around(data, candidates)
        folders = {Path(file).parent for file in files}
        home = folders.pop() if len(folders) == 1 and not any(map(is_remote, files)) else None
        name = Path(data.split("::")[0].rstrip("/"))
        said = said or (name.name if name.is_dir() else "/".join([*name.parts[-2:-1], name.name]))
        return DataSet(said, files, reference, home, "", split or "")
    split = split or "test"
    files = split_files(folder, split)
    kind = _read(folder / TYPE).strip().lower() if (folder / TYPE).is_file() else "classification"
    if kind not in TYPES:
        raise ConfigError(f"{folder / TYPE}: {kind[:40]!r}: must be one of {', '.join(TYPES)}")
    if kind == "multilabel":
        raise ConfigError(f"{folder / TYPE}: multilabel: several labels a picture are not measured; use other data")
    reference = files if candidates is None else expand(candidates, mixed=True)
    return DataSet(f"wds/{folder.resolve().name.removeprefix('wds_')}", files, reference, folder, kind, split)


def split_files(folder: Path, split: str) -> list[str]:
    """The shards of one split, in the order of their numbers. Raises ConfigError."""
    count = folder / split / COUNT
    if not count.is_file():
        if found := sorted(str(path) for path in folder.glob(f"{split}-*.tar")):
            return found
        there = [path.parent.name for path in sorted(folder.glob(f"*/{COUNT}"))]
        there = there or sorted({path.name.split("-")[0] for path in folder.glob("*-*.tar")})
        raise ConfigError(f"split = {split!r}: not in {folder}; it has {', '.join(there) or 'none'}")
    text = _read(count).strip()
    if not text.isdecimal() or not 0 < int(text) <= 1_000_000:
        raise ConfigError(f"{count}: {text[:40]!r}: must be the number of shards beside it")
    files = [str(folder / split / f"{number}.tar") for number in range(int(text))]
    missing = next((file for file in files if not Path(file).is_file()), None)
    if missing:
        raise ConfigError(f"{missing}: no such shard, and {count} says there are {text}")
    return files


def _in_layout(folder: Path) -> bool:
    return any(folder.glob(f"*/{COUNT}"))


def _read(path: Path) -> str:
    if path.stat().st_size > LARGEST:
        raise ConfigError(f"{path}: over {LARGEST >> 20} MB; is it a list of words?")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from error
