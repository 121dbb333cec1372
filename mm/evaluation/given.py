"""What people give a drawing: numbers, and lists with one item a prompt. Each is refused in a line that names it."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from mm.data.decode import MAX_PIXELS

# what Pillow raises; the last two where the file has been closed
_DAMAGE = (OSError, SyntaxError, ValueError, AttributeError, AssertionError)


def whole(value: Any) -> bool:
    """A whole number, numpy's too; a bool is none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def real(value: Any) -> bool:
    """A finite number that fits a float; a bool is none."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def shown(value: Any) -> str:
    """As Python writes it, as much as fits into a line."""
    try:
        return " ".join(repr(value).split())[:80]
    except ValueError:  # Python writes no int of over 4,300 digits
        return f"one {type(value).__name__}"


def items(name: str, given: Any, count: int | None = None) -> list[Any]:
    """A list of `count` things. Raises ValueError where `given` has no order, no length, or another one."""
    try:
        if isinstance(given, str | bytes | dict) or not hasattr(given, "__getitem__"):
            raise TypeError
        found = list(given)
    except TypeError as error:
        raise ValueError(f"{name}: must be a list, not one {type(given).__name__}; put it in [ ]") from error
    if count is not None and len(found) != count:
        raise ValueError(f"{name}: {len(found)} given for {count} prompts; give one for each")
    return found


def texts(name: str, given: Any, count: int | None = None) -> list[str | None]:
    """Each a text or None."""
    if isinstance(given, str):
        raise ValueError(f"{name} = {shown(given)}: must be a list; write [{shown(given)}]")
    found = items(name, given, count)
    for place, words in enumerate(found):
        if words is not None and not isinstance(words, str):
            raise ValueError(f"{name}[{place}]: must be a text or None, not {type(words).__name__}")
        if words is not None and not words.isprintable() and _broken(words):
            raise ValueError(f"{name}[{place}] = {words[:40]!r}: holds half of a character; it is not Unicode text")
    return found


def _broken(words: str) -> bool:
    return any("\ud800" <= letter <= "\udfff" for letter in words)


def negatives(given: Any, count: int) -> list[str | None]:
    """One text for all, or one each."""
    return texts("negative", [given] * count if given is None or isinstance(given, str) else given, count)


def pictures(name: str, given: Any, count: int) -> list[Image.Image | None]:
    """Each a picture, decoded now, or None; [None, ...] for None."""
    found = [None] * count if given is None else items(name, given, count)
    for place, picture in enumerate(found):
        if picture is not None:
            _decode(f"{name}[{place}]", picture)
    return found


def _decode(name: str, picture: Any) -> None:
    if not isinstance(picture, Image.Image):
        raise ValueError(f"{name}: an image must be a PIL.Image, not {type(picture).__name__}")
    if not 0 < picture.width * picture.height <= MAX_PIXELS:
        raise ValueError(f"{name}: {picture.width}x{picture.height} pixels; must be 1 to {MAX_PIXELS:,} in all")
    try:
        picture.load()
    except _DAMAGE as error:
        reason = " ".join(str(error).split())[:160] or "its file is closed"
        raise ValueError(f"{name}: a damaged image ({reason})") from error
    if picture.mode == "F" and not np.isfinite(np.asarray(picture)).all():
        raise ValueError(f"{name}: not all of its pixels are finite numbers; give levels")


def seeds(given: Sequence[int] | None, count: int) -> list[int]:
    """Ints of at most 63 bits and a sign; 0 ... count - 1 for None."""
    found = []
    for place, seed in enumerate(items("seeds", range(count) if given is None else given, count)):
        try:
            if isinstance(seed, bool) or str(getattr(seed, "dtype", "")).endswith("bool"):
                raise TypeError
            found.append(operator.index(seed))
        except TypeError as error:
            raise ValueError(f"seeds[{place}] = {shown(seed)}: must be an int, not {type(seed).__name__}") from error
    if any(not -(2**63) <= number < 2**63 for number in found):
        raise ValueError(f"seeds: {shown(max(found, key=abs))} has over 63 bits; use a smaller one")
    return found
