"""Stopping on request: a signal sets a flag, the loop finishes its step and saves."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator

TWICE = 2.0  # seconds: a terminal and torchrun both pass Ctrl-C on, which is one wish


class Interrupted(BaseException):
    """A signal came where waiting for the end of the step would take long; what was going on is dropped.

    As KeyboardInterrupt, no Exception: a decoder would take that for a bad picture.
    """


class Stop:
    """True once SIGINT, SIGTERM or SIGUSR1 has come; another SIGINT, seconds later, interrupts at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._since = 0.0
        self._waiting = False

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

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Inside, where data are waited for or a model is evaluated, a signal raises Interrupted at once."""
        if self:
            raise Interrupted
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False

    def _set(self, number: int, _frame: object) -> None:
        if self.signal == signal.SIGINT and number == signal.SIGINT and time.monotonic() - self._since > TWICE:
            raise KeyboardInterrupt
        if self.signal is None:
            self.signal, self._since = number, time.monotonic()
        if self._waiting:
            self._waiting = False
            raise Interrupted
