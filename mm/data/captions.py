"""Where captions are taken from: `txt`, `caption`, or a field of the sample's `json`; several, with probabilities."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from mm.config import ConfigError


class Choice(NamedTuple):
    """One place a caption may come from: a part of the sample, and for json the path of its field."""

    part: str
    fields: tuple[str, ...]
    weight: float


Texts = list[tuple[list[str], float]]  # what a sample has: the strings of each place, and its weight


class Captions:
    """Reads `"txt"`, `"json.caption"`, or several with weights such as `"txt=0.7,json.aliases=0.3"`.

    In training one place is drawn among those that the sample has, and of a field that holds a list one of its strings;
    otherwise the first that the sample has is taken. `parts`: the parts of a sample that are read. Raises ConfigError.
    """

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self.choices = [self._choice(word.strip()) for word in spec.split(",")]
        self.parts = tuple(dict.fromkeys(choice.part for choice in self.choices))

    def _choice(self, word: str) -> Choice:
        place, equals, number = word.partition("=")
        part, *fields = place.strip().split(".")
        try:
            weight = float(number) if equals else 1.0
        except ValueError:
            weight = 0.0
        if part not in ("txt", "caption", "json") or bool(fields) != (part == "json") or not all(fields):
            raise ConfigError(
                f"data.caption = {self.spec!r}: {word!r} is no place for a caption; use txt, caption, or json.FIELD, "
                "or several with weights: 'txt=0.7,json.FIELD=0.3'"
            )
        if not 0 < weight < float("inf"):
            raise ConfigError(f"data.caption = {self.spec!r}: the weight in {word!r} must be a number above 0")
        return Choice(part, tuple(fields), weight)

    def texts(self, get: Callable[[str], bytes | None], *, every: bool) -> Texts:
        """What a sample has, in the order of the spec, or without `every` only the first; `get(part)` gives the bytes.

        Raises ValueError with the last reason where it has none that can be used.
        """
        found: Texts = []
        known: dict[str, bytes | None] = {}
        reason = "no caption"
        for part, fields, weight in self.choices:
            if part not in known:
                known[part] = get(part)
            data = known[part]
            if data is None:
                continue
            try:
                found.append((_field(data, fields) if fields else [text(data)], weight))
            except ValueError as error:
                reason = str(error)
                continue
            if not every:
                break
        if not found:
            raise ValueError(reason)
        return found


def draw(texts: Texts, rng: np.random.Generator) -> str:
    """One string: a place by weight, then any of its strings."""
    ends = np.cumsum([weight for _, weight in texts])
    place, which = rng.random(2)
    strings = texts[min(int(np.searchsorted(ends, place * ends[-1], side="right")), len(texts) - 1)][0]
    return strings[int(which * len(strings))]


def text(data: bytes) -> str:
    """The caption in UTF-8 `data`, stripped. Raises ValueError where it is not UTF-8 or holds nothing."""
    try:
        caption = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"caption is not UTF-8: {error.reason} at byte {error.start}") from error
    if not caption:
        raise ValueError("caption is empty")
    return caption


def _field(data: bytes, fields: tuple[str, ...]) -> list[str]:
    """The strings in a field of JSON metadata. Raises ValueError where it is not JSON or holds none there."""
    try:
        value: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"metadata is not JSON: {' '.join(str(error).split())[:100]}") from error
    for field in fields:
        value = value.get(field) if isinstance(value, dict) else None
    strings = [text.strip() for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
    if not any(strings):
        raise ValueError(f"metadata has no text in {'.'.join(fields)!r}")
    try:
        "".join(strings).encode()
    except UnicodeEncodeError as error:  # JSON can say half a surrogate pair, which no tokenizer takes
        raise ValueError(f"metadata's {'.'.join(fields)!r} is not Unicode text: {error.reason}") from error
    return [text for text in strings if text]


def per_source(spec: str, sources: int) -> list[Captions]:
    """One `Captions` a source: `spec` holds one for all, or one each joined by `::`."""
    words = spec.split("::")
    if len(words) not in (1, sources):
        raise ConfigError(
            f"data.caption = {spec!r}: is for {len(words)} sources, data.train names {sources}; give one, or one each"
        )
    read = [Captions(word.strip()) for word in words]
    return read * sources if len(read) == 1 else read


def read_weights(spec: str, sources: int) -> list[float] | None:
    """`data.weights`, one number a source joined by `::`; None where it is empty and sources are simply joined."""
    if not spec.strip():
        return None
    try:
        numbers = [float(word) for word in spec.split("::")]
    except ValueError as error:
        raise ConfigError(f"data.weights = {spec!r}: must be numbers joined by ::, such as '2::1'") from error
    if len(numbers) != sources or not all(0 < number < float("inf") for number in numbers):
        raise ConfigError(
            f"data.weights = {spec!r}: must be {sources} numbers above 0, one for each part of data.train joined by ::"
        )
    return numbers
