"""Model calls that are a part of some turn, a draft or its mark: in traces below it, hidden from who reads the turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import Context, copy_context
from typing import Any

from langchain_core.callbacks import BaseRunManager, CallbackManager
from langchain_core.runnables import (
    Runnable,
    RunnableBinding,
    RunnableConfig,
    RunnableSequence,
    RunnableWithFallbacks,
    ensure_config,
)
from langchain_core.runnables.config import patch_config, set_config_context


class SearchLimit(int):
    """A `max_concurrency` that says how many searches go at a time, and nothing of the calls within one."""


INNER = RunnableConfig(tags=["nostream"])
"""LangGraph's `stream_mode="messages"` leaves such calls out; traces and `astream_events` have them."""


def inner_batch(runnable: Runnable[Any, Any], calls: int) -> RunnableConfig:
    """How so many inner calls are made: all at once, or as many as the runnable or the surrounding run allows.

    Without it LangChain makes a few more calls at a time than there are processors, however few those are.

    Args:
        runnable: Is to be called; `with_config(max_concurrency=8)` limits it, or any part of it.
        calls: Of it (count).

    Example:
        >>> from langchain_core.runnables import RunnableLambda
        >>> double = RunnableLambda(lambda number: 2 * number)
        >>> [inner_batch(one, 64)["max_concurrency"] for one in (double, double.with_config(max_concurrency=8))]
        [64, 8]
    """
    around = ensure_config().get("max_concurrency")
    limits = [calls, *_limits(runnable)] + ([around] if around and not isinstance(around, SearchLimit) else [])
    return {**INNER, "max_concurrency": min(limits)}


def _limits(runnable: Runnable[Any, Any]) -> Iterator[int]:
    """Every `max_concurrency` that was given to a runnable or a part of it."""
    parts: Sequence[Runnable[Any, Any]] = ()
    if isinstance(runnable, RunnableBinding):
        parts = [runnable.bound]
        if most := runnable.config.get("max_concurrency"):
            yield most
    elif isinstance(runnable, RunnableSequence):
        parts = runnable.steps
    elif isinstance(runnable, RunnableWithFallbacks):
        parts = [runnable.runnable, *runnable.fallbacks]
    for part in parts:
        yield from _limits(part)


@contextmanager
def within(run_manager: BaseRunManager | None) -> Iterator[Context]:
    """A context in which model calls belong to this run: they are below it in traces, and counted with it."""
    if run_manager is None:
        yield copy_context()
        return
    handlers = list(run_manager.inheritable_handlers)
    manager = CallbackManager(
        handlers=handlers,
        inheritable_handlers=handlers,
        parent_run_id=run_manager.run_id,
        inheritable_tags=list(run_manager.inheritable_tags),
        inheritable_metadata=dict(run_manager.inheritable_metadata),
    )
    with set_config_context(patch_config(ensure_config(), callbacks=manager)) as context:
        yield context
