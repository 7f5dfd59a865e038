"""What options must fulfil: an error at the first that do not, or a list of all of them."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

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
