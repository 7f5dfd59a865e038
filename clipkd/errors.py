"""Errors and early ends: checks of options, messages of one line, runs that stop, signals that wait for the current step."""

import contextlib
import os
import signal
import textwrap
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


def require_least(options: object, prefix: str = "", **least: float) -> None:
    """`require` of each named option that it is so much or more, or None."""
    for name, bound in least.items():
        value = getattr(options, name)
        require(value is None or value >= bound, f"{prefix}{name} is {value}; it must be {bound} or more")


@contextlib.contextmanager
def collecting() -> Iterator[list[str]]:
    """Collect the messages of all failed `require` calls within, instead of raising at the first."""
    problems: list[str] = []
    token = COLLECTED.set(problems)
    try:
        yield problems
    finally:
        COLLECTED.reset(token)


def one_line(error: BaseException) -> str:
    """An error's message in one line; of a loader process's error, whose message is a traceback, only its last line."""
    message = str(error).strip()
    if "Original Traceback" in message:
        message = message.splitlines()[-1].split(": ", 1)[-1]
    return " ".join(message.split())


def short(error: BaseException) -> str:
    """`one_line` of another library's error, cut between words."""
    return textwrap.shorten(one_line(error), 400, placeholder=" …")


PATIENCE = 3.0
"""Seconds within which a repeated signal counts as the same one: launchers pass on what the terminal already sent."""


class RunStopped(Exception):
    """The run cannot continue, whatever its configuration: exit status 1. Saved checkpoints stay."""


class Interrupted(BaseException):
    """A signal ended the run, usually after a save: exit status 128 + its number (130 for Ctrl-C, 143 for SIGTERM)."""

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(message or signal.Signals(number).name)
        self.number = number


END_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
"""Ctrl-C, a scheduler or launcher, a closed terminal, Slurm's --signal=USR1."""

IS_LAUNCHED = "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_DYNAMO_MODE" in os.environ
"""Whether torchrun or accelerate launch started this process, so that its parent's end is the end of the job."""
PARENT = os.getppid()


class Interruption:
    """The first signal that asked for an end; `number` is 0 until then."""

    def __init__(self) -> None:
        self.number, self.since, self.immediate = 0, 0.0, False

    def handle(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self.immediate:
            name = signal.Signals(number).name
            raise Interrupted(number, f"{name} during an evaluation; continue with --resume latest")
        if self.number and now - self.since > PATIENCE:
            raise Interrupted(number)
        if not self.number:
            self.number, self.since = number, now

    def asked(self) -> int:
        """Number of the signal; SIGHUP if the launcher is gone, which may end without passing a signal on."""
        orphaned = IS_LAUNCHED and os.getppid() != PARENT
        return self.number or (signal.SIGHUP if orphaned else 0)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Let a signal raise where it arrives, for work that a resumed run repeats."""
        self.immediate = True
        try:
            yield
        finally:
            self.immediate = False


def handled_signals() -> list[int]:
    """END_SIGNALS; without SIGHUP under nohup, which tells a process to ignore it (a launcher kills after it)."""
    ignored = {number for number in END_SIGNALS if signal.getsignal(number) == signal.SIG_IGN}
    return [number for number in END_SIGNALS if IS_LAUNCHED or number == signal.SIGINT or number not in ignored]


@contextlib.contextmanager
def deferred_signals() -> Iterator[Interruption]:
    """Defer END_SIGNALS to the end of the current step; repeated after PATIENCE they end it at once."""
    interruption = Interruption()
    before = {number: signal.signal(number, interruption.handle) for number in handled_signals()}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_signals_to_parent(_: int = 0) -> None:
    """Ignore END_SIGNALS in a loader process: they reach it too, but its parent must first finish its step."""
    for number in END_SIGNALS:
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which the programs behind pipes would inherit


def raise_at_signals() -> None:
    """Raise Interrupted at END_SIGNALS, so that a command removes its unfinished files."""

    def stop(number: int, _: FrameType | None) -> None:
        raise Interrupted(number)

    for number in handled_signals():
        if number != signal.SIGINT:  # Python's KeyboardInterrupt
            signal.signal(number, stop)
