"""Stopping on request: a signal sets a flag, the loop finishes its step and saves."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


class Stop:
    """True once SIGINT, SIGTERM or SIGUSR1 has come; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    @contextlib.contextmanager
    def listening(self) -> Iterator[Stop]:
        """Handle the signals inside, and put the former handlers back."""
        wanted = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        former = {number: signal.signal(number, self._set) for number in wanted}
        try:
            yield self
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def _set(self, number: int, _frame: object) -> None:
        if self.signal == signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
