"""From a finished job to its result: votes, figures, and why it ended."""

from __future__ import annotations

import time

from ets_engine.models import PrmVerifier, VerifierUsage
from ets_engine.runtime import DecodeUsage
from ets_engine.search import SearchTree, Trajectory, effective_width, rank_answers, trajectories
from ets_engine.serving.job import Job
from ets_engine.types import FinishReason, KVStats, ScoredStep, SearchResult, StopReason, Timing


def build_result(job: Job, tree: SearchTree, bytes_per_token: int, verifier_bytes_per_token: int) -> SearchResult:
    """The result of a job whose models' usage can still be read.

    Args:
        job: That came to its end.
        tree: What it found.
        bytes_per_token: KV of one token in the policy (bytes).
        verifier_bytes_per_token: The same in the PRM.
    """
    assert job.policy is not None
    paths = trajectories(tree, job.config.reduce)
    answers = [job.view.answer(job.problem, path.text) for path in paths]
    candidates = rank_answers(paths, answers, job.view.same, job.config.vote)
    steps = candidates[0].steps if candidates else _best_steps(tree, paths)
    usage, judged = job.policy.usage, job.judge.usage if isinstance(job.judge, PrmVerifier) else None
    return SearchResult(
        problem=job.problem,
        text="".join(step.text for step in steps),
        answer=candidates[0].answer if candidates else None,
        score=candidates[0].score if candidates else max((path.score for path in paths), default=0.0),
        steps=steps,
        candidates=candidates[: job.config.n_candidates],
        finish_reason=_finish_reason(job, tree, bool(candidates)),
        prompt_tokens=tree.prompt_tokens,
        cached_prompt_tokens=usage.cached_prompt_tokens,
        generated_tokens=usage.generated_tokens,
        verifier_tokens=judged.tokens if judged else 0,
        path_tokens=sum(step.num_tokens for step in steps),
        trajectories=len(paths),
        num_errors=len(tree.stopped_by(StopReason.ERROR)),
        kv=_policy_kv(tree, usage, bytes_per_token),
        verifier_kv=_verifier_kv(judged, verifier_bytes_per_token) if judged else None,
        timing=Timing(
            wall_s=time.perf_counter() - job.began_s,
            policy_s=usage.busy_s,
            verifier_s=judged.busy_s if judged else 0.0,
            select_s=tree.select_s,
            bytes_moved=usage.bytes_moved + (judged.bytes_moved if judged else 0),
            decode_steps=usage.decode_steps,
        ),
        strategy=job.config.strategy if job.selector is None else type(job.selector).__name__,
        width=effective_width(job.config),
        seed=job.config.seed,
        trace=tree.trace() if job.config.trace else None,
    )


def _policy_kv(tree: SearchTree, usage: DecodeUsage, bytes_per_token: int) -> KVStats:
    return KVStats(
        peak_tokens=usage.peak_tokens,
        mean_tokens=usage.mean_tokens,
        bytes_per_token=bytes_per_token,
        unique_tokens=tree.unique_tokens,
        path_tokens=tree.path_tokens,
        published_tokens=tree.published_tokens,
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


def _best_steps(tree: SearchTree, paths: tuple[Trajectory, ...]) -> tuple[ScoredStep, ...]:
    """Steps to show where there is no answer: the best trajectory's, else the best other path's."""
    if paths:
        return max(paths, key=lambda path: path.score).steps
    leaf = max(tree.leaves, key=lambda node: (tree[node].step.stop is not StopReason.ERROR, tree[node].step_score))
    nodes = tree.path(leaf)[1:]
    return tuple(ScoredStep(text=n.step.text, score=n.step_score, num_tokens=n.step.num_tokens) for n in nodes)


def _finish_reason(job: Job, tree: SearchTree, answered: bool) -> FinishReason:
    if tree.stopped:
        return job.ended_early or "cancelled"
    if answered:
        return "stop"
    if tree.finished:
        return "no_answer"
    all_failed = not tree.frontier and not tree.stopped_by(StopReason.LENGTH)
    return "error" if all_failed else "length"
