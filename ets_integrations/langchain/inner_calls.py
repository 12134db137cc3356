"""Model calls that are a part of some turn, a draft or its mark: in traces below it, hidden from who reads the turn."""

from __future__ import annotations

import asyncio
import inspect
from asyncio import AbstractEventLoop
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from contextlib import contextmanager
from contextvars import Context, copy_context
from functools import partial
from typing import Any

from langchain_core.callbacks import AsyncCallbackHandler, BaseRunManager, CallbackManager
from langchain_core.runnables import (
    Runnable,
    RunnableConfig,
    RunnableSequence,
    RunnableWithFallbacks,
    ensure_config,
)
from langchain_core.runnables.base import RunnableBindingBase
from langchain_core.runnables.config import patch_config, set_config_context
from langchain_core.runnables.configurable import DynamicRunnable

from ets_engine.deadline import remaining_s


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
    if isinstance(runnable, RunnableBindingBase | DynamicRunnable):
        parts = [runnable.bound if isinstance(runnable, RunnableBindingBase) else runnable.default]
        if most := (runnable.config or {}).get("max_concurrency"):
            yield most
    elif isinstance(runnable, RunnableSequence):
        parts = runnable.steps
    elif isinstance(runnable, RunnableWithFallbacks):
        parts = [runnable.runnable, *runnable.fallbacks]
    for part in parts:
        yield from _limits(part)


@contextmanager
def within(
    run_manager: BaseRunManager | None, *, config: RunnableConfig | None = None, loop: AbstractEventLoop | None = None
) -> Iterator[Context]:
    """A context in which model calls belong to this run: they are below it in traces, and counted with it.

    Args:
        run_manager: Of the run, None = there is none.
        config: Of the run, None = what surrounds it.
        loop: Where its async handlers live, None = nowhere.
    """
    if run_manager is None:
        yield copy_context()
        return
    handlers: list[Any] = list(run_manager.inheritable_handlers)
    if loop is not None:
        handlers = [_OfLoop(one, loop) if _is_bound(one) else one for one in handlers]
    manager = CallbackManager(
        handlers=handlers,
        inheritable_handlers=handlers,
        parent_run_id=run_manager.run_id,
        inheritable_tags=list(run_manager.inheritable_tags),
        inheritable_metadata=dict(run_manager.inheritable_metadata),
    )
    with set_config_context(patch_config(ensure_config(config), callbacks=manager)) as context:
        yield context


def _is_bound(handler: object) -> bool:
    """Whether a handler's methods want its own event loop; `astream_events` has one that takes any."""
    return isinstance(handler, AsyncCallbackHandler) and not hasattr(handler, "tap_output_aiter")


class _OfLoop:
    """An async handler for calls in other threads, which wait for it as long as their search goes on."""

    def __init__(self, handler: AsyncCallbackHandler, loop: AbstractEventLoop) -> None:
        self._handler = handler
        self._loop = loop

    def __eq__(self, other: object) -> bool:
        return self._handler is (other._handler if isinstance(other, _OfLoop) else other)

    def __hash__(self) -> int:
        return id(self._handler)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._handler, name)
        return partial(self._call, found) if inspect.iscoroutinefunction(found) else found

    def _call(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        told = method(*args, **kwargs)
        try:
            future = asyncio.run_coroutine_threadsafe(told, self._loop)
        except RuntimeError:  # the loop was closed: nobody listens any more
            told.close()
            return None
        while remaining_s() > 0 and not self._loop.is_closed():
            if wait([future], timeout=0.1).done:
                return future.result()
        return None
