"""How long the search that asks may still go on: known wherever its context variables go; it stops nothing itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Remaining = Callable[[], float]
"""Seconds that are left, whenever it is asked."""

_REMAINING_S: ContextVar[Remaining] = ContextVar("ets_remaining_s", default=lambda: math.inf)


def remaining_s() -> float:
    """Seconds that the search which asks may still take: infinite without a deadline, 0 once it is to end.

    Proposers and verifiers that wait for something may ask, in the thread of a `HostedEngine`'s search and wherever its
    context variables go, another search too; anywhere else it is infinite.

    Example:
        >>> remaining_s()
        inf
    """
    return _REMAINING_S.get()()


@contextmanager
def limited(remaining: Remaining) -> Iterator[Remaining]:
    """What is asked within it has so long, and no longer than what is around it; gives what is around it.

    Example:
        >>> with limited(lambda: 5.0) as around:
        ...     remaining_s(), around()
        (5.0, inf)
    """
    around = _REMAINING_S.get()
    token = _REMAINING_S.set(lambda: min(around(), remaining()))
    try:
        yield around
    finally:
        _REMAINING_S.reset(token)


@contextmanager
def outside(around: Remaining) -> Iterator[None]:
    """What is asked within it has as long as what is around a search, which `limited` gave."""
    token = _REMAINING_S.set(around)
    try:
        yield
    finally:
        _REMAINING_S.reset(token)
