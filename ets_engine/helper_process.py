"""One more process of an engine: searches what it is given over a socket; `python -m` of `serving/helper.py`."""

from __future__ import annotations

import os
import signal
import sys
import threading
from concurrent.futures import Future
from functools import partial
from multiprocessing.connection import Connection

from transformers.utils import logging

from ets_engine.errors import EngineError
from ets_engine.loading import load_models
from ets_engine.runtime import StepDecoder
from ets_engine.runtime.threads import share_threads
from ets_engine.scorers import EvidenceScorer
from ets_engine.search import SearchTree
from ets_engine.serving import Job, Models, Worker
from ets_engine.serving.messages import Close, Done, Order, Ready, Stop, Take, Taken, Told, unpack
from ets_engine.serving.result import Outcome, measure_job

LOOK_S = 5.0  # how often it is looked at whether the engine's process is still there


def main(handle: int) -> None:
    """Serve the engine behind a socket until it says that it is done, or is gone.

    Args:
        handle: File descriptor of the socket.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the engine's process decides what Ctrl-C means
    logging.disable_progress_bar()
    connection = Connection(handle)
    order: Order = connection.recv()
    try:
        worker, own = _load(order)
    except Exception as error:
        connection.send(Ready(error))
        return
    connection.send(Ready(None))
    _Host(connection, worker, own).serve()


def _load(order: Order) -> tuple[Worker, EvidenceScorer | None]:
    loaded = load_models(order.model, order.verifier, order.config)
    own = loaded.verifier if isinstance(loaded.verifier, EvidenceScorer) else None
    prm = None if isinstance(loaded.verifier, EvidenceScorer) else loaded.verifier
    models = Models(StepDecoder(loaded.policy, loaded.format.tokenizer), loaded.format, prm, loaded.embedder)

    def finish(job: Job, tree: SearchTree) -> Outcome:
        return measure_job(job, tree, models)

    num_threads = share_threads(models.runners, order.processes)
    return Worker(models, finish, order.config.max_queued_searches, num_threads), own


class _Host:
    """Jobs between a socket and a worker."""

    def __init__(self, connection: Connection, worker: Worker, own: EvidenceScorer | None) -> None:
        self._connection, self._worker, self._own = connection, worker, own
        self._parent = os.getppid()
        self._stops: dict[int, threading.Event] = {}
        self._lock = threading.Lock()  # of what is sent

    def serve(self) -> None:
        """Until there is nothing more to do; an engine that went away takes its searches with it."""
        try:
            while not isinstance(message := self._hear(), Close):
                match message:
                    case Take(number, packed):
                        self._send(Taken(number, self._take(number, packed)))
                    case Stop(number) if number in self._stops:
                        self._stops[number].set()
        except EOFError:
            self._worker.stop()
        self._worker.close()

    def _hear(self) -> object:
        while not self._connection.poll(LOOK_S):
            if os.getppid() != self._parent:
                raise EOFError
        return self._connection.recv()

    def _take(self, number: int, packed: bytes) -> bool:
        stop = self._stops[number] = threading.Event()
        try:
            job = unpack(packed, self._own, lambda event: self._send(Told(number, event)), stop)
            job.future.add_done_callback(partial(self._answer, number))
            self._worker.submit(job)
        except Exception:
            del self._stops[number]
            return False
        return True

    def _answer(self, number: int, future: Future[Outcome]) -> None:
        """In the thread of a job's callbacks, after its last event."""
        self._stops.pop(number, None)
        error = future.exception()
        if error is not None and not isinstance(error, Exception):
            error = EngineError(f"{type(error).__name__} in a helper process: {error}")
        outcome = future.result() if error is None else error
        try:
            self._send(Done(number, outcome, self._worker.stats()))
        except OSError:
            pass  # the engine is gone
        except Exception as unsent:
            error = EngineError(f"{type(error or unsent).__name__} in a helper process: {error or unsent}")
            self._send(Done(number, error, self._worker.stats()))

    def _send(self, message: object) -> None:
        with self._lock:
            self._connection.send(message)


if __name__ == "__main__":
    main(int(sys.argv[1]))
