"""The table of loss terms: the class of a term's options → the function that computes it."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from torch import nn

from clipkd.config.terms import Term
from clipkd.objective.comparison import Comparison, Rows

R = TypeVar("R", bound=Callable[[Any, Comparison], Rows])


class Entry(NamedTuple):
    rows: Callable[[Any, Comparison], Rows]
    """Options and batch → the term's value and series for each query. Their mean over directions, queries and processes
    is the term of the global batch."""
    modules: Callable[[int, int], dict[str, nn.Module]]
    """Widths of student and teacher → what the term trains beside the student."""


TERMS: dict[type[Term], Entry] = {}


def term(
    options: type[Term], *, modules: Callable[[int, int], dict[str, nn.Module]] = lambda student, teacher: {}
) -> Callable[[R], R]:
    """Register the decorated function as the term with these options."""

    def register(rows: R) -> R:
        TERMS[options] = Entry(rows, modules)
        return rows

    return register
