"""From a finished job to its result, with what its models were used for."""

from __future__ import annotations

import time
from dataclasses import dataclass

from ets_engine.models import PrmVerifier, VerifierUsage
from ets_engine.results import EndedEarly, build_result, tree_kv
from ets_engine.search import SearchTree
from ets_engine.serving.job import Job
from ets_engine.serving.scheduler import Models
from ets_engine.types import KVStats, SearchResult, Timing


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What a search came to before anybody looked for answers in it: plain values, so that it can leave its process.

    Attributes:
        tree: What was found.
        timing: Where the time went.
        generated_tokens, cached_prompt_tokens, verifier_tokens: As in `SearchResult` (count).
        kv, verifier_kv: Of the policy, and of the PRM where there is one.
        ended_early: Why it was stopped, where it was.
    """

    tree: SearchTree
    timing: Timing
    generated_tokens: int
    cached_prompt_tokens: int
    verifier_tokens: int
    kv: KVStats
    verifier_kv: KVStats | None
    ended_early: EndedEarly | None

    def to_result(self, job: Job) -> SearchResult:
        """The result for the caller who submitted the job."""
        assert job.view is not None
        return build_result(
            self.tree,
            job.config,
            job.view,
            problem=job.problem,
            timing=self.timing,
            generated_tokens=self.generated_tokens,
            cached_prompt_tokens=self.cached_prompt_tokens,
            verifier_tokens=self.verifier_tokens,
            kv=self.kv,
            verifier_kv=self.verifier_kv,
            ended_early=self.ended_early,
            strategy=None if job.selector is None else type(job.selector).__name__,
        )


def measure_job(job: Job, tree: SearchTree, models: Models) -> Outcome:
    """The outcome of a job whose models' usage can still be read.

    Args:
        job: That came to its end.
        tree: What it found.
        models: What it ran on.
    """
    assert job.policy is not None
    usage, judged = job.policy.usage, job.judge.usage if isinstance(job.judge, PrmVerifier) else None
    return Outcome(
        tree,
        timing=Timing(
            wall_s=time.perf_counter() - job.began_s,
            policy_s=usage.busy_s,
            verifier_s=judged.busy_s if judged else 0.0,
            select_s=tree.select_s,
            bytes_moved=usage.bytes_moved + (judged.bytes_moved if judged else 0),
            decode_steps=usage.decode_steps,
            read_tokens=usage.read_tokens,
        ),
        generated_tokens=usage.generated_tokens,
        cached_prompt_tokens=usage.cached_prompt_tokens,
        verifier_tokens=judged.tokens if judged else 0,
        kv=tree_kv(
            tree,
            peak_tokens=usage.peak_tokens,
            mean_tokens=usage.mean_tokens,
            bytes_per_token=models.decoder.runner.bytes_per_token,
            unique_tokens=tree.prompt_tokens + job.policy.distinct_tokens,
        ),
        verifier_kv=_verifier_kv(judged, models.runners[-1].bytes_per_token) if judged else None,
        ended_early=job.ended_early,
    )


def _verifier_kv(usage: VerifierUsage, bytes_per_token: int) -> KVStats:
    return KVStats(
        peak_tokens=usage.peak_tokens,
        mean_tokens=usage.mean_tokens,
        bytes_per_token=bytes_per_token,
        unique_tokens=usage.tokens,
        path_tokens=usage.path_tokens,
        published_tokens=None,
    )
