"""Lets equal requests that are in flight share one search; it knows neither DSPy nor what makes requests equal."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress

from ets_engine.protocols import Cancel, OnEvent
from ets_engine.types import SearchEvent, SearchResult

Start = Callable[[OnEvent, Cancel], "Future[SearchResult]"]
"""Starts a search that tells its progress and can be stopped."""


class Flight:
    """One search and those who wait for it; it is stopped when the last of them leaves."""

    def __init__(self, cancel: Cancel | None) -> None:
        """See the class."""
        self.future: Future[SearchResult]
        self.listeners: list[OnEvent] = []
        self.num_waiting = 0
        self._cancel = cancel
        self._is_left = False

    def is_set(self) -> bool:
        """Whether the search is to stop (`Cancel`)."""
        return self._is_left or (self._cancel is not None and self._cancel.is_set())

    def tell(self, event: SearchEvent) -> None:
        """Pass an event on; a listener whose event loop is closed has left."""
        for listener in tuple(self.listeners):
            with suppress(RuntimeError):
                listener(event)

    def abandon(self) -> None:
        """Stop the search: nobody waits any more."""
        self._is_left = True
        self.future.cancel()  # where it was not let in yet


class Ticket:
    """One caller's share in a flight."""

    def __init__(self, flights: Flights, key: str | None, flight: Flight, on_event: OnEvent | None) -> None:
        """See the class."""
        self._flights = flights
        self._key = key
        self._flight = flight
        self._on_event = on_event
        self.future = flight.future

    def leave(self) -> None:
        """Say that this caller waits no more, with or without the result."""
        self._flights._leave(self._key, self._flight, self._on_event)


class Flights:
    """The searches under way, by what was asked.

    Example:
        >>> started = []
        >>> def start(on_event, cancel):
        ...     started.append(cancel)
        ...     return Future()
        >>> flights = Flights()
        >>> first, second, other = (flights.join(key, start) for key in ("a", "a", None))
        >>> first.future is second.future, len(started)
        (True, 2)
        >>> first.leave(), started[0].is_set(), second.leave(), started[0].is_set()
        (None, False, None, True)
    """

    def __init__(self) -> None:
        """See the class."""
        self._flights: dict[str, Flight] = {}
        self._lock = threading.Lock()

    def join(
        self, key: str | None, start: Start, *, on_event: OnEvent | None = None, cancel: Cancel | None = None
    ) -> Ticket:
        """Take part in the flight of this key, or start one.

        Args:
            key: What was asked; None = share with nobody.
            start: Called, at most once, to start the search; what it raises is raised here.
            on_event: Told this search's progress from now on.
            cancel: Stops the search for all of its callers; the first caller's counts.
        """
        with self._lock:
            flight = self._flights.get(key) if key is not None else None
            if flight is None or flight.future.done() or flight.is_set():
                flight = Flight(cancel)
                if on_event is not None:
                    flight.listeners.append(on_event)
                flight.future = start(flight.tell, flight)
                if key is not None:
                    self._flights[key] = flight
            elif on_event is not None:
                flight.listeners.append(on_event)
            flight.num_waiting += 1
            return Ticket(self, key, flight, on_event)

    def _leave(self, key: str | None, flight: Flight, on_event: OnEvent | None) -> None:
        with self._lock:
            flight.num_waiting -= 1
            if on_event is not None:
                flight.listeners.remove(on_event)
            if flight.num_waiting:
                return
            if key is not None and self._flights.get(key) is flight:
                del self._flights[key]
        flight.abandon()
