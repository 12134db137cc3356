"""From step scores to a trajectory score, and from trajectories to answers; it knows no text format."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ets_engine.config import Reduce, Vote
from ets_engine.search.tree import SearchTree
from ets_engine.types import Candidate, ScoredStep


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A finished path.

    Attributes:
        leaf: Id of its last node.
        text: Its steps' texts, joined.
        score: Trajectory score in [0, 1].
        num_tokens: Tokens below the prompt.
        steps: Its steps, first to last.
    """

    leaf: int
    text: str
    score: float
    num_tokens: int
    steps: tuple[ScoredStep, ...]


def reduce_scores(step_scores: Sequence[float], reduce: Reduce) -> float:
    """One score for a path from the scores of its steps.

    Args:
        step_scores: In [0, 1], first step to last, at least one.
        reduce: "last", "min", "prod" or "mean".

    Raises:
        ValueError: There are no scores.

    Example:
        >>> [reduce_scores([0.5, 1.0, 0.75], how) for how in ("last", "min", "prod", "mean")]
        [0.75, 0.5, 0.375, 0.75]
    """
    if not step_scores:
        raise ValueError("step_scores is empty: a trajectory has at least one step")
    match reduce:
        case "last":
            return step_scores[-1]
        case "min":
            return min(step_scores)
        case "prod":
            return math.prod(step_scores)
        case "mean":
            return math.fsum(step_scores) / len(step_scores)


def trajectories(tree: SearchTree, reduce: Reduce) -> tuple[Trajectory, ...]:
    """Every finished path, earliest first; paths that failed or ran out of tokens are not among them.

    Example:
        >>> from ets_engine.types import Step, StopReason
        >>> tree = SearchTree(prompt_tokens=4)
        >>> steps = [Step("x=1", 3, StopReason.FINISHED), Step("x", 1, StopReason.LENGTH)]
        >>> tree.grow([1, 2], [0, 0], steps, [0.5, 0.0])
        >>> [(path.text, path.score) for path in trajectories(tree, "last")]
        [('x=1', 0.5)]
    """
    found: list[Trajectory] = []
    for leaf in tree.finished:
        nodes = tree.path(leaf)[1:]
        steps = tuple(
            ScoredStep(text=node.step.text, score=node.step_score, num_tokens=node.step.num_tokens) for node in nodes
        )
        score = reduce_scores([node.step_score for node in nodes], reduce)
        found.append(Trajectory(leaf, tree.text(leaf), score, tree.tokens_to(leaf) - tree.prompt_tokens, steps))
    return tuple(found)


def rank_answers(
    paths: Sequence[Trajectory], answers: Sequence[str | None], same: Callable[[str, str], bool], vote: Vote
) -> tuple[Candidate, ...]:
    """Distinct answers, best first.

    Each answer joins the first class whose first answer is the `same`, so that every trajectory votes once even where
    `same` is not transitive; None abstains. "best" ranks by best trajectory score, "majority" by votes, "weighted" by
    the sum of trajectory scores; ties go to the higher weight, then the higher best score, then the earliest.

    Args:
        paths: Finished trajectories, earliest first. Shape [T].
        answers: Their answers. Shape [T].
        same: Whether two answers are the same vote, as in `StepView.same`.
        vote: "best", "majority" or "weighted".

    Returns:
        One candidate per class; empty when all abstain.

    Example:
        >>> from operator import eq
        >>> paths = [Trajectory(leaf, "", score, 1, ()) for leaf, score in enumerate([0.9, 0.5, 0.5, 0.7])]
        >>> [(seen.answer, seen.votes) for seen in rank_answers(paths, ["7", "8", "8", None], eq, "majority")]
        [('8', 2), ('7', 1)]
        >>> rank_answers(paths, ["7", "8", "8", None], eq, "best")[0].answer
        '7'
    """
    classes: list[list[int]] = []  # places in `paths`, earliest first
    known: dict[str, list[int]] = {}  # each spelling seen, so that it is compared once
    for place, (_, answer) in enumerate(zip(paths, answers, strict=True)):
        if answer is None:
            continue
        members = known.get(answer)
        if members is None:
            members = next((seen for seen in classes if same(_answer(answers, seen[0]), answer)), None)
        if members is None:
            members = list[int]()
            classes.append(members)
        members.append(place)
        known[answer] = members
    candidates = [_candidate(paths, answers, members) for members in classes]
    return tuple(sorted(candidates, key=lambda candidate: _rank(candidate, vote), reverse=True))


def _answer(answers: Sequence[str | None], place: int) -> str:
    answer = answers[place]
    assert answer is not None  # classes hold no abstentions
    return answer


def _candidate(paths: Sequence[Trajectory], answers: Sequence[str | None], members: Sequence[int]) -> Candidate:
    best = max(members, key=lambda place: (paths[place].score, -place))
    return Candidate(
        answer=_answer(answers, best),
        votes=len(members),
        weight=math.fsum(paths[place].score for place in members),
        score=paths[best].score,
        steps=paths[best].steps,
    )


def _rank(candidate: Candidate, vote: Vote) -> tuple[float, float, float]:
    """Higher is better; equal ranks keep their order, earliest first."""
    match vote:
        case "best":
            return (candidate.score, candidate.weight, candidate.votes)
        case "majority":
            return (candidate.votes, candidate.weight, candidate.score)
        case "weighted":
            return (candidate.weight, candidate.votes, candidate.score)
