"""What a search says about itself beside its answer: figures and candidates, plain JSON, no trees."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from ets_engine.types import FinishReason, KVStats, SearchResult, Timing


class CandidateReport(BaseModel):
    """One distinct answer.

    Attributes:
        text: Its best trajectory.
        answer: The answer as that wrote it.
        score: Trajectory score, in [0, 1].
        votes: Trajectories that gave it (count).
        weight: Sum of their scores.
    """

    model_config = ConfigDict(frozen=True)

    text: str
    answer: str
    score: float
    votes: int
    weight: float


class SearchReport(BaseModel):
    """Figures of one search.

    Attributes:
        answer: The winner's, None when no trajectory gave one.
        score: The winner's trajectory score, in [0, 1].
        step_scores: The winner's, step by step.
        candidates: Distinct answers, best first.
        finish_reason: As in `SearchResult`.
        prompt_tokens, cached_prompt_tokens, generated_tokens, path_tokens, verifier_tokens: As there (counts).
        trajectories, num_errors: As there (counts).
        kv, verifier_kv: KV figures, None where nobody counted.
        timing: Where the time went.
        strategy, width, seed: What gives this result again.
        rewards: Of the completions, in their order, where a reward function was asked.
    """

    model_config = ConfigDict(frozen=True)

    answer: str | None
    score: float
    step_scores: tuple[float, ...]
    candidates: tuple[CandidateReport, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    cached_prompt_tokens: int
    generated_tokens: int
    path_tokens: int
    verifier_tokens: int
    trajectories: int
    num_errors: int
    kv: KVStats | None
    verifier_kv: KVStats | None
    timing: Timing
    strategy: str
    width: int
    seed: int
    rewards: tuple[float, ...] = ()


def describe(result: SearchResult) -> dict[str, Any]:
    """The report of a result, as JSON."""
    same = {name: getattr(result, name) for name in SearchReport.model_fields if hasattr(result, name)}
    candidates = tuple(
        CandidateReport(
            text="".join(step.text for step in one.steps),
            answer=one.answer,
            score=one.score,
            votes=one.votes,
            weight=one.weight,
        )
        for one in result.candidates
    )
    report = SearchReport(**same | {"candidates": candidates, "step_scores": tuple(s.score for s in result.steps)})
    return report.model_dump(mode="json", exclude={"rewards"})
