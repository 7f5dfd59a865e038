"""Errors and early ends: checked options, all problems at once, a run that stops, signals that wait for the step at hand."""

import contextlib
import signal
import time
from collections.abc import Iterator
from contextvars import ContextVar
from types import FrameType

COLLECTED: ContextVar[list[str] | None] = ContextVar("COLLECTED", default=None)


def require(condition: bool, message: str) -> None:
    """Raises: ValueError with the message unless the condition holds; within `collecting` it is only noted."""
    if not condition:
        problems = COLLECTED.get()
        if problems is None:
            raise ValueError(message)
        problems.append(message)


@contextlib.contextmanager
def collecting() -> Iterator[list[str]]:
    """All that is wrong with options built within, instead of an error at the first."""
    problems: list[str] = []
    token = COLLECTED.set(problems)
    try:
        yield problems
    finally:
        COLLECTED.reset(token)


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
