"""The processes of one engine: its own and its helpers; each search goes to the one that has the fewest."""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Sequence

from ets_engine.scorers import EvidenceScorer
from ets_engine.serving.helper import Helper
from ets_engine.serving.job import Job
from ets_engine.serving.messages import pack
from ets_engine.serving.worker import Worker
from ets_engine.types import EngineStats

_started: weakref.WeakSet[Crew] = weakref.WeakSet()


class Crew:
    """A worker in this process, and helpers with the same models.

    A search that brings a verifier or a selector of its own stays here, and so does one whose callers hand over what
    cannot be pickled. Should a helper die, its searches begin anew here, and end with the same results.

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
        self._lock = threading.Lock()
        self._is_closing = False
        for helper in helpers:
            helper.wait_ready(worker, worker.submit)
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

    def _lend(self, job: Job) -> bool:
        """Give a job to a helper that has fewer than this process; whether there is one, and it may."""
        with self._lock:  # so that two threads do not both take the same one for the idlest
            helpers = [helper for helper in self._helpers if helper.is_alive]
            idlest = min(helpers, key=lambda helper: helper.num_jobs, default=None)
            if idlest is None or idlest.num_jobs >= min(self._worker.num_jobs, self._max_queued):
                return False
            packed = pack(job, self._own)
            return packed is not None and idlest.put(job, packed)

    def stats(self) -> EngineStats:
        """What all processes have done, each helper until it last finished a job.

        Raises:
            EngineClosedError: The models are gone.
        """
        found = [self._worker.stats(), *(one.stats for one in self._helpers if one.stats is not None)]
        return EngineStats(**{name: sum(getattr(one, name) for one in found) for name in EngineStats.model_fields})

    @property
    def is_closed(self) -> bool:
        """Whether jobs are refused here."""
        return self._is_closing or self._worker.is_closed

    def close(self, *, wait: bool = True) -> None:
        """Take no more jobs, finish those there are, and end the helpers."""
        self._is_closing = True
        for helper in self._helpers:
            helper.close()
        if wait:
            for helper in self._helpers:
                helper.join()  # a job of one that dies now begins anew in the worker
        self._worker.close(wait=wait)

    def stop(self) -> None:
        """End the helpers at once: the process is about to go."""
        for helper in self._helpers:
            helper.kill()


@atexit.register
def _stop_all() -> None:
    for crew in list(_started):
        crew.stop()
