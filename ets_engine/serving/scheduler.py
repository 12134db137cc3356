"""Advances all live searches together: one decode step and one scoring batch at a time; not thread-safe, no thread.

Memory is handed out optimistically. When a KV pool is full, the youngest search gives up its KV and goes on later from
the steps that it has; the oldest one always goes on, so every search ends.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

from ets_engine.errors import ContextLengthError, EngineError, PoolExhaustedError
from ets_engine.models import (
    EvidenceVerifier,
    PolicyFormat,
    PrmFormat,
    PrmVerifier,
    ScoreRequest,
    TreePolicy,
    score_together,
)
from ets_engine.protocols import Embedder
from ets_engine.runtime import Runner, StepDecoder
from ets_engine.runtime.threads import are_small, share_threads
from ets_engine.scorers import CallableVerifier, EqualVerifier, EvidenceScorer
from ets_engine.search import (
    Expand,
    Progress,
    Request,
    Score,
    SearchTree,
    StopSearch,
    answer,
    effective_width,
    search,
)
from ets_engine.serving.job import PENDING, Courier, Job, complete
from ets_engine.types import EngineStats

Finish = Callable[[Job, SearchTree], object]
"""Measures a finished job while its models' usage can still be read: what `Courier.finish` takes."""

STEP_TOKENS = 32  # a guess at a step's length, to decide how many searches are let in


@dataclass(frozen=True, slots=True, eq=False)
class Models:
    """What searches run on.

    Attributes:
        decoder: Of the policy.
        format: The policy's prompt and step boundaries.
        verifier: The PRM and what it reads, None = every search brings a verifier of its own.
        embedder: Says how differently steps reason, None = the policy's own hidden states do. It is called in the
            engine's thread, like the PRM, once per depth and search: so that nothing which shares its batch can change
            what it says, and with it the clusters.
    """

    decoder: StepDecoder
    format: PolicyFormat
    verifier: tuple[Runner, PrmFormat] | None
    embedder: Embedder | None = None

    @property
    def runners(self) -> tuple[Runner, ...]:
        """Of the policy, and of the PRM where there is one."""
        return (self.decoder.runner, *([self.verifier[0]] if self.verifier else []))

    def share_threads(self, num_processes: int) -> int | None:
        """Of torch's, for one of so many processes (count), None = all; an embedder's are nobody's business here."""
        return share_threads(num_processes, is_small=self.embedder is None and are_small(self.runners))


class Scheduler:
    """All searches of one pair of models.

    Args:
        models: What they run on; nothing else may use them.
        finish: Called once per search that came to its end.
        wake: Called from other threads when a caller's own verifier has answered; it must not block.
        worker: Whoever calls `tick`, for `in_callback`.
    """

    def __init__(
        self, models: Models, finish: Finish, wake: Callable[[], None] = lambda: None, worker: object = None
    ) -> None:
        """See the class."""
        self._models = models
        self._finish = finish
        self._wake = wake
        self._worker = worker
        self._couriers: dict[Job, Courier] = {}
        self._waiting: deque[Job] = deque()  # in submission order; dropped ones are older than those never let in
        self._live: dict[int, Job] = {}  # by number, in the order of admission
        self._may_read = True  # the next part of a long prompt, in this tick
        self._parked: list[Job] = []  # without KV until their callers' verifiers have answered
        self._missed: tuple[Job, float] | None = None  # for whom there was no room, of so many tokens
        self.num_dropped = 0  # times that a search gave up its KV for the others
        self._judged: deque[tuple[Job, Request, object]] = deque()  # other threads append

    # ------------------------------------------------------------------ jobs

    @property
    def jobs(self) -> list[Job]:
        """Searches that have not ended."""
        return list(self._couriers)

    @property
    def num_jobs(self) -> int:
        """Searches that have not ended (count)."""
        return len(self._couriers)

    @property
    def num_waiting(self) -> int:
        """Searches that wait for room (count)."""
        return len(self._waiting)

    @property
    def is_blocked(self) -> bool:
        """Whether all there is to do is to wait for callers' own verifiers."""
        return not self._judged and not self._waiting and all(job.is_judging for job in self._live.values())

    def stats(self) -> EngineStats:
        """What was done so far; from another thread, a picture that may be a moment old."""
        runners = self._models.runners
        done = [runner.stats for runner in runners]
        return EngineStats(
            policy_tokens=done[0].tokens,
            verifier_tokens=sum(one.tokens for one in done[1:]),
            policy_forwards=done[0].forwards,
            verifier_forwards=sum(one.forwards for one in done[1:]),
            policy_s=done[0].busy_s,
            verifier_s=sum(one.busy_s for one in done[1:]),
            prefix_tokens=sum(runner.prefixes.num_tokens for runner in runners),
            kv_tokens=sum(runner.tree.resident_tokens for runner in runners),
            live=len(self._live),
            waiting=self.num_jobs - len(self._live),
            preemptions=self.num_dropped,
        )

    def add(self, job: Job) -> None:
        """Take a search; it is let in when there is room."""
        self._couriers[job] = Courier(job, self._worker)
        self._waiting.append(job)

    def tick(self) -> None:
        """Let searches in, bring each as far as it gets without the models, score what is new, decode one token."""
        self._take_judged()
        self._admit()
        jobs = list(self._live.values())
        self._may_read = True
        while jobs:
            for job in jobs:
                if job.number in self._live:  # it has not given up its KV for another one meanwhile
                    self._guard(job, self._advance)
            jobs = self._score()
        self._decode()

    def abandon(self, error: BaseException) -> None:
        """End every search with an error: the models cannot be trusted any more."""
        for job in self.jobs:
            self._end(job, error)

    # ------------------------------------------------------------------ who may use the memory

    def _admit(self) -> None:
        for job in [*self._waiting, *self._parked]:
            if job.error is not None or job.wants_to_stop():
                self._guard(job, self._advance if job.searching is not None else self._begin)
        while self._waiting:
            job = self._waiting[0]
            if self._has_room(job) and (job.searching is None or self._restore(job)):
                self._waiting.popleft()
                if job.searching is None:
                    self._guard(job, self._begin)
            elif all(live.is_judging for live in self._live.values()):
                self._drop(max(self._live))  # it may be waiting for this very search
            else:
                return

    def _has_room(self, job: Job) -> bool:
        """Whether a search may come in beside the others: its paths and a step per branch, by a guess."""
        if not self._live:
            return True
        wanted = effective_width(job.config) * min(STEP_TOKENS, job.config.max_step_tokens)
        wanted += job.policy.dropped_tokens if job.policy else 0
        return all(_has_tokens(runner, wanted) for runner in self._models.runners)

    def _make_room(self) -> bool:
        """Take the KV of the search that can spare it best: one that waits for its caller, else the youngest."""
        if len(self._live) < 2:
            return False
        self._drop(max(self._live, key=lambda number: (self._live[number].is_judging, number)))
        return True

    def _drop(self, number: int) -> None:
        job = self._live.pop(number)
        assert job.policy is not None and job.judge is not None
        job.policy.drop()
        job.judge.drop()
        self.num_dropped += 1
        if job.is_judging:
            self._parked.append(job)
        else:
            self._requeue(job)

    def _requeue(self, job: Job) -> None:
        """Put a search that was in already among those that wait, by age."""
        younger = (place for place, other in enumerate(self._waiting) if other.number > job.number)
        self._waiting.insert(next(younger, len(self._waiting)), job)

    def _restore(self, job: Job) -> bool:
        """Let a search in again; False when there is no room for it yet."""
        assert job.policy is not None
        room = _room_of(self._models.decoder.runner)
        if self._live and self._missed is not None and self._missed[0] is job and room <= self._missed[1]:
            return False  # as little as when it was tried last
        try:
            job.policy.restore()
        except PoolExhaustedError as error:
            if self._live:
                self._missed = None if room == math.inf else (job, room)
                return False
            job.policy.give_up(str(error))
        self._live[job.number] = job
        return True

    # ------------------------------------------------------------------ one search

    def _begin(self, job: Job) -> None:
        if job in self._waiting:
            self._waiting.remove(job)  # it is to stop at once
        if not job.future.set_running_or_notify_cancel():
            self._couriers.pop(job)  # called off while it waited
            return
        self._live[job.number] = job
        models, verifier = self._models, job.verifier
        job.policy = TreePolicy(
            *(models.decoder, models.format, job.prompt, job.config, job.number, job.tools),
            needs_certainty=isinstance(verifier, EvidenceScorer) and verifier.needs_certainty,
        )
        if isinstance(verifier, EqualVerifier):
            job.judge = verifier
        elif isinstance(verifier, EvidenceScorer):
            job.judge = EvidenceVerifier(verifier, job.policy)
        elif verifier is not None:
            job.judge = CallableVerifier(verifier, job.problem)
        else:
            assert models.verifier is not None
            read_step = models.format.reader(job.read_step)
            job.judge = PrmVerifier(
                *models.verifier, job.prm_problem, job.number, read_step, merges=job.config.merge_branches
            )
        self._check_fit(job)
        job.searching = search(job.config, job.selector, clock=time.perf_counter)
        job.request = next(job.searching)
        self._advance(job)

    def _check_fit(self, job: Job) -> None:
        """Refuse a search that has no room even when it is alone.

        Raises:
            ContextLengthError: Naming what its prompt and one branch take.
        """
        assert job.policy is not None
        lengths = [job.policy.prompt_tokens]
        if isinstance(job.judge, PrmVerifier):
            lengths.append(job.judge.root_tokens)
        for length, runner in zip(lengths, self._models.runners, strict=False):
            pool = runner.tree.pool
            needed = -(-(length + 1) // pool.page_tokens)
            if pool.max_pages is not None and needed > pool.max_pages:
                raise ContextLengthError(
                    f"the prompt of {length} tokens and one branch take {needed * pool.page_tokens} tokens of KV, and "
                    f"the pool has {pool.max_pages * pool.page_tokens}; raise kv_pool_tokens or kv_memory_fraction"
                )

    def _advance(self, job: Job) -> None:
        """Answer a search's requests until one has to wait, or it ends."""
        assert job.searching is not None
        while True:
            if job.error is not None:
                raise job.error
            if not job.is_stopped and job.wants_to_stop():
                job.is_stopped = True
                go_on = partial(job.searching.throw, StopSearch())
            elif (reply := self._reply(job)) is PENDING:
                return
            else:
                go_on = partial(job.searching.send, reply)
            try:
                job.request = go_on()
            except StopIteration as ended:
                self._end(job, ended.value)
                return
            job.is_asked, job.reply = False, PENDING

    def _reply(self, job: Job) -> object:
        """The answer to a search's request, `PENDING` when it is not there yet."""
        assert job.policy is not None and job.judge is not None and job.request is not None
        was_asked, job.is_asked = job.is_asked, True
        match job.request:
            case Expand() if not (job.is_read or self._read_ahead(job.policy)):
                job.is_asked = False
                return PENDING
            case Expand(parents, children):
                job.is_read = True
                if not was_asked:
                    job.policy.submit(parents, children)
                steps = job.policy.steps()
                return PENDING if steps is None else steps
            case Score() as request if isinstance(job.judge, PrmVerifier | CallableVerifier):
                if not was_asked and isinstance(job.judge, CallableVerifier):
                    self._couriers[job].judge(job.judge, request, lambda found: self._hear(job, request, found))
                elif not was_asked:
                    job.texts = job.judge.read(request.texts)
                return job.reply
            case Progress(event):
                return self._couriers[job].tell(event)
            case request:
                return answer(request, job.policy, job.judge, self._models.embedder or job.policy)

    def _read_ahead(self, policy: TreePolicy) -> bool:
        """Whether a search's prompt is read, but for what goes along with its first steps; one chunk per tick."""
        chunk_tokens = self._models.decoder.runner.config.prefill_chunk_tokens
        if policy.unread_tokens <= chunk_tokens:
            return True
        if self._may_read:
            self._may_read = False
            try:
                policy.read_ahead(chunk_tokens)
            except PoolExhaustedError:
                return not self._make_room()  # alone and still no room: its first steps will say so
        return False

    def _hear(self, job: Job, request: Request, found: object) -> None:
        """Called in a job's own thread: its caller's verifier has answered."""
        self._judged.append((job, request, found))
        self._wake()

    def _take_judged(self) -> None:
        while self._judged:
            job, request, found = self._judged.popleft()
            if job.request is not request:
                continue  # it was stopped meanwhile
            job.reply = found
            if job in self._parked:
                self._parked.remove(job)
                self._requeue(job)

    def _guard(self, job: Job, act: Callable[[Job], None]) -> None:
        """Do something for one search; what goes wrong is its own."""
        try:
            act(job)
        except BaseException as error:  # a caller's function raises what it likes
            self._end(job, error)

    def _end(self, job: Job, outcome: SearchTree | BaseException) -> None:
        """Give back all that a search holds, and complete its future."""
        try:
            found: object = self._finish(job, outcome) if isinstance(outcome, SearchTree) else outcome
        except BaseException as error:
            found = error
        for part in (job.policy, job.judge):
            if part is not None:
                part.close()
        self._live.pop(job.number, None)
        for others in (self._waiting, self._parked):
            if job in others:
                others.remove(job)
        job.request = job.searching = job.policy = job.judge = None  # their tensors are freed here, in this thread
        courier = self._couriers.pop(job)
        try:
            courier.finish(found)
        except RuntimeError as error:  # no thread can be started
            complete(job, EngineError(f"this search ended, and nobody can be told what it found: {error}"))

    # ------------------------------------------------------------------ the models

    def _score(self) -> list[Job]:
        """Score the new steps of all searches that wait for it; those searches."""
        while True:
            scoring: list[Job] = []
            requests: list[ScoreRequest] = []
            for job in self._live.values():
                if job.reply is PENDING and isinstance(job.request, Score) and isinstance(job.judge, PrmVerifier):
                    scoring.append(job)
                    requests.append((job.judge, job.request.nodes, job.request.parents, job.texts))
            if not scoring:
                return []
            try:
                found = score_together(requests)
            except PoolExhaustedError:
                if self._make_room():
                    continue
                ((judge, nodes, parents, texts),) = requests
                found = [judge.score_read(nodes, parents, texts)]
            for job, scores in zip(scoring, found, strict=True):
                job.reply = scores
            return scoring

    def _decode(self) -> None:
        """One token for every live branch."""
        decoder = self._models.decoder
        while decoder.num_branches:
            try:
                finished = decoder.step()
            except PoolExhaustedError as error:
                if self._make_room():
                    continue
                (job,) = self._live.values()
                assert job.policy is not None
                job.policy.fail(str(error))
                return
            for one in finished:
                owner = self._live[cast(int, one.branch.parent.search)]
                assert owner.policy is not None
                owner.policy.take(one)
            return


def _has_tokens(runner: Runner, wanted: int) -> bool:
    """Whether a pool has so many tokens free, or can get them from prompts that it only remembers."""
    pool = runner.tree.pool
    return (pool.free_pages_left or 0) * pool.page_tokens >= wanted or _room_of(runner) >= wanted


def _room_of(runner: Runner) -> float:
    """Tokens that a pool has free, or can get from prompts that it only remembers; without a limit infinite."""
    pool = runner.tree.pool
    if pool.free_pages_left is None:
        return math.inf
    return pool.free_pages_left * pool.page_tokens + runner.prefixes.num_unused_tokens
