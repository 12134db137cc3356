"""The processes of one engine: its own and its helpers; each search goes to the one that has the fewest."""

from __future__ import annotations

import atexit
import logging
import os
import pickle
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ets_engine.errors import EngineClosedError, EngineError, ETSError
from ets_engine.protocols import OnEvent
from ets_engine.scorers import EvidenceScorer
from ets_engine.serving.helper import Helper
from ets_engine.serving.job import Courier, Job, complete
from ets_engine.serving.messages import Close, Done, Refused, Stop, Take, Told, pack
from ets_engine.serving.result import Outcome
from ets_engine.serving.worker import Worker
from ets_engine.types import EngineStats, SearchEvent

MIN_SERVED_S = 60.0  # by a helper that another takes the place of: what ends one sooner would end that one too

_LOGGER = logging.getLogger(__name__)
_started: weakref.WeakSet[Crew] = weakref.WeakSet()


@dataclass(eq=False)
class _Guest:
    """A job that a helper has.

    Attributes:
        job: Of this process; its future is pending until its outcome is here.
        courier: Its callbacks' thread.
        helper: Who has it.
        is_stopped: Whether the helper was told to stop it.
        told: The last event that was passed on.
    """

    job: Job
    courier: Courier
    helper: Helper
    is_stopped: bool = False
    told: SearchEvent | None = None


class Crew:
    """A worker in this process, and helpers with the same models.

    A search that brings a verifier or a selector of its own stays here, and so does one whose caller hands over what
    cannot be pickled. Should a helper die, its searches begin anew here, and end with the same results; another is
    started in its place, unless it had only just begun to serve.

    Args:
        worker: Of this process.
        helpers: Started, and not waited for yet.
        own: The engine's verifier, where that is no PRM.
        max_queued: Most jobs that one helper has.

    Raises:
        ETSError: A helper could not load the models.
    """

    def __init__(self, worker: Worker, helpers: Sequence[Helper], own: EvidenceScorer | None, max_queued: int) -> None:
        """See the class."""
        self._worker = worker
        self._helpers = tuple(helpers)
        self._own = own
        self._max_queued = max_queued
        # Of all below, of which helpers there are, and of their `num_jobs` and `is_alive`. Neither a caller's
        # function nor anything that waits runs under it; a finalizer may, `close` for
        # one, so it can be taken twice.
        self._changed = threading.Condition(threading.RLock())
        self._guests: dict[int, _Guest] = {}
        self._num_lent = 0  # jobs that are neither delivered nor back in the worker
        self._is_closing = self._is_stopping = False
        self._pid = os.getpid()
        for helper in helpers:
            helper.wait_ready()
        for helper in helpers:
            helper.listen(self)
        if helpers:
            _started.add(self)

    def submit(self, job: Job) -> None:
        """Queue a job.

        Raises:
            EngineClosedError: The engine was closed, or this process is a fork of its own.
            QueueFullError: Too many jobs wait.
        """
        self._worker.check_open(is_closing=self._is_closing)
        if not self._lend(job):
            self._worker.submit(job)

    def stats(self) -> EngineStats:
        """What all processes have done, each helper until it last finished a job.

        Raises:
            EngineClosedError: The models are gone.
        """
        found = [self._worker.stats(), *(_stats(one) for one in self._helpers)]
        return EngineStats(**{name: sum(getattr(one, name) for one in found) for name in EngineStats.model_fields})

    @property
    def is_closed(self) -> bool:
        """Whether jobs are refused here."""
        return self._is_closing or self._worker.is_closed

    def close(self, *, wait: bool = True) -> None:
        """Take no more jobs, finish those there are, and end the helpers."""
        if os.getpid() != self._pid:  # the helpers are the other process's
            self._worker.close(wait=wait)
            return
        with self._changed:
            self._is_closing = True
        for helper in self._helpers:
            if helper.is_ready:
                helper.expect_end()
                helper.put(Close())
            else:
                helper.kill()
        if wait:
            with self._changed:
                self._changed.wait_for(lambda: self._num_lent <= 0)
            self._worker.close()
            for helper in self._helpers:
                helper.join()
        else:
            self._settle(0)

    def stop(self) -> None:
        """End the helpers at once: the process is about to go."""
        if os.getpid() == self._pid:
            with self._changed:
                self._is_closing = self._is_stopping = True
            for helper in self._helpers:
                helper.kill()

    # ------------------------------------------------------------------ giving jobs away

    def _lend(self, job: Job) -> bool:
        """Give a job to a helper that has fewer than this process; whether there is one, and it may."""
        if self._idlest() is None or (packed := pack(job, self._own)) is None:
            return False
        with self._changed:  # two threads may not take the same one for the idlest
            helper = self._idlest()
            if helper is None or self._is_closing:
                return False
            try:
                self._guests[job.number] = _Guest(job, Courier(job, self._worker), helper)
                self._num_lent += 1
                helper.num_jobs += 1
                helper.put(Take(job.number, packed))
            except BaseException:  # Ctrl-C for instance
                helper.put(Stop(job.number))
                if self._forget(job.number):
                    self._num_lent -= 1
                raise
        return True

    def _idlest(self) -> Helper | None:
        """The helper that has the fewest jobs, where this process has more."""
        helpers = [helper for helper in self._helpers if helper.is_alive]
        idlest = min(helpers, key=lambda helper: helper.num_jobs, default=None)
        if idlest is None or idlest.num_jobs >= min(self._worker.num_jobs, self._max_queued):
            return None
        return idlest

    def _forget(self, number: int) -> _Guest | None:
        with self._changed:
            guest = self._guests.pop(number, None)
            if guest is not None:
                guest.helper.num_jobs -= 1
        return guest

    def _settle(self, count: int) -> None:
        """So many jobs are delivered, or back in the worker."""
        with self._changed:
            self._num_lent -= count
            is_over = self._is_closing and self._num_lent <= 0
            self._changed.notify_all()
        if is_over:
            self._worker.close(wait=False)

    # ------------------------------------------------------------------ helpers' threads

    def hear(self, helper: Helper, message: object) -> None:
        """What a helper says."""
        match message:
            case Told(number, event):
                if (guest := self._guests.get(number)) is not None:
                    guest.courier.tell(event)
                    guest.told = event
            case Refused(number):
                if (guest := self._forget(number)) is not None:
                    self._take_back(guest)
            case Done(number, outcome, stats):
                helper.stats = stats or helper.stats
                if (guest := self._forget(number)) is not None:
                    self._deliver(guest, outcome)

    def look_after(self, helper: Helper) -> None:
        """Pass on who wants to stop."""
        with self._changed:
            guests = [one for one in self._guests.values() if one.helper is helper and not one.is_stopped]
        for guest in guests:
            job = guest.job
            if job.future.cancelled():
                if self._forget(job.number):
                    job.future.set_running_or_notify_cancel()  # those who wait for it are told
                    _end(guest, lambda: None)
                    self._settle(1)
            elif job.error is None and not job.is_called_off():
                continue
            guest.is_stopped = True
            helper.put(Stop(job.number))

    def part(self, helper: Helper) -> None:
        """A helper has ended."""
        with self._changed:
            helper.is_alive = False
            left = [one for one in self._guests.values() if one.helper is helper]
        for guest in left:
            if self._forget(guest.job.number):
                self._take_back(guest)

    def replace(self, helper: Helper) -> None:
        """Start another helper in place of one that has ended."""
        if self._is_closing or helper.served_s < MIN_SERVED_S:
            return
        another: Helper | None = None
        try:
            another = helper.start_another()
            another.listen(self)
        except (OSError, ETSError, RuntimeError) as error:  # no process, no socket, no thread
            _LOGGER.warning("no other helper process can be started: %s", error)
            if another is not None:
                another.kill()
            return
        with self._changed:
            self._helpers = (*self._helpers, another)  # the other one's figures still count
        if self._is_closing:  # by now
            another.kill()

    def welcome(self, helper: Helper) -> None:
        """Another helper can be given jobs from now on."""
        with self._changed:
            helper.is_alive = not self._is_closing

    def _deliver(self, guest: _Guest, packed: bytes) -> None:
        """Complete a job's future, in the thread of its callbacks."""
        job = guest.job

        def resolve() -> None:
            try:
                outcome: object = pickle.loads(packed)
                complete(job, outcome.to_result(job) if isinstance(outcome, Outcome) else outcome)
            except BaseException as error:  # of the caller's view
                complete(job, error)

        _end(guest, resolve if job.future.set_running_or_notify_cancel() else lambda: None)
        self._settle(1)

    def _take_back(self, guest: _Guest) -> None:
        """Have a job done in this process; its listener is not told again what it knows."""
        job = guest.job

        def readmit() -> None:
            try:
                heard = job.on_event if guest.told is None or job.on_event is None else _news(job.on_event, guest.told)
                # The old thread of callbacks is inside the context still.
                again = replace(job, on_event=heard, context=job.context.copy())
                self._worker.readmit(again)
            except Exception as error:
                complete(job, error)
            finally:
                self._settle(1)

        if self._is_stopping:
            complete(job, EngineClosedError("the process ended while this search ran"))
            self._settle(1)
        elif not _end(guest, readmit):
            self._settle(1)


def _end(guest: _Guest, task: Callable[[], object]) -> bool:
    """Do a last thing for a job after its callbacks, and whether it could be; else the job ends with the reason."""
    try:
        guest.courier.end(task)
    except RuntimeError as error:  # no thread can be started
        complete(guest.job, EngineError(f"this search ended, and nobody can be told what it found: {error}"))
        return False
    return True


def _news(on_event: OnEvent, known: SearchEvent) -> OnEvent:
    """The same listener, but for what it was told already by a search that began anew."""

    def tell(event: SearchEvent) -> None:
        is_old = event.kind == "start" or event.depth <= known.depth if known.kind == "step" else event.kind == "start"
        if known.kind != "end" and (event.kind == "end" or not is_old):
            on_event(event)

    return tell


def _stats(helper: Helper) -> EngineStats:
    """Of a helper, with the jobs that it has now."""
    found = helper.stats or EngineStats(**dict.fromkeys(EngineStats.model_fields, 0))
    gone = {} if helper.is_alive else {"kv_tokens": 0, "prefix_tokens": 0}
    return found.model_copy(update={"live": helper.num_jobs, "waiting": 0, **gone})


@atexit.register
def _stop_all() -> None:
    for crew in list(_started):
        crew.stop()
