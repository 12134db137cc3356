"""Messages between two processes of an engine: all arrive in order, and nobody who sends waits."""

from __future__ import annotations

import socket
import threading

import pytest

from ets_engine.errors import ConfigError, EngineError
from ets_engine.serving.channel import Channel
from ets_engine.serving.messages import portable


def pair() -> tuple[Channel, Channel]:
    ours, theirs = socket.socketpair()
    return Channel(ours.detach()), Channel(theirs.detach())


def test_putting_never_waits_and_all_arrives_in_order() -> None:
    ours, theirs = pair()
    sent = [(i, bytes(1000)) for i in range(20_000)]  # far more than a socket holds
    for message in sent:
        ours.put(message)
    assert [theirs.get() for _ in sent] == sent
    ours.close()
    with pytest.raises(EOFError):
        theirs.get()
    theirs.close()


def test_closing_sends_what_there_is() -> None:
    ours, theirs = pair()
    for i in range(2000):
        ours.put(bytes(i))
    closing = threading.Thread(target=ours.close)
    closing.start()
    assert [theirs.get() for _ in range(2000)] == [bytes(i) for i in range(2000)]
    closing.join(timeout=10)
    assert not closing.is_alive()
    theirs.close()


def test_nobody_waits_for_an_end_that_is_gone() -> None:
    ours, theirs = pair()
    theirs.close()
    for _ in range(10):
        ours.put(bytes(1_000_000))
    ours.close()


def test_what_cannot_be_pickled_is_refused_at_once() -> None:
    ours, theirs = pair()
    with pytest.raises(AttributeError, match="lambda"):
        ours.put(lambda: None)
    ours.put(1)
    assert theirs.get() == 1
    ours.close()
    theirs.close()


class Local(Exception):
    """One whose pickle cannot be read: it takes two arguments and gives one."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one)


def test_an_error_travels_or_what_it_says_does() -> None:
    error = ConfigError("width=0")
    assert portable(error) is error
    for other in (Local("a", "b"), KeyboardInterrupt("a"), type("Nameless", (Exception,), {})("a")):
        found = portable(other)
        assert type(found) is EngineError and type(other).__name__ in str(found) and str(found).endswith(": a")
