"""What a selector says of each leaf explains what it did, and the published ceiling can be set against our floor."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ets_engine.config import SearchConfig
from ets_engine.protocols import Frontier
from ets_engine.search import Ets, build_selector
from ets_engine.types import LeafVerdict


def frontier(seed: int, leaves: int = 12) -> Frontier:
    """A random tree of two levels above its leaves, with clustered embeddings."""
    rng = np.random.default_rng(seed)
    parents = [-1, *([0] * 4), *rng.integers(1, 5, 6).tolist(), *rng.integers(5, 11, leaves).tolist()]
    found = Frontier(
        parents=tuple(parents),
        num_tokens=tuple(rng.integers(3, 30, len(parents)).tolist()),
        leaves=tuple(range(11, 11 + leaves)),
        scores=tuple(rng.uniform(0, 1, leaves).tolist()),
        subtrees=(0,) * leaves,
        depth=3,
        embeddings=np.eye(5)[rng.integers(0, 5, leaves)],
    )
    return _without_barren(found)


def _without_barren(found: Frontier) -> Frontier:
    """Without inner nodes that have no leaf: a frontier holds none."""
    above = set(found.leaves)
    for node in range(len(found.parents) - 1, 0, -1):
        if node in above:
            above.add(found.parents[node])
    place = {node: i for i, node in enumerate(sorted(above))}
    return replace(
        found,
        parents=tuple(place.get(found.parents[node], -1) for node in sorted(above)),
        num_tokens=tuple(found.num_tokens[node] for node in sorted(above)),
        leaves=tuple(place[leaf] for leaf in found.leaves),
    )


@pytest.mark.parametrize("lambda_d", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(20))
def test_no_kept_leaf_loses_and_no_pruned_one_would_gain(seed: int, lambda_d: float) -> None:
    verdicts = Ets(lambda_d=lambda_d).select(frontier(seed), open_width=16).verdicts
    kept = [one for one in verdicts if one.share]
    assert all(one.path_cost is not None and (one.coverage is None) == (lambda_d == 0) for one in verdicts)
    assert all(one.gain <= 1e-9 for one in verdicts if not one.share)
    assert len(kept) == 1 or all(one.gain >= -1e-9 for one in kept)


def test_the_terms_of_a_leaf_are_what_keeping_it_changes() -> None:
    leaves = frontier(3)
    selector = Ets()
    problem = selector.problem(leaves, 16)
    verdicts = selector.select(leaves, 16).verdicts
    kept = {leaf for leaf, one in enumerate(verdicts) if one.share}
    assert 1 < len(kept) < len(verdicts)
    for leaf, one in enumerate(verdicts):
        rest = kept - {leaf}
        assert one.gain == pytest.approx(problem.objective(rest | {leaf}) - problem.objective(rest))


def test_a_selector_without_prices_names_none() -> None:
    verdicts = build_selector(SearchConfig(strategy="rebase")).select(frontier(1), 16).verdicts
    assert {(one.path_cost, one.coverage, one.starved) for one in verdicts} == {(None, None, False)}
    old = LeafVerdict.model_validate({"node": 1, "share": 0, "reward": 0.5, "node_cost": 0.1, "cluster": 2})
    assert old.path_cost is None, "a trace of earlier says nothing of it"


def test_the_ceiling_starves_leaves_that_the_floor_feeds() -> None:
    """The same leaves are kept: only the split of the width differs."""
    leaves = replace(frontier(0), scores=(0.95, *(0.55, 0.5, 0.45) * 3, 0.4, 0.3))
    floor, ceiling = (
        build_selector(SearchConfig(strategy="ets", lambda_b=0.0, lambda_d=4.0, allocation=allocation))
        for allocation in ("floor_one", "ceil")
    )
    fed, starved = (selector.select(leaves, open_width=16).verdicts for selector in (floor, ceiling))
    kept = [one.share > 0 for one in fed]
    assert kept == [one.share > 0 or one.starved for one in starved]
    assert sum(one.starved for one in starved) >= 1 and not any(one.starved for one in fed)
    assert sum(one.share for one in fed) == sum(one.share for one in starved) == 16
    assert [one.path_cost for one in fed] == [one.path_cost for one in starved], "all else is the same"
