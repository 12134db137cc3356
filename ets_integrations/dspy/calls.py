"""What a call of an ETSLM carries beside its request, because it cannot be written as JSON; it travels in a context."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

from ets_engine.protocols import Cancel, OnEvent, StepView
from ets_engine.scorers import Scorer
from ets_engine.types import SearchResult


class Caching(int):
    """DSPy's `cache` of one call; DSPy looks at it before the call, and again before it stores the answer.

    Example:
        >>> caching = Caching(True)
        >>> bool(caching), caching.stop(), bool(caching)
        (True, None, False)
    """

    _is_stopped = False

    def __bool__(self) -> bool:
        """Whether there is a cache, and the answer may go there."""
        return self != 0 and not self._is_stopped

    def stop(self) -> None:
        """Keep the answer of this call out of the cache."""
        self._is_stopped = True


@dataclass
class Call:
    """One call, for all the requests that DSPy makes of it (`n=3` makes three, one after the other).

    Attributes:
        rollout_id: DSPy's number of the sample, None = not given.
        cache: Whether DSPy takes the answer of an equal call for this one's, and this one's for the next.
        verifier: Judges this call's steps instead of the LM's verifier.
        verifier_name: Tells it from others, None = nothing does.
        view: How texts map to answers, None = what the messages say.
        on_event: Called with every depth's progress.
        cancel: Once set, the best so far is the result.
        status: Stream that progress is told to although the answer is not streamed.
        num_answered: Requests of this call that were answered (count).
    """

    rollout_id: int | None = None
    cache: Caching = field(default_factory=Caching)
    verifier: Scorer | None = None
    verifier_name: str | None = None
    view: StepView | None = None
    on_event: OnEvent | None = None
    cancel: Cancel | None = None
    status: Any = None
    num_answered: int = 0

    def count(self, result: SearchResult) -> None:
        """Say that a request was answered; what its deadline cut off is no answer for the next call."""
        self.num_answered += 1
        if result.finish_reason == "deadline":
            self.cache.stop()


_CALL: ContextVar[Call | None] = ContextVar("ets_dspy_call", default=None)


def current_call() -> Call:
    """The call that is being made in this context."""
    return _CALL.get() or Call()


@contextmanager
def calling(**parts: Any) -> Iterator[Call]:
    """Within this block the current call has these parts, besides those that it has already."""
    call = replace(current_call(), num_answered=0, **parts)
    token = _CALL.set(call)
    try:
        yield call
    finally:
        _CALL.reset(token)


@contextmanager
def between_calls() -> Iterator[None]:
    """Within this block there is no current call: a verifier that asks another LM asks for something else."""
    token = _CALL.set(None)
    try:
        yield
    finally:
        _CALL.reset(token)
