"""One more process of an engine: searches what it is given over a socket; `serving/helper.py` starts it."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import traceback
from concurrent.futures import Future
from functools import partial

from transformers.utils import logging

from ets_engine.errors import EngineClosedError
from ets_engine.loading import load_models
from ets_engine.runtime import StepDecoder
from ets_engine.scorers import EvidenceScorer
from ets_engine.search import SearchTree
from ets_engine.serving import Job, Models, Worker
from ets_engine.serving.channel import Channel
from ets_engine.serving.messages import Close, Done, Order, Ready, Refused, Stop, Take, Told, portable, unpack
from ets_engine.serving.result import Outcome, measure_job

LOOK_S = 5.0  # how often it is looked at whether the engine's process is still there


def main(handle: int) -> None:
    """Serve the engine behind a socket until it says that it is done, or is gone.

    Args:
        handle: File descriptor of the socket.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to all processes at once; the engine's says what they mean
        signal.signal(number, signal.SIG_IGN)
    logging.disable_progress_bar()
    channel, engine = Channel(handle), os.getppid()
    try:
        order = channel.get()
    except (EOFError, OSError):
        return
    assert isinstance(order, Order)
    try:
        worker, own = _load(order)
    except Exception as error:
        channel.put(Ready(portable(error)))
    else:
        channel.put(Ready(None))
        _Host(channel, worker, own, engine).serve()
    channel.close()


def _load(order: Order) -> tuple[Worker, EvidenceScorer | None]:
    loaded = load_models(order.model, order.verifier, order.config)
    own = loaded.verifier if isinstance(loaded.verifier, EvidenceScorer) else None
    prm = None if isinstance(loaded.verifier, EvidenceScorer) else loaded.verifier
    models = Models(StepDecoder(loaded.policy, loaded.format.tokenizer), loaded.format, prm, loaded.embedder)

    def finish(job: Job, tree: SearchTree) -> Outcome:
        return measure_job(job, tree, models)

    return Worker(models, finish, order.config.max_queued_searches, models.share_threads(order.processes)), own


class _Host:
    """Jobs between a channel and a worker."""

    def __init__(self, channel: Channel, worker: Worker, own: EvidenceScorer | None, engine: int) -> None:
        self._engine = engine  # its process
        self._channel, self._worker, self._own = channel, worker, own
        self._changed = threading.Condition()
        self._stops: dict[int, threading.Event] = {}  # of every job that is not answered
        self._is_closing = False

    def serve(self) -> None:
        """Until there is nothing more to do; an engine that went away takes its searches with it."""
        threading.Thread(target=self._listen, name="ets-host", daemon=True).start()
        with self._changed:
            self._changed.wait_for(lambda: self._is_closing and not self._stops)
        self._worker.close()

    def _listen(self) -> None:
        try:
            while True:
                while not self._channel.poll(LOOK_S):
                    if os.getppid() != self._engine:  # a fork of it may keep its end of the socket open
                        raise EOFError
                match self._channel.get():
                    case Take(number, packed):
                        self._take(number, packed)
                    case Stop(number):
                        if (stop := self._stops.get(number)) is not None:
                            stop.set()
                    case Close():
                        self._close()
        except (EOFError, OSError):
            self._worker.stop()
            self._stops.clear()
            self._close()
        except BaseException:
            traceback.print_exc()
            os._exit(1)  # whoever waits for this process finds it gone

    def _close(self) -> None:
        with self._changed:
            self._is_closing = True
            self._changed.notify()

    def _take(self, number: int, packed: bytes) -> None:
        stop = self._stops[number] = threading.Event()
        try:
            job = unpack(packed, self._own, lambda event: self._channel.put(Told(number, event)), stop)
            self._worker.submit(job)
        except BaseException:  # of a module that a function of the caller's is in, `SystemExit` for instance
            self._channel.put(Refused(number))
            self._forget(number)
        else:
            job.future.add_done_callback(partial(self._answer, number))

    def _answer(self, number: int, future: Future[Outcome]) -> None:
        """In the thread of a job's callbacks, after its last event."""
        error = future.exception()
        try:
            packed = pickle.dumps(future.result() if error is None else portable(error))
        except Exception as unsent:
            packed = pickle.dumps(portable(unsent))
        try:
            stats = self._worker.stats()
        except EngineClosedError:
            stats = None
        self._channel.put(Done(number, packed, stats))
        self._forget(number)

    def _forget(self, number: int) -> None:
        with self._changed:
            self._stops.pop(number, None)
            self._changed.notify()
