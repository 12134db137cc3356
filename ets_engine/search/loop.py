"""The only search loop, sans-IO: it yields requests and is sent their results; every method is another selector."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Any

from ets_engine.config import SearchConfig
from ets_engine.errors import ContextLengthError
from ets_engine.protocols import Selection, Selector
from ets_engine.search.build import build_selector, effective_width
from ets_engine.search.checks import check_embeddings, check_prompt_tokens, check_scores, check_selection, check_steps
from ets_engine.search.frontier import build_frontier
from ets_engine.search.requests import Embed, Expand, Progress, Request, Retain, Score, Start, StopSearch
from ets_engine.search.tree import SearchTree
from ets_engine.types import LeafVerdict, SearchEvent, Step, StopReason

Clock = Callable[[], float]


def search(
    config: SearchConfig, selector: Selector | None = None, *, clock: Clock | None = None
) -> Generator[Request, Any, SearchTree]:
    """Grow one search tree, depth by depth: select, retain, expand, score.

    The root gets the whole width. From then on a trajectory that finished, ran out of tokens or failed keeps its place
    in the width; the rest is open and split over the frontier by the selector. The search ends when no leaf is open,
    no width is open, the selector keeps nothing, or a hard KV budget has no room for one more step.

    Throwing `StopSearch` into the generator at any request ends it with the tree so far (`tree.stopped`).

    Args:
        config: Width and limits; the rest is for the selector and the models.
        selector: Which leaves get how many children, None = the one that `config` names.
        clock: Seconds as a number, to measure the selector; None measures nothing.

    Returns:
        The finished tree, as the generator's return value.

    Raises:
        ProtocolError: A policy, verifier, embedder or selector broke its contract.
        ContextLengthError: The prompt and one step do not fit the KV budget.
        ConfigError: `config` contradicts itself.

    Example:
        >>> searching = search(SearchConfig(strategy="rebase", width=2, max_steps=1))
        >>> next(searching)
        Start()
        >>> searching.send(30).event.kind  # the prompt has 30 tokens
        'start'
        >>> searching.send(None)
        Retain(leaves=(0,))
        >>> searching.send(None)
        Expand(parents=(0, 0), children=(1, 2))
    """
    chosen = build_selector(config) if selector is None else selector
    tree: SearchTree | None = None
    try:
        tree = SearchTree(check_prompt_tokens((yield Start())))
        yield from _grow(tree, config, chosen, clock)
    except StopSearch:
        tree = SearchTree(0) if tree is None else tree
        tree.stopped = True
    ended = Progress(_event(tree, "end", ()))
    try:
        yield ended
    except StopSearch:  # too late to stop anything
        yield ended
    return tree


def _grow(
    tree: SearchTree, config: SearchConfig, selector: Selector, clock: Clock | None
) -> Generator[Request, Any, None]:
    width = effective_width(config)
    yield Progress(_event(tree, "start", tree.frontier))
    while True:
        leaves, open_width = tree.frontier, width - len(tree.closed)
        shares = (0,) * len(leaves)
        if leaves and open_width > 0:
            shares = yield from _select(tree, leaves, open_width, config, selector, clock)
        kept = tuple(leaf for leaf, share in zip(leaves, shares, strict=True) if share)
        if tree.depth > 0:
            yield Progress(_event(tree, "step", kept))
        if not kept:
            return
        yield Retain(kept)
        parents = tuple(leaf for leaf, share in zip(leaves, shares, strict=True) for _ in range(share))
        children = tuple(range(len(tree), len(tree) + len(parents)))
        steps = check_steps((yield Expand(parents, children)), children)
        steps = [_close(step, tree, parent, config) for step, parent in zip(steps, parents, strict=True)]
        steps, scores = yield from _score(children, parents, steps)
        tree.grow(children, parents, steps, scores)


def _select(
    tree: SearchTree,
    leaves: tuple[int, ...],
    open_width: int,
    config: SearchConfig,
    selector: Selector,
    clock: Clock | None,
) -> Generator[Request, Any, tuple[int, ...]]:
    """Ask the selector, hold it to its contract, and record what it said."""
    embeddings = None
    if selector.needs_embeddings and len(leaves) > 1:
        texts = tuple(tree[leaf].step.text for leaf in leaves)
        embeddings = check_embeddings((yield Embed(leaves, texts)), leaves)
    left_tokens = config.max_tokens + tree.prompt_tokens - min(map(tree.tokens_to, leaves))
    step_tokens = min(config.max_step_tokens, left_tokens)
    frontier = build_frontier(tree, leaves, max_step_tokens=step_tokens, embeddings=embeddings)
    started_s = clock() if clock else 0.0
    try:
        selection = selector.select(frontier, open_width)
    except ContextLengthError:
        if frontier.depth == 0:
            raise
        selection = Selection((0,) * len(leaves))  # the budget is used up: what has finished so far votes
    tree.select_s += clock() - started_s if clock else 0.0
    shares = check_selection(selection, len(leaves), open_width)
    verdicts = selection.verdicts or (LeafVerdict(node=0, share=0),) * len(leaves)
    decided = zip(leaves, shares, verdicts, strict=True)
    tree.record(leaves, [verdict.model_copy(update={"node": leaf, "share": share}) for leaf, share, verdict in decided])
    return shares


def _close(step: Step, tree: SearchTree, parent: int, config: SearchConfig) -> Step:
    """The step, out of tokens where it would be too long or too deep to go on."""
    if step.stop is not StopReason.BOUNDARY:
        return step
    spent_tokens = tree.tokens_to(parent) - tree.prompt_tokens + step.num_tokens
    if spent_tokens >= config.max_tokens or tree[parent].depth + 1 >= config.max_steps:
        return replace(step, stop=StopReason.LENGTH)
    return step


def _score(
    children: Sequence[int], parents: Sequence[int], steps: list[Step]
) -> Generator[Request, Any, tuple[list[Step], list[float]]]:
    """Score the steps that go on or vote; the others get 0.0, and one that cannot be scored has failed."""
    steps = list(steps)
    scores = [0.0] * len(steps)
    asked = [place for place, step in enumerate(steps) if step.stop in (StopReason.BOUNDARY, StopReason.FINISHED)]
    if asked:
        nodes = tuple(children[place] for place in asked)
        request = Score(nodes, tuple(parents[place] for place in asked), tuple(steps[place].text for place in asked))
        for place, score in zip(asked, check_scores((yield request), nodes), strict=True):
            if score is None:
                steps[place] = replace(steps[place], stop=StopReason.ERROR, error="the verifier could not score it")
            else:
                scores[place] = score
    return steps, scores


def _event(tree: SearchTree, kind: str, kept: tuple[int, ...]) -> SearchEvent:
    """Progress after a selection, for the leaves that go on."""
    open_leaves = tree.frontier
    scored = open_leaves or tree.finished
    return SearchEvent.model_validate(
        {
            "kind": kind,
            "depth": tree.depth,
            "frontier": len(open_leaves),
            "kept": len(kept),
            "pruned": len(open_leaves) - len(kept),
            "finished": len(tree.finished),
            "best_score": max((tree[leaf].step_score for leaf in scored), default=0.0),
            "kv_unique_tokens": tree.union_tokens(kept),
            "kv_path_tokens": sum(tree.tokens_to(leaf) for leaf in kept),
            "generated_tokens": tree.generated_tokens,
            "common_text": tree.common_text(tree.contenders),
        }
    )
