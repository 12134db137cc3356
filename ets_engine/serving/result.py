"""From a finished job to its result, with what its models were used for."""

from __future__ import annotations

import time

from ets_engine.models import PrmVerifier, VerifierUsage
from ets_engine.results import build_result, tree_kv
from ets_engine.search import SearchTree
from ets_engine.serving.job import Job
from ets_engine.types import KVStats, SearchResult, Timing


def finish_job(job: Job, tree: SearchTree, bytes_per_token: int, verifier_bytes_per_token: int) -> SearchResult:
    """The result of a job whose models' usage can still be read.

    Args:
        job: That came to its end.
        tree: What it found.
        bytes_per_token: KV of one token in the policy (bytes).
        verifier_bytes_per_token: The same in the PRM.
    """
    assert job.policy is not None
    usage, judged = job.policy.usage, job.judge.usage if isinstance(job.judge, PrmVerifier) else None
    return build_result(
        tree,
        job.config,
        job.view,
        problem=job.problem,
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
            bytes_per_token=bytes_per_token,
            unique_tokens=tree.prompt_tokens + job.policy.distinct_tokens,
        ),
        verifier_kv=_verifier_kv(judged, verifier_bytes_per_token) if judged else None,
        ended_early=job.ended_early,
        strategy=None if job.selector is None else type(job.selector).__name__,
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
