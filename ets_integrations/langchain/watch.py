"""A submitted search as its caller sees it: events while it runs, the result at the end, stopped when nobody waits.

Its progress is told on the way, to whoever listens to the caller's run (`events.emit`).
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import Future
from contextlib import aclosing, closing, suppress

from langchain_core.callbacks import BaseRunManager

from ets_engine.types import SearchEvent, SearchResult
from ets_integrations.langchain.events import Progress, aemit, emit
from ets_integrations.langchain.inner_calls import within

Submit = Callable[[Callable[[SearchEvent], None], threading.Event], "Future[SearchResult]"]
"""`submit(on_event, cancel)`: starts a search that tells its events and can be stopped."""


def watch(submit: Submit, run_manager: BaseRunManager | None) -> Generator[SearchEvent | SearchResult, None, None]:
    """The events of a search in this thread, then its result; closing the iterator stops the search.

    Raises:
        ETSError: The search failed, or was not let in.
    """
    events: queue.SimpleQueue[SearchEvent | None] = queue.SimpleQueue()
    progress = Progress()
    cancel = threading.Event()
    with within(run_manager) as context:
        future = context.run(submit, events.put, cancel)
    future.add_done_callback(lambda _: events.put(None))
    try:
        while (event := events.get()) is not None:
            for name, data in progress.pick(event):
                emit(run_manager, name, data)
            yield event
        yield future.result()
    finally:
        _stop(future, cancel)


async def awatch(
    submit: Submit, run_manager: BaseRunManager | None
) -> AsyncGenerator[SearchEvent | SearchResult, None]:
    """`watch` for an event loop, which is never blocked; a cancelled task stops its search.

    Raises:
        ETSError: The search failed, or was not let in.
    """
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[SearchEvent | None] = asyncio.Queue()
    progress = Progress()
    cancel = threading.Event()

    def put(event: SearchEvent | None) -> None:
        with suppress(RuntimeError):  # the loop was closed: nobody waits any more
            loop.call_soon_threadsafe(events.put_nowait, event)

    with within(run_manager, loop=loop) as context:
        future = context.run(submit, put, cancel)
    future.add_done_callback(lambda _: put(None))
    try:
        while (event := await events.get()) is not None:
            for name, data in progress.pick(event):
                await aemit(run_manager, name, data)
            yield event
        yield future.result()
    finally:
        _stop(future, cancel)


def wait(submit: Submit, run_manager: BaseRunManager | None) -> SearchResult:
    """The result of a search; an exception in this thread stops it.

    Raises:
        ETSError: As `watch`.
    """
    with closing(watch(submit, run_manager)) as items:
        for item in items:
            if isinstance(item, SearchResult):
                return item
    raise AssertionError("a search ends with a result")


async def await_result(submit: Submit, run_manager: BaseRunManager | None) -> SearchResult:
    """`wait` for an event loop; a cancelled task stops its search."""
    async with aclosing(awatch(submit, run_manager)) as items:
        async for item in items:
            if isinstance(item, SearchResult):
                return item
    raise AssertionError("a search ends with a result")


def _stop(future: Future[SearchResult], cancel: threading.Event) -> None:
    cancel.set()
    future.cancel()
