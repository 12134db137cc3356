"""Runs methods over problems on one engine and writes down what came out; it judges nothing about the figures."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from threading import Event
from typing import Any
from zlib import crc32

from ets_engine.answers import ReferenceView
from ets_engine.config import SearchConfig, Vote
from ets_engine.errors import ConfigError, ETSError
from ets_engine.evaluation.grading import Mode, check_mode, grade, key
from ets_engine.evaluation.methods import Method
from ets_engine.evaluation.problems import EvalProblem
from ets_engine.evaluation.records import Outcome, Pass, Record, Results
from ets_engine.protocols import SearchService
from ets_engine.service import ETSEngine
from ets_engine.types import Candidate, SearchResult

OnResult = Callable[[SearchResult | None, Record], None]
"""Called with every search: its result, None where it failed, and what was written down."""

RANK: dict[Vote, Callable[[Candidate], tuple[float, float]]] = {
    "majority": lambda one: (one.votes, crc32(one.answer.encode())),  # a tie is drawn: the verifier has no say in it
    "weighted": lambda one: (one.weight, one.score),
    "best": lambda one: (one.score, one.weight),
}


def check_counts(mode: str, seeds: int, concurrency: int, latency_problems: int) -> None:
    """Refuse what `Bench` cannot do.

    Raises:
        ConfigError: A count is out of range, or the mode is unknown.
    """
    if seeds < 1 or concurrency < 1 or latency_problems < 0:
        raise ConfigError(
            f"seeds={seeds}, concurrency={concurrency}, latency_problems={latency_problems}: need >= 1, >= 1, >= 0"
        )
    check_mode(mode)


@dataclass(frozen=True, slots=True)
class Job:
    """One search that is to be measured."""

    problem: EvalProblem
    method: Method
    seed: int


@dataclass(frozen=True, slots=True)
class Bench:
    """What a comparison runs on.

    Attributes:
        engine: What searches; nothing else should use its models meanwhile. One over a server knows no bandwidth, no
            FLOPs, and of the KV only what can be counted from the tree.
        problems: The same for every method. Solutions of the reference families are read as their checkers read them,
            whatever the engine would see in them.
        results: Where searches are written down.
        base: Settings of every search, apart from strategy, width and seed.
        seeds: Each method solves each problem once per seed.
        mode: How answers are compared, and by that which votes are for the same one.
        concurrency: Searches in flight while accuracy and KV are measured, >= 1.
        latency_problems: With `concurrency` > 1, the first so many problems are searched again one at a time, all
            methods in turn, for latency and bandwidth, >= 0.
        processes: That the engine searches in, to be written down.
        on_result: Called with every search.

    Raises:
        ConfigError: A count is out of range, or the mode is unknown.
    """

    engine: SearchService
    problems: Sequence[EvalProblem]
    results: Results
    base: SearchConfig
    seeds: Sequence[int] = (0,)
    mode: Mode = "math"
    concurrency: int = 1
    latency_problems: int = 0
    processes: int = 1
    on_result: OnResult = lambda result, record: None

    def __post_init__(self) -> None:
        check_counts(self.mode, len(self.seeds), self.concurrency, self.latency_problems)

    def run(self, methods: Sequence[Method]) -> None:
        """Measure what is missing: each method over all problems, then latencies, methods in turn.

        A search that fails is written down as such and stops nothing.

        Raises:
            KeyboardInterrupt: The running searches were stopped, and are not written down.
        """
        for method in methods:
            for seed in self.seeds:
                todo = self._missing([method], self.problems, seed, alone=self.concurrency == 1)
                self._together(todo) if self.concurrency > 1 else self._alone(todo)
        if self.concurrency > 1:
            self._alone(self._missing(methods, self.problems[: self.latency_problems], self.seeds[0], alone=True))

    def warm_up(self) -> None:
        """One search that is not written down: the first one pays for the pool's growth and the kernels' start."""
        config = SearchConfig(strategy="best_of_n", width=4, max_tokens=self.base.max_tokens)
        wait([self._submit_to(self.problems[0], config)])

    def count(self, methods: Sequence[Method]) -> int:
        """Searches that `run` would do now."""
        alone = self.concurrency == 1
        total = sum(len(self._missing(methods, self.problems, seed, alone=alone)) for seed in self.seeds)
        first = self.problems[: self.latency_problems]
        return total + (0 if alone else len(self._missing(methods, first, self.seeds[0], alone=True)))

    def _missing(
        self, methods: Sequence[Method], problems: Sequence[EvalProblem], seed: int, *, alone: bool
    ) -> list[Job]:
        return [
            Job(problem, method, seed)
            for problem in problems
            for method in methods
            if not self.results.has(((problem.id, problem.digest), method.name, seed, alone))
        ]

    def _submit(self, job: Job, cancel: Event) -> Future[SearchResult]:
        return self._submit_to(job.problem, job.method.config(self.base, job.seed), cancel)

    def _submit_to(
        self, problem: EvalProblem, config: SearchConfig, cancel: Event | None = None
    ) -> Future[SearchResult]:
        try:
            view = ReferenceView() if problem.family else None
            return self.engine.submit(problem.problem, config, cancel=cancel, view=view)
        except ETSError as error:
            failed: Future[SearchResult] = Future()
            failed.set_exception(error)
            return failed

    def _together(self, jobs: Sequence[Job]) -> None:
        """Up to `concurrency` searches in flight; one pass."""
        waiting, running, cancel = deque(jobs), dict[Future[SearchResult], Job](), Event()
        done = 0
        began_s = time.perf_counter()
        try:
            while waiting or running:
                while waiting and len(running) < self.concurrency:
                    job = waiting.popleft()
                    running[self._submit(job, cancel)] = job
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    done += self._write(running.pop(future), future, self.concurrency)
        finally:
            cancel.set()
        if len(jobs) >= self.concurrency:  # else there were never so many in flight
            wall_s = time.perf_counter() - began_s
            name = jobs[0].method.name
            self.results.add(
                Pass(
                    method=name,
                    concurrency=self.concurrency,
                    processes=self.processes,
                    searches=done,
                    wall_s=wall_s,
                )
            )

    def _alone(self, jobs: Sequence[Job]) -> None:
        """One search after another."""
        cancel = Event()
        try:
            for job in jobs:
                future = self._submit(job, cancel)
                wait([future])
                self._write(job, future, 1)
        finally:
            cancel.set()

    def _write(self, job: Job, future: Future[SearchResult], concurrency: int) -> bool:
        """Write one search down; whether it came to a result."""
        result: SearchResult | None = None
        try:
            result = future.result()
            counts = self.engine.num_parameters if isinstance(self.engine, ETSEngine) else None
            record = record_of(result, job, self.mode, concurrency, counts)
        except Exception as error:
            record = Record(**_asked(job, concurrency), error=f"{type(error).__name__}: {error}")
        self.results.add(record)
        self.on_result(result, record)
        return not record.error


def record_of(
    result: SearchResult, job: Job, mode: Mode, concurrency: int, num_parameters: tuple[int, int] | None
) -> Record:
    """What is written down of one search.

    Args:
        result: Of the search, with all its candidates.
        job: What was searched.
        mode: How answers are compared.
        concurrency: Searches in flight, this one included.
        num_parameters: Of policy and verifier, None = the policy runs elsewhere.
    """
    kv, prm = result.kv, result.verifier_kv
    is_here = num_parameters is not None
    flops = None
    if num_parameters is not None:
        flops = 2.0 * (num_parameters[0] * result.timing.read_tokens + num_parameters[1] * result.verifier_tokens)
    return Record(
        **_asked(job, concurrency),
        outcomes={vote: _outcome(result, job.problem, vote, mode) for vote in job.method.votes},
        any_right=any(grade(job.problem, one.answer, mode=mode).lenient for one in result.candidates),
        mean_kv_tokens=kv.mean_tokens if kv else None,
        peak_kv_tokens=kv.peak_tokens if kv else None,
        kv_token_bytes=kv.bytes_per_token if kv and is_here else None,
        published_kv_tokens=kv.published_tokens if kv else None,
        sharing_ratio=kv.sharing_ratio if kv else None,
        mean_prm_kv_tokens=prm.mean_tokens if prm else None,
        peak_prm_kv_tokens=prm.peak_tokens if prm else None,
        prm_kv_token_bytes=prm.bytes_per_token if prm else None,
        generated_tokens=result.generated_tokens,
        verifier_tokens=result.verifier_tokens,
        prompt_tokens=result.prompt_tokens,
        model_calls=result.timing.decode_steps,
        flops=flops,
        wall_s=result.timing.wall_s,
        model_s=result.timing.policy_s + result.timing.verifier_s if is_here else 0.0,
        select_s=result.timing.select_s,
        bytes_moved=result.timing.bytes_moved,
    )


def _asked(job: Job, concurrency: int) -> dict[str, Any]:
    """What a record says of its search, whatever came out."""
    return {
        "problem": job.problem.id,
        "digest": job.problem.digest,
        "level": job.problem.level,
        "method": job.method.name,
        "seed": job.seed,
        "concurrency": concurrency,
    }


def _outcome(result: SearchResult, problem: EvalProblem, vote: Vote, mode: Mode) -> Outcome:
    as_searched = mode == "math" or problem.family
    winner = max(result.candidates if as_searched else _together(result.candidates, mode), key=RANK[vote], default=None)
    if winner is None:
        return Outcome(answer=None, strict=False, lenient=False, solved=False)
    found = grade(problem, winner.answer, "".join(step.text for step in winner.steps), mode)
    return Outcome(answer=winner.answer, **found._asdict())


def _together(candidates: Sequence[Candidate], mode: Mode) -> list[Candidate]:
    """Candidates whose answers are one, as a mode compares them, with all their votes; an illegible one is alone."""
    found: dict[Hashable, Candidate] = {}
    for one in candidates:
        read = key(one.answer, mode) or one.answer
        other = found.get(read, one)
        both = {} if other is one else {"votes": one.votes + other.votes, "weight": one.weight + other.weight}
        found[read] = max(other, one, key=lambda candidate: candidate.score).model_copy(update=both)
    return list(found.values())
