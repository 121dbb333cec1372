"""What the fields of nested config dataclasses are called, and what they take. Knows no setting in particular."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints


def section(hint: Any) -> Any:
    """The config dataclass behind a field's type `X` or `X | None`; None where the field is a plain value."""
    if get_origin(hint) is tuple:
        return None
    return next((kind for kind in (hint, *get_args(hint)) if dataclasses.is_dataclass(kind)), None)


def element(hint: Any) -> Any:
    """The config dataclass `X` of a field of the type `tuple[X, ...]`; None for any other."""
    kinds = get_args(hint) if get_origin(hint) is tuple else ()
    return kinds[0] if kinds and dataclasses.is_dataclass(kinds[0]) else None


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, value, type) of every plain field; a section that is switched off comes as itself, None."""
    hints = get_type_hints(type(config))
    for item in dataclasses.fields(config):
        name, value, hint = prefix + item.name, getattr(config, item.name), hints[item.name]
        if dataclasses.is_dataclass(value) and isinstance(value, section(hint) or ()):
            yield from leaves(value, name + ".")
        else:
            yield name, value, hint


def describe(hint: Any) -> str:
    """What a field takes, in words: "an int", "one of txt, aliases", "2 floats"."""
    if section(hint):
        return f"{section(hint).__name__}(...)" + (" or None" if type(None) in get_args(hint) else "")
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if element(hint):
        return f"a list of {element(hint).__name__}(...)"
    if get_origin(hint) is tuple:
        return f"{len(get_args(hint))} {get_args(hint)[0].__name__}s"
    names = {int: "an int", float: "a finite float", bool: "True or False", str: "a string", type(None): "None"}
    return names.get(hint) or " or ".join(describe(kind) for kind in get_args(hint))


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a field's type. An int passes for a float, but a bool for neither."""
    if hint in (int, float):
        kinds = (int,) if hint is int else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if element(hint):
        return isinstance(value, tuple) and all(isinstance(item, element(hint)) for item in value)
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(fits, value, kinds))
    return isinstance(value, hint) if isinstance(hint, type) else any(fits(value, kind) for kind in get_args(hint))


def tree(kind: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> type, of every field and section that a config of this kind can have."""
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        found[prefix + name] = hint
        if section(hint):
            found |= tree(section(hint), f"{prefix}{name}.")
    return found


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The name most like a mistyped one: first of those with the same last part (`lr` for `optim.lr`), then of all."""
    words = list(words)
    tail = word.rpartition(".")[2]
    same = [name for name in words if name.rpartition(".")[2] == tail]
    close = difflib.get_close_matches(word, same, 1, cutoff=0) or difflib.get_close_matches(word, words, 1)
    if not close:
        tails = {name.rpartition(".")[2]: name for name in words}
        close = [tails[like] for like in difflib.get_close_matches(tail, tails, 1)]
    return close[0] if close else None


def suggestion(word: str, words: Iterable[str], prefix: str = "") -> str:
    """`; did you mean X?` with the nearest name, for the end of an error; empty where none is near."""
    close = nearest(word, words)
    return f"; did you mean {prefix}{close}?" if close else ""
