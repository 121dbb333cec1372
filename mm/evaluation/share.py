"""Shares of yes-or-no outcomes with their binomial standard error, as reports and cards show them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SKIN = "skin tone"  # in a caption: a variant that differs from its neighbours in one colour


@dataclass
class Share:
    """A share of `n` yes-or-no outcomes with its binomial standard error."""

    value: float
    error: float
    n: int

    @classmethod
    def of(cls, outcomes: Iterable[bool]) -> Share:
        right = [bool(outcome) for outcome in outcomes]
        value = sum(right) / len(right) if right else math.nan
        return cls(value, math.sqrt(value * (1 - value) / len(right)) if right else math.nan, len(right))


def without_skin(hits: Sequence[bool], captions: Sequence[str]) -> Share:
    """The share among those whose caption names no skin tone."""
    return Share.of(hit for hit, caption in zip(hits, captions, strict=True) if SKIN not in caption)
