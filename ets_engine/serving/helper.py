"""One helper process as its engine sees it: started, given jobs, listened to, ended; its jobs outlive it."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection

from ets_engine.errors import ConfigError, ModelLoadError
from ets_engine.protocols import OnEvent
from ets_engine.serving.job import Courier, Job
from ets_engine.serving.messages import Close, Done, Order, Ready, Stop, Take, Taken, Told
from ets_engine.types import EngineStats, SearchEvent

PROGRAM = "ets_engine.helper_process"
POLL_S = 0.02  # how often cancellation is looked at while there are jobs
IDLE_S = 1.0  # how often it is looked whether there are, if the first one's reception is not confirmed before
END_S = 30.0  # how long a process that has nothing left to do may take to end

_LOGGER = logging.getLogger(__name__)


@dataclass(eq=False)
class _Guest:
    """A job in the other process.

    Attributes:
        job: Of this process; its future is pending until its outcome is here.
        courier: Its callbacks' thread.
        is_stopped: Whether the other process was told to stop it.
        told: The last event that was passed on.
    """

    job: Job
    courier: Courier
    is_stopped: bool = False
    told: SearchEvent | None = None


class Helper:
    """A process with the same models as the engine's.

    Args:
        order: What it is to load.

    Raises:
        ConfigError: This system has no socket pairs that a child process can inherit.
    """

    def __init__(self, order: Order) -> None:
        """Start it; `wait_ready` says when it can take jobs."""
        if os.name != "posix":
            raise ConfigError(f"EngineConfig.processes needs a POSIX system, not {os.name!r}; leave it at 1")
        ours, theirs = socket.socketpair()
        with theirs:
            path = os.pathsep.join(one or os.getcwd() for one in sys.path)
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", PROGRAM, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": path},
            )
        self._connection = Connection(ours.detach())
        self._lock = threading.Lock()  # of what is sent, and of the guests
        self._guests: dict[int, _Guest] = {}
        self._is_alive = True
        self._is_closing = self._is_killed = False
        self._stats: EngineStats | None = None
        self._thread: threading.Thread | None = None
        self._send(order)

    def wait_ready(self, worker: object, readmit: Callable[[Job], None]) -> None:
        """Wait until its models are loaded.

        Args:
            worker: On whose behalf callbacks run; see `in_callback`.
            readmit: Takes the jobs of a process that died, from a thread of this helper's.

        Raises:
            ETSError: What the engine itself would raise while it loads such models.
            ModelLoadError: The process ended meanwhile.
        """
        try:
            ready = self._connection.recv()
        except (EOFError, OSError) as error:
            code = self._process.wait(END_S)
            raise ModelLoadError(f"a helper process ended with code {code} while it loaded its models") from error
        assert isinstance(ready, Ready)
        if ready.error is not None:
            raise ready.error
        self._worker, self._readmit = worker, readmit
        self._thread = threading.Thread(target=self._listen, name="ets-helper", daemon=True)
        self._thread.start()

    @property
    def num_jobs(self) -> int:
        """Jobs that it has (count)."""
        return len(self._guests)

    @property
    def is_alive(self) -> bool:
        """Whether it takes jobs."""
        return self._is_alive and not self._is_closing

    @property
    def stats(self) -> EngineStats | None:
        """What it had done when it last finished a job, and the jobs that it has now."""
        if self._stats is None:
            return None
        return self._stats.model_copy(update={"live": self.num_jobs, "waiting": 0})

    def put(self, job: Job, packed: bytes) -> bool:
        """Give it a job; False where the process is gone."""
        with self._lock:
            if not self.is_alive:
                return False
            self._guests[job.number] = _Guest(job, Courier(job, self._worker))
            try:
                self._send(Take(job.number, packed))
            except OSError:
                del self._guests[job.number]
                return False
        return True

    def close(self) -> None:
        """Have it end once its jobs are done."""
        with self._lock:
            self._is_closing = True
            with suppress(OSError):  # it has ended
                self._send(Close())

    def join(self) -> None:
        """Wait until it has ended."""
        if self._thread is not None:
            self._thread.join()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End it at once; its jobs end with an error."""
        self._is_closing = self._is_killed = True
        self._process.kill()
        self._process.wait()
        if self._thread is None:
            self._connection.close()

    # ------------------------------------------------------------------ this helper's thread

    def _send(self, message: object) -> None:
        self._connection.send(message)

    def _listen(self) -> None:
        try:
            while True:
                self._look_after_guests()
                if self._connection.poll(POLL_S if self._guests else IDLE_S):
                    self._hear(self._connection.recv())
        except (EOFError, OSError):
            pass
        except Exception:
            _LOGGER.exception("what a helper process said could not be read; it is ended")
            self._process.kill()
        self._part()

    def _look_after_guests(self) -> None:
        """Pass on who wants to stop."""
        with self._lock:
            for number, guest in list(self._guests.items()):
                job = guest.job
                if job.future.cancelled():
                    del self._guests[number]
                    job.future.set_running_or_notify_cancel()  # those who wait for it are told
                    guest.courier.finish(None)
                elif guest.is_stopped or not _wants_to_stop(job):
                    continue
                guest.is_stopped = True
                self._send(Stop(number))

    def _hear(self, message: object) -> None:
        match message:
            case Told(number, event):
                if (guest := self._guests.get(number)) is not None:
                    guest.courier.tell(event)
                    guest.told = event
            case Taken(number, is_taken=False):
                if (guest := self._forget(number)) is not None:
                    self._return(guest)
            case Done(number, outcome, stats):
                self._stats = stats
                if (guest := self._forget(number)) is not None:
                    self._deliver(guest, outcome)

    def _forget(self, number: int) -> _Guest | None:
        with self._lock:
            return self._guests.pop(number, None)

    def _deliver(self, guest: _Guest, outcome: object) -> None:
        """Complete a job's future."""
        if not guest.job.future.set_running_or_notify_cancel():
            outcome = None  # nobody waits for it
        elif not isinstance(outcome, Exception):
            try:
                outcome = outcome.to_result(guest.job)
            except Exception as error:
                outcome = error
        guest.courier.finish(outcome)

    def _return(self, guest: _Guest) -> None:
        """Have a job done in the engine's own process; its listener is not told again what it knows."""
        job = guest.job
        if guest.told is not None and job.on_event is not None:
            job = replace(job, on_event=_news(job.on_event, guest.told))

        def readmit() -> None:
            try:
                self._readmit(job)
            except Exception as error:
                if job.future.set_running_or_notify_cancel():
                    job.future.set_exception(error)

        guest.courier.end(readmit)

    def _part(self) -> None:
        """The process has ended."""
        with self._lock:
            self._is_alive = False
            left, self._guests = list(self._guests.values()), {}
        self._connection.close()
        code = self._process.wait()
        if not self._is_killed and (left or not self._is_closing):
            _LOGGER.warning(
                "a helper process ended with code %s; its %d searches go on in the engine's own", code, len(left)
            )
        for guest in left:
            self._return(guest)


def _wants_to_stop(job: Job) -> bool:
    """Whether its caller calls it off, or one of its callbacks failed."""
    try:
        return job.error is not None or (job.cancel is not None and job.cancel.is_set())
    except BaseException as error:
        job.error = error
        return True


def _news(on_event: OnEvent, known: SearchEvent) -> OnEvent:
    """The same listener, but for what it was told already by a search that began anew."""

    def tell(event: SearchEvent) -> None:
        if event.kind == "end" or (event.kind == "step" and (known.kind == "start" or event.depth > known.depth)):
            on_event(event)

    return tell
