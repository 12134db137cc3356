"""Progress of a search through every way in which LangChain and LangGraph listen."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from langchain_core.callbacks import BaseRunManager, adispatch_custom_event, dispatch_custom_event
from langchain_core.callbacks.manager import ahandle_event, handle_event

from ets_engine.types import SearchEvent

_HOOK = "on_custom_event", "ignore_custom_event"  # what handlers implement, and how they say that they do not
SECONDS_APART = 0.1  # of two "ets.step" events that are passed on

Named = tuple[str, dict[str, Any]]
"""Name of an event, and its data as plain JSON."""


class Progress:
    """Picks what is passed on of one search's events: starts, ends and new leaves all, steps now and then."""

    def __init__(self) -> None:
        """See the class."""
        self._told_s = -SECONDS_APART
        self._finished = 0

    def pick(self, event: SearchEvent) -> Iterator[Named]:
        """Events to pass on now."""
        data = event.model_dump(exclude={"kind"})
        if event.finished > self._finished:
            self._finished = event.finished
            yield "ets.leaf", data
        now_s = time.monotonic()
        if event.kind != "step" or now_s - self._told_s >= SECONDS_APART:
            self._told_s = now_s
            yield f"ets.{event.kind}", data


def emit(run_manager: BaseRunManager | None, name: str, data: dict[str, Any]) -> None:
    """Tell callbacks, `astream_events` and LangGraph's stream writer; silently where none of them listens.

    Args:
        run_manager: Of the model's own run; without one the surrounding run is told.
        name: "ets.start", "ets.step", "ets.leaf" or "ets.end".
        data: Plain JSON.
    """
    if run_manager is not None:
        handle_event(run_manager.handlers, *_HOOK, name, data, **_address(run_manager))
    else:
        with suppress(RuntimeError):  # no run around this call
            dispatch_custom_event(name, data)
    _write_to_graph(name, data)


async def aemit(run_manager: BaseRunManager | None, name: str, data: dict[str, Any]) -> None:
    """`emit` for an event loop."""
    if run_manager is not None:
        await ahandle_event(run_manager.handlers, *_HOOK, name, data, **_address(run_manager))
    else:
        with suppress(RuntimeError):
            await adispatch_custom_event(name, data)
    _write_to_graph(name, data)


def _address(run_manager: BaseRunManager) -> dict[str, Any]:
    return {"run_id": run_manager.run_id, "tags": run_manager.tags, "metadata": run_manager.metadata}


def _write_to_graph(name: str, data: dict[str, Any]) -> None:
    """LangGraph's `stream_mode="custom"` does not see dispatched events, it has a writer of its own."""
    if "langgraph" not in sys.modules:
        return
    try:
        from langgraph.config import get_stream_writer

        writer = get_stream_writer()
    except Exception:  # outside a graph it raises what its version likes
        return
    writer({"type": name, **data})
