"""One submitted search: what the caller asked for, how far it is, and the thread that calls the caller back."""

from __future__ import annotations

import contextvars
import itertools
import queue
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ets_engine.config import SearchConfig
from ets_engine.errors import EngineError
from ets_engine.messages import Message, Prompt
from ets_engine.models import EvidenceVerifier, PrmVerifier, TreePolicy
from ets_engine.protocols import Cancel, OnEvent, Selector, StepView
from ets_engine.results import EndedEarly
from ets_engine.scorers import CallableVerifier, EqualVerifier, EvidenceScorer, Scorer
from ets_engine.search import Request, Score, SearchTree
from ets_engine.types import SearchEvent

PENDING = object()
MAX_EVENTS = 64  # undelivered; when a callback is slower than the search, events in between are left out
_callback = threading.local()


def in_callback() -> object:
    """The engine thread's worker on whose behalf this thread runs a caller's function, None in any other thread."""
    return getattr(_callback, "worker", None)


@dataclass(eq=False)
class Job:
    """A search under way; the engine's thread alone changes it, apart from `error`, which callbacks set.

    Attributes:
        problem: What verifiers of the caller's own and views read.
        prompt: What the policy reads.
        prm_problem: What the PRM reads.
        config: Width, limits, seed.
        selector: Of the caller's own, None = the one that `config` names.
        verifier: Of the caller's own, or one that reads what the policy computes; None = the engine's PRM.
        view: How texts map to answers, None where nobody asks for more than the outcome.
        on_event: Called with every depth's progress, in a thread of this job.
        cancel: Once set, the best so far is the result.
        tools: Functions that the policy may call.
        read_step: What the PRM reads of a step's text, None = what the policy's preset says.
        future: Of the result, or of the outcome where there is no view.
        began_s: When it was submitted (`time.perf_counter`).
        context: The submitter's context variables; its functions run in it.
        number: Submission order within the process; the youngest job has the largest.
        ended_early: Why it is to end before it is through.
        is_stopped: Whether the search was told.
        is_read: Whether its prompt was read, but for a last part that goes along with its first steps.
        searching, policy, judge: The search and its share of the models, once it was let in.
        request: What the search waits for.
        is_asked: Whether the policy or the caller's own verifier was asked for it already.
        reply: What came back, `PENDING` until then.
        texts: What the PRM reads of the steps that are to be scored.
        error: What a callback raised.
    """

    problem: str
    prompt: Prompt
    prm_problem: str
    config: SearchConfig
    selector: Selector | None
    verifier: Scorer | EvidenceScorer | EqualVerifier | None
    view: StepView | None
    on_event: OnEvent | None
    cancel: Cancel | None
    tools: Sequence[Message] = ()
    read_step: Callable[[str], str] | None = None
    future: Future[Any] = field(default_factory=Future)
    began_s: float = field(default_factory=time.perf_counter)
    context: contextvars.Context = field(default_factory=contextvars.copy_context)
    number: int = field(default_factory=itertools.count().__next__)
    ended_early: EndedEarly | None = None
    is_stopped: bool = False
    is_read: bool = False
    searching: Generator[Request, Any, SearchTree] | None = None
    policy: TreePolicy | None = None
    judge: PrmVerifier | CallableVerifier | EvidenceVerifier | EqualVerifier | None = None
    request: Request | None = None
    is_asked: bool = False
    reply: object = PENDING
    texts: Sequence[str] = ()
    error: BaseException | None = None

    @property
    def is_judging(self) -> bool:
        """Whether the caller's own verifier is at work."""
        return isinstance(self.request, Score) and isinstance(self.judge, CallableVerifier) and self.reply is PENDING

    def is_called_off(self) -> bool:
        """Whether its caller wants it to stop; a `cancel` that raises ends it with that error."""
        try:
            return self.cancel is not None and bool(self.cancel.is_set())
        except BaseException as error:
            self.error = error
            return True

    def wants_to_stop(self) -> bool:
        """Whether the caller or the deadline ends it now."""
        if self.ended_early is None:
            if self.is_called_off():
                self.ended_early = "cancelled"
            elif self.config.deadline_s is not None and time.perf_counter() - self.began_s >= self.config.deadline_s:
                self.ended_early = "deadline"
        return self.ended_early is not None


def complete(job: Job, outcome: object) -> None:
    """Complete a job's future, if nobody called it off before it was let in.

    Args:
        job: Whose future it is; what one of its callbacks raised comes before any outcome.
        outcome: What the future is to hold, or an exception that it is to raise.
    """
    final = job.error or outcome
    if isinstance(final, StopIteration):  # no event loop's future takes one
        failure = EngineError(f"a function of this search raised {final!r}")
        failure.__cause__ = final
        final = failure
    with suppress(InvalidStateError):
        if isinstance(final, BaseException):
            job.future.set_exception(final)
        else:
            job.future.set_result(final)


class Courier:
    """Runs one job's callbacks in a thread of their own, so that nothing a caller does holds up the engine.

    Args:
        job: Whose callbacks they are.
        worker: Whose thread must not be waited for by them; see `in_callback`.
    """

    def __init__(self, job: Job, worker: object) -> None:
        """See the class."""
        self._job = job
        self._worker = worker
        self._tasks: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._num_events = 0
        self._is_ending = False
        self._thread: threading.Thread | None = None

    def tell(self, event: SearchEvent) -> None:
        """Deliver an event; "step" events are left out while too many wait."""
        on_event = self._job.on_event
        if on_event is None or (event.kind == "step" and self._num_events >= MAX_EVENTS):
            return
        self._num_events += 1

        def deliver() -> None:
            self._num_events -= 1
            if self._job.error is None and not (event.kind == "step" and self._is_late()):
                try:
                    on_event(event)
                except BaseException as error:
                    self._job.error = error

        self._run(deliver)

    def _is_late(self) -> bool:
        """Whether the result should be there already: it is not held up by telling how it came about."""
        return self._is_ending and self._job.ended_early is not None

    def judge(self, verifier: CallableVerifier, request: Score, done: Callable[[object], None]) -> None:
        """Ask the caller's own verifier; `done` gets the scores, unless the verifier raised.

        In a thread of its own: a verifier that hangs must not hold up the result at a deadline.
        """

        def ask() -> None:
            _callback.worker = self._worker
            try:
                done(verifier.score(request.nodes, request.parents, request.texts))
            except BaseException as error:
                self._job.error = error
                done(PENDING)

        context = self._job.context.copy()
        threading.Thread(target=context.run, args=(ask,), name=f"ets-verifier-{self._job.number}", daemon=True).start()

    def finish(self, outcome: object) -> None:
        """Complete the future, after all events were delivered.

        Args:
            outcome: As in `complete`, or a function of no arguments that gives it; answers are found and compared in
                this thread, for that takes as long as it takes.
        """

        def resolve() -> None:
            try:
                found = outcome() if callable(outcome) else outcome
            except BaseException as error:  # of the caller's view
                found = error
            complete(self._job, found)

        self.end(resolve)

    def end(self, task: Callable[[], object]) -> None:
        """Do a last thing, after all events were delivered.

        Raises:
            RuntimeError: No thread can be started.
        """
        self._is_ending = True
        self._run(partial(self._outside, task))
        self._tasks.put(None)

    def _outside(self, task: Callable[[], object]) -> None:
        """The search is over: what hears of its result may wait for the worker."""
        _callback.worker = None
        task()

    def _run(self, task: Callable[[], object]) -> None:
        if self._thread is None:
            thread = threading.Thread(target=self._work, name=f"ets-callbacks-{self._job.number}", daemon=True)
            thread.start()
            self._thread = thread
        self._tasks.put(task)

    def _work(self) -> None:
        _callback.worker = self._worker
        while (task := self._tasks.get()) is not None:
            self._job.context.run(task)
