"""What a PNG says of how it was drawn, so that it can be drawn again: read as data from anywhere, field by field.

A PNG's text chunk "mm" holds one JSON object: which model (name and hash), how many pictures lie side by side, and of
each picture its prompt, seed and settings. The chunk "parameters" says the same of the first one in a line to read.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, cast

from mm.diffusion.sampler import SOLVERS
from mm.evaluation.given import real, whole
from mm.evaluation.sampling import MOST_STEPS, Settings

if TYPE_CHECKING:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    from mm.diffusion.sampler import Solver

VERSION = 1
LARGEST = 16 << 20  # characters of the JSON
MOST = 10_000  # pictures in one file
_HASH = re.compile(r"[0-9a-f]{64}\Z")


@dataclass(frozen=True)
class Record:
    """How one picture was drawn. `like`, `start`, `mask`: SHA-256 of the pictures given; `autoguide`: model hash."""

    prompt: str | None
    seed: int
    steps: int
    guidance: float
    solver: str
    interval: tuple[float, float]
    strength: float
    negative: str | None = None
    best_of: int = 1  # of so many candidates; `seed` is that of the one which was kept
    score: float | None = None  # its cosine with the prompt
    like: str | None = None
    start: str | None = None
    mask: str | None = None
    autoguide: str | None = None

    @property
    def settings(self) -> Settings:
        return Settings(self.steps, self.guidance, cast("Solver", self.solver), self.interval, self.strength)

    def line(self) -> str:
        """In words, for people."""
        parts = [f"prompt: {self.prompt or '(none)'}"]
        parts += [f"negative: {self.negative}"] if self.negative else []
        parts += [f"seed: {self.seed}", f"steps: {self.steps}", f"guidance: {self.guidance:g}"]
        return ", ".join([*parts, f"solver: {self.solver}"])


@dataclass(frozen=True)
class Sheet:
    """All pictures of a file, in rows of `columns`."""

    run: str  # as it was typed
    model: str  # hash
    columns: int
    pictures: tuple[Record, ...]
    captions: bool = False


def text_chunks(sheet: Sheet) -> PngInfo:
    """For `PIL.Image.save(..., pnginfo=)`."""
    from PIL.PngImagePlugin import PngInfo

    from mm.evaluation.run import versions

    info = PngInfo()
    data = {"version": VERSION, "mm": versions()["mm"], **asdict(sheet)}
    data["run"] = sheet.run.encode("utf-8", "replace").decode()  # a folder's name may be no Unicode
    info.add_itxt("mm", json.dumps(data, ensure_ascii=False))
    info.add_itxt("parameters", f"{sheet.pictures[0].line()}, model: {sheet.model[:12]}")
    return info


def read_sheet(path: str) -> Sheet:
    """What a PNG says of itself. Raises ValueError where it is none, or says nothing, or something that cannot be."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # no pixel is decoded here
            with Image.open(path, formats=("PNG",)) as image:  # reads what stands before them
                text = image.info.get("mm")
    except UnidentifiedImageError as error:
        raise ValueError(f"{path}: not a PNG") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.errno:  # missing, a folder, no permission: says so itself
            raise
        raise ValueError(f"{path}: a damaged PNG ({' '.join(str(error).split())[:160]})") from error
    if not isinstance(text, str):
        raise ValueError(f"{path}: says nothing of how it was drawn; give a PNG that mm generate wrote")
    try:
        return _sheet(text)
    except ValueError as error:
        raise ValueError(f"{path}: what it says of how it was drawn cannot be used: {error}") from error


def _sheet(text: str) -> Sheet:
    if len(text) > LARGEST:
        raise ValueError(f"{len(text)} characters are over the limit of {LARGEST}")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError("not JSON") from error
    version = data.get("version") if isinstance(data, dict) else None
    if not whole(version) or version != VERSION:
        raise ValueError(f"version {_shown(version)} where this mm reads {VERSION}")
    names = ["version", "mm", *(item.name for item in fields(Sheet))]
    if set(data) - set(names):
        raise ValueError(f"it must be an object with {', '.join(names)}")
    rows = data.get("pictures")
    if not isinstance(rows, list) or not 1 <= len(rows) <= MOST:
        raise ValueError(f"pictures must be a list of 1 to {MOST:,}")
    return Sheet(
        run=_field(data, "run", _text),
        model=_field(data, "model", _hash),
        columns=_field(data, "columns", _count),
        pictures=tuple(_record(row) for row in rows),
        captions=_field(data, "captions", lambda value: isinstance(value, bool)),
    )


def _record(row: Any) -> Record:
    names = [item.name for item in fields(Record)]
    if not isinstance(row, dict) or set(row) - set(names):
        raise ValueError(f"a picture must be an object with {', '.join(names)}")
    values = {name: _field(row, name, CHECKS[name]) for name in names}
    record = Record(**{**values, "interval": tuple(values["interval"])})
    _ = record.settings  # its own checks
    return record


def _field(data: dict[str, Any], name: str, check: Callable[[Any], bool]) -> Any:
    value = data.get(name)
    if not check(value):
        raise ValueError(f"{name} = {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    """Some of it, in one line."""
    if isinstance(value, str):
        return repr(value[:40])
    return type(value).__name__ if isinstance(value, list | dict) else repr(value)[:40]


def _int(value: Any, low: int, high: int) -> bool:
    return whole(value) and low <= value <= high


def _text(value: Any) -> bool:
    """Unicode: JSON can write half of a character, which no file or terminal takes."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _hash(value: Any) -> bool:
    return isinstance(value, str) and bool(_HASH.match(value))


def _count(value: Any) -> bool:
    return _int(value, 1, MOST)


def _maybe(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


CHECKS: dict[str, Callable[[Any], bool]] = {
    "prompt": _maybe(_text),
    "seed": lambda value: _int(value, -(2**63), 2**63 - 1),
    "steps": lambda value: _int(value, 1, MOST_STEPS),
    "guidance": real,
    "solver": lambda value: isinstance(value, str) and value in SOLVERS,
    "interval": lambda value: isinstance(value, list) and len(value) == 2 and all(map(real, value)),
    "strength": real,
    "negative": _maybe(_text),
    "best_of": _count,
    "score": _maybe(real),
    "like": _maybe(_hash),
    "start": _maybe(_hash),
    "mask": _maybe(_hash),
    "autoguide": _maybe(_hash),
}


def records_of(pictures: Sequence[Image.Image]) -> tuple[Record, ...]:
    """Those that `mm.evaluation.generation.generate` left in the pictures."""
    return tuple(picture.info["mm"] for picture in pictures)
