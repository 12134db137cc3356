"""The thread that owns the models: takes jobs from any thread and ticks the scheduler while there is work."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import weakref
from collections import deque

from ets_engine.errors import EngineClosedError, EngineError, QueueFullError
from ets_engine.runtime.threads import use_threads
from ets_engine.serving.job import Job, complete
from ets_engine.serving.scheduler import Finish, Models, Scheduler
from ets_engine.types import EngineStats

IDLE_S = 0.02  # how often cancellation and deadlines are looked at while only callers' verifiers are at work

STOP_S = 30.0  # how long the end of the process waits for a forward pass that is under way

_LOGGER = logging.getLogger(__name__)

_started: weakref.WeakSet[Worker] = weakref.WeakSet()


class Worker:
    """A scheduler in a thread of its own, which starts with the first job.

    Args:
        models: What searches run on; only this thread uses them from now on.
        finish: Measures a finished job, in this thread; see `Finish`.
        max_queued: Most jobs that wait for room.
        num_threads: Of torch, for its passes (count); None = as many as everywhere.
    """

    def __init__(self, models: Models, finish: Finish, max_queued: int, num_threads: int | None = None) -> None:
        """See the class."""
        self._scheduler: Scheduler | None = Scheduler(models, finish, self._wake, worker=self)
        self._max_queued = max_queued
        self._num_threads = num_threads
        self._changed = threading.Condition()
        self._inbox: deque[Job] = deque()
        self._num_waiting = 0  # jobs that the scheduler has not let in
        self._is_woken = False
        self._is_closing = False
        self._is_stopping = False
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()

    def submit(self, job: Job) -> None:
        """Queue a job.

        Raises:
            EngineClosedError: The engine was closed, or this process is a fork of its own.
            QueueFullError: Too many jobs wait.
        """
        self.check_open()
        with self._changed:  # a lock that may be held for ever in a fork
            self.check_open()
            if len(self._inbox) + self._num_waiting >= self._max_queued:
                raise QueueFullError(
                    f"{self._max_queued} searches wait already (EngineConfig.max_queued_searches); try again later"
                )
            self._take(job)

    def readmit(self, job: Job) -> None:
        """Queue a job that was accepted before, however many wait; whoever calls this has not called `close` yet.

        Raises:
            EngineClosedError: The process is about to go.
        """
        with self._changed:
            if self._is_stopping:
                raise EngineClosedError("the process ended while this search ran")
            self._take(job)

    def _take(self, job: Job) -> None:
        if self._thread is None:
            thread = threading.Thread(target=self._work, name="ets-engine", daemon=True)
            thread.start()  # it waits for this lock
            self._thread = thread
            _started.add(self)
        self._inbox.append(job)
        self._changed.notify()

    def check_open(self, *, is_closing: bool = False) -> None:
        """Refuse to go on where no job is taken.

        Args:
            is_closing: Whether its owner takes none any more, whatever it does itself.

        Raises:
            EngineClosedError: As `submit`.
        """
        if os.getpid() != self._pid:
            raise EngineClosedError(
                "this process was forked from the one that the engine lives in, and its thread stayed there; make "
                "another engine here, or start processes by 'spawn'"
            )
        if is_closing or self._is_closing:
            raise EngineClosedError("this engine was closed; make another with ETSEngine.from_pretrained")

    @property
    def num_jobs(self) -> int:
        """Jobs that have not ended (count); from another thread, a picture that may be a moment old."""
        scheduler = self._scheduler
        return len(self._inbox) + (scheduler.num_jobs if scheduler else 0)

    def stop(self) -> None:
        """End every job with an error, and wait for the thread: the process is about to go."""
        with self._changed:
            self._is_closing = self._is_stopping = True
            self._changed.notify()
        if self._thread is not None and os.getpid() == self._pid:
            self._thread.join(STOP_S)

    def close(self, *, wait: bool = True) -> None:
        """Take no more jobs, finish those there are, and give the models' memory back."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        if self._thread is None or os.getpid() != self._pid:
            self._scheduler = None
        elif wait:
            self._thread.join()

    def stats(self) -> EngineStats:
        """What was done so far.

        Raises:
            EngineClosedError: The models are gone.
        """
        scheduler = self._scheduler
        if scheduler is None:
            raise EngineClosedError("this engine was closed; make another with ETSEngine.from_pretrained")
        return scheduler.stats()

    @property
    def is_closed(self) -> bool:
        """Whether jobs are refused here."""
        return self._is_closing or os.getpid() != self._pid

    def _wake(self) -> None:
        with self._changed:
            self._is_woken = True
            self._changed.notify()

    def _work(self) -> None:
        scheduler = self._scheduler
        assert scheduler is not None
        if self._num_threads is not None:
            use_threads(self._num_threads)
        try:
            while self._gather(scheduler):
                self._tick(scheduler)
        except BaseException as error:  # not even the searches could be ended
            _LOGGER.exception("the engine's thread failed; it takes no more searches")
            with self._changed:
                self._is_closing = self._is_stopping = True
                left = [*scheduler.jobs, *self._inbox]
                self._inbox.clear()
            for job in left:
                complete(job, _failure(error))
        self._scheduler = None

    def _tick(self, scheduler: Scheduler) -> None:
        if self._is_stopping:
            scheduler.abandon(EngineClosedError("the process ended while this search ran"))
            return
        try:
            scheduler.tick()
        except BaseException as error:
            _LOGGER.exception("a pass over all searches failed; they end")
            scheduler.abandon(_failure(error))
        self._num_waiting = scheduler.num_waiting

    def _gather(self, scheduler: Scheduler) -> bool:
        """Wait for work and hand it over; False when there will be none."""
        with self._changed:
            while not self._inbox and not self._is_woken:
                if not scheduler.num_jobs and self._is_closing:
                    return False
                if not scheduler.num_jobs:
                    self._changed.wait()
                elif not scheduler.is_blocked or not self._changed.wait(IDLE_S):
                    break
            self._is_woken = False
            self._num_waiting += len(self._inbox)
            while self._inbox:
                scheduler.add(self._inbox.popleft())
        return True


def _failure(error: BaseException) -> EngineError:
    failure = EngineError(f"the engine failed while this search ran: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure


@atexit.register
def _stop_all() -> None:
    """A thread that is inside a model library when the interpreter goes would abort the process."""
    for worker in list(_started):
        worker.stop()
