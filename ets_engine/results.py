"""From a search tree to its result: votes, the winner, and why it ended; it knows no model and no engine."""

from __future__ import annotations

from typing import Literal

from ets_engine.config import SearchConfig
from ets_engine.protocols import StepView
from ets_engine.search import SearchTree, Trajectory, effective_width, rank_answers, trajectories
from ets_engine.types import FinishReason, KVStats, ScoredStep, SearchResult, StopReason, Timing

EndedEarly = Literal["cancelled", "deadline"]


def build_result(
    tree: SearchTree,
    config: SearchConfig,
    view: StepView,
    *,
    problem: str,
    timing: Timing,
    generated_tokens: int,
    cached_prompt_tokens: int = 0,
    verifier_tokens: int = 0,
    kv: KVStats | None = None,
    verifier_kv: KVStats | None = None,
    ended_early: EndedEarly | None = None,
    strategy: str | None = None,
) -> SearchResult:
    """The result of a search.

    Args:
        tree: What it found.
        config: Its settings.
        view: How texts map to answers.
        problem: As verifiers read it.
        timing: Where the time went.
        generated_tokens: Over the whole tree (count).
        cached_prompt_tokens: Of the prompt's, those that need not be read (count).
        verifier_tokens: Read by the PRM (count).
        kv: Of the policy, None without.
        verifier_kv: Of the PRM, None without.
        ended_early: Why it was stopped, where it was.
        strategy: Name of a selector of the caller's own, None = the one that `config` names.
    """
    paths = trajectories(tree, config.reduce)
    candidates = rank_answers(paths, [view.answer(problem, path.text) for path in paths], view.same, config.vote)
    steps = candidates[0].steps if candidates else _best_steps(tree, paths)
    return SearchResult(
        problem=problem,
        text="".join(step.text for step in steps),
        answer=candidates[0].answer if candidates else None,
        score=candidates[0].score if candidates else max((path.score for path in paths), default=0.0),
        steps=steps,
        candidates=candidates[: config.n_candidates],
        finish_reason=_finish_reason(tree, ended_early, bool(candidates)),
        prompt_tokens=tree.prompt_tokens,
        cached_prompt_tokens=cached_prompt_tokens,
        generated_tokens=generated_tokens,
        verifier_tokens=verifier_tokens,
        path_tokens=sum(step.num_tokens for step in steps),
        trajectories=len(paths),
        num_errors=len(tree.stopped_by(StopReason.ERROR)),
        kv=kv,
        verifier_kv=verifier_kv,
        timing=timing,
        strategy=strategy or config.strategy,
        width=effective_width(config),
        seed=config.seed,
        trace=tree.trace() if config.trace else None,
    )


def tree_kv(
    tree: SearchTree, *, peak_tokens: int, mean_tokens: float, bytes_per_token: int, unique_tokens: int | None = None
) -> KVStats:
    """KV figures of the policy whose steps a tree holds; the arguments are as in `KVStats`.

    Without `unique_tokens`, no two steps of the tree share anything.
    """
    return KVStats(
        peak_tokens=peak_tokens,
        mean_tokens=mean_tokens,
        bytes_per_token=bytes_per_token,
        unique_tokens=tree.unique_tokens if unique_tokens is None else unique_tokens,
        path_tokens=tree.path_tokens,
        published_tokens=tree.published_tokens,
    )


def counted_kv(tree: SearchTree) -> KVStats:
    """KV figures of a policy that runs elsewhere, counted from the tree alone.

    They say what a cache would hold that keeps exactly the paths the search still needs: after each round, the distinct
    tokens on the paths to that round's nodes. The server's own cache decides what is really resident, how long pruned
    branches stay, and what a token takes: `bytes_per_token` is 0.

    Example:
        >>> from ets_engine.types import Step
        >>> tree = SearchTree(prompt_tokens=10)
        >>> tree.grow([1, 2], [0, 0], [Step("a", 5), Step("b", 3)], [0.5, 0.9])
        >>> tree.grow([3, 4], [2, 2], [Step("c", 4), Step("d", 4)], [0.5, 0.9])
        >>> found = counted_kv(tree)
        >>> found.peak_tokens, found.mean_tokens, found.unique_tokens, found.path_tokens
        (21, 19.5, 26, 49)
    """
    rounds: dict[int, list[int]] = {}
    for node in tree.nodes:
        rounds.setdefault(node.depth, []).append(node.id)
    resident = [tree.union_tokens(nodes) for depth, nodes in rounds.items() if depth] or [tree.prompt_tokens]
    return tree_kv(tree, peak_tokens=max(resident), mean_tokens=sum(resident) / len(resident), bytes_per_token=0)


def _best_steps(tree: SearchTree, paths: tuple[Trajectory, ...]) -> tuple[ScoredStep, ...]:
    """Steps to show where there is no answer: the best trajectory's, else the best other path's.

    Never a path that others were preferred to: what those have in common may have been shown already.
    """
    if paths:
        return max(paths, key=lambda path: path.score).steps
    nodes = tree.path(max(tree.contenders, key=lambda leaf: tree[leaf].step_score))[1:]
    return tuple(ScoredStep(text=n.step.text, score=n.step_score, num_tokens=n.step.num_tokens) for n in nodes)


def _finish_reason(tree: SearchTree, ended_early: EndedEarly | None, answered: bool) -> FinishReason:
    if tree.stopped:
        return ended_early or "cancelled"
    if answered:
        return "stop"
    if tree.finished:
        return "no_answer"
    all_failed = not tree.frontier and not tree.stopped_by(StopReason.LENGTH)
    return "error" if all_failed else "length"
