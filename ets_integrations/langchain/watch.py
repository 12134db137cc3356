"""A submitted search as its caller sees it: events while it runs, the result at the end, stopped when nobody waits."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import Future
from contextlib import suppress

from ets_engine.types import SearchEvent, SearchResult

Submit = Callable[[Callable[[SearchEvent], None], threading.Event], "Future[SearchResult]"]
"""`submit(on_event, cancel)`: starts a search that tells its events and can be stopped."""


def watch(submit: Submit) -> Generator[SearchEvent | SearchResult, None, None]:
    """The events of a search in this thread, then its result; closing the iterator stops the search.

    Raises:
        ETSError: The search failed, or was not let in.
    """
    events: queue.SimpleQueue[SearchEvent | None] = queue.SimpleQueue()
    cancel = threading.Event()
    future = submit(events.put, cancel)
    future.add_done_callback(lambda _: events.put(None))
    try:
        while (event := events.get()) is not None:
            yield event
        yield future.result()
    finally:
        _stop(future, cancel)


async def awatch(submit: Submit) -> AsyncGenerator[SearchEvent | SearchResult, None]:
    """`watch` for an event loop, which is never blocked; a cancelled task stops its search.

    Raises:
        ETSError: The search failed, or was not let in.
    """
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[SearchEvent | None] = asyncio.Queue()
    cancel = threading.Event()

    def put(event: SearchEvent | None) -> None:
        with suppress(RuntimeError):  # the loop was closed: nobody waits any more
            loop.call_soon_threadsafe(events.put_nowait, event)

    future = submit(put, cancel)
    future.add_done_callback(lambda _: put(None))
    try:
        while (event := await events.get()) is not None:
            yield event
        yield future.result()
    finally:
        _stop(future, cancel)


def _stop(future: Future[SearchResult], cancel: threading.Event) -> None:
    cancel.set()
    future.cancel()
