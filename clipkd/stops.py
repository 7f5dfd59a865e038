"""How a run ends before its last step: by itself, or by a signal, after the step at hand is saved."""

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType

PATIENCE = 3.0
"""Seconds within which a repeated signal is the same one: launchers pass on what the terminal sent already."""


class RunStopped(Exception):
    """The run cannot go on, whatever its configuration: exit status 1. What is saved stays."""


class Interrupted(BaseException):
    """A signal ended the run, as a rule after it was saved: exit status 128 + its number (130 for Ctrl-C, 143 for SIGTERM)."""

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(message or f"{signal.Signals(number).name}")
        self.number = number


class Interruption:
    """Whether SIGINT or SIGTERM has asked for an end; `number` is 0 until then."""

    number = 0
    immediate = False
    """Whether a signal ends the run where it is: while nothing would be lost."""

    def __init__(self) -> None:
        self.since = 0.0

    def handle(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self.immediate:
            raise Interrupted(number, f"{signal.Signals(number).name} during an evaluation; go on with --resume latest")
        if self.number and now - self.since > PATIENCE:
            raise Interrupted(number)
        if not self.number:
            self.number, self.since = number, now


@contextlib.contextmanager
def deferred_signals() -> Iterator[Interruption]:
    """Within it SIGINT and SIGTERM wait for the step at hand; sent again after some seconds they end it at once."""
    interruption = Interruption()
    before = {number: signal.signal(number, interruption.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
