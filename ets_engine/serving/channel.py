"""One end of a socket between two processes of an engine; nobody who sends ever waits for the other end."""

from __future__ import annotations

import pickle
import threading
from multiprocessing.connection import Connection
from queue import SimpleQueue

FLUSH_S = 30.0  # how long closing waits for the other end to read what there is


class Channel:
    """Messages to and from another process, pickled.

    Two processes that both wait until the other reads would wait for ever. So a thread of its own sends, and whoever
    puts a message goes on at once, from a finalizer or a signal handler too.

    Args:
        handle: File descriptor of the socket, owned from now on.

    Example:
        >>> import socket
        >>> ours, theirs = (Channel(one.detach()) for one in socket.socketpair())
        >>> ours.put(["a", 1])
        >>> theirs.poll(1.0), theirs.get()
        (True, ['a', 1])
        >>> ours.close(), theirs.close()
        (None, None)
    """

    def __init__(self, handle: int) -> None:
        """See the class."""
        self._connection = Connection(handle)
        self._outbox: SimpleQueue[bytes | None] = SimpleQueue()
        self._writer = threading.Thread(target=self._write, name="ets-writer", daemon=True)
        self._writer.start()

    def put(self, message: object) -> None:
        """Send a message, or forget it where nobody reads any more.

        Raises:
            Exception: It cannot be pickled.
        """
        self._outbox.put(pickle.dumps(message))

    def poll(self, timeout_s: float) -> bool:
        """Whether there is a message, or the other end is closed; waits for it so long."""
        return self._connection.poll(timeout_s)

    def get(self) -> object:
        """The next message; waits for it.

        Raises:
            EOFError: The other end is closed.
            OSError: It was closed with messages of ours unread.
        """
        return self._connection.recv()

    def close(self) -> None:
        """Send what there is, as long as anybody reads it, and close this end."""
        self._outbox.put(None)
        self._writer.join(FLUSH_S)  # who keeps the other end open need not read it
        self._connection.close()

    def _write(self) -> None:
        while (packed := self._outbox.get()) is not None:
            try:
                self._connection.send_bytes(packed)
            except OSError:
                return  # who reads here finds the end of it
