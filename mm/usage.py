"""How every command reads its arguments: errors of one line, with the nearest flag for an unknown one."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from mm.fields import suggestion

RUN = "run folder, released folder or open_clip:NAME/TAG"


class UsageError(ValueError):
    """A command line that cannot be meant."""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are a UsageError of one line, with the nearest flag for an unknown one."""

    def __init__(self, command: str, description: str, **options: Any):
        super().__init__(prog=f"mm {command}", description=description, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}; see {self.prog} --help")

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """The arguments, flags and positionals in any order. Raises UsageError."""
        known = [flag for action in self._actions for flag in action.option_strings]
        flags = argv[: argv.index("--")] if "--" in argv else argv
        for word in flags:
            flag = word.partition("=")[0]
            if flag.startswith("--") and flag not in known:
                raise UsageError(f"{self.prog}: unknown flag {flag}{suggestion(flag, known)}")
        return self.parse_intermixed_args(list(argv))


def number(kind: type[int] | type[float], low: float, above: bool = False) -> Callable[[str], float]:
    """An argparse type: an int or float that is at least (or above) `low`."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not (value > low if above else value >= low) or value == float("inf"):
            bound = f"{'above' if above else 'at least'} {low}"
            raise argparse.ArgumentTypeError(f"{text}: must be {'an int' if kind is int else 'a number'} {bound}")
        return value

    return read
