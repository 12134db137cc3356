"""Solvers of the pruning problem: an exact tree program, the integer program (HiGHS), and a greedy fallback."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
from scipy.optimize import Bounds, milp  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]
from scipy.sparse import csr_array  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]

from ets_engine.search.coverage import coverage_cells, solve_coverage
from ets_engine.search.knapsack import solve_knapsack
from ets_engine.search.presolve import presolve
from ets_engine.search.problem import KeepProblem

_TIE = 1e-12  # gains below this are rounding noise: the node is not worth its KV
_MAX_CELLS = 1_000_000  # table entries up to which the program over clusters beats HiGHS
_NODE_LIMIT = 1_000  # tight budgets at width 256 take about ten
_OBJECTIVE_SCALE = 1e4  # HiGHS stops at an absolute gap of 1e-6; this puts it at 1e-10 of our objective


def solve(problem: KeepProblem) -> tuple[int, ...]:
    """The leaves to keep, in ascending order; among equal optima a smaller set.

    Exact by dynamic programming when clusters do not count, by HiGHS when they do or when `max_kept` binds. Two limits
    to that: a capacity so large that its table would exceed `knapsack.MAX_CELLS` is solved in coarser units, and HiGHS
    stops at its node limit with the best set found. Capacity and count hold in every case.

    Args:
        problem: At least one leaf's path must fit the capacity, if there is one.

    Returns:
        Positions in `problem.leaves`, at least one.

    Raises:
        ValueError: No path fits the capacity.

    Example:
        >>> solve(KeepProblem((-1, 0, 0), (1, 2), (0.75, 0.25), (0.25, 0.25, 0.5)))
        (0,)
    """
    if problem.capacity is not None and not any(problem.feasible([leaf]) for leaf in range(len(problem.leaves))):
        raise ValueError(f"no leaf fits the capacity of {problem.capacity}; raise the capacity")
    coverage_counts = problem.cluster_worth > 0 and bool(problem.clusters)
    unlimited = replace(problem, max_kept=None, capacity=None)
    if not coverage_counts:
        kept = solve_tree(unlimited)
    else:
        kept = solve_reduced(unlimited) if min(problem.prices) >= 0 else solve_milp(unlimited)
    if kept is not None and problem.feasible(kept):
        return kept  # no limit binds
    if not coverage_counts and problem.capacity is not None:
        kept = solve_knapsack(problem)
        if kept is not None and problem.feasible(kept):
            return kept  # it looks at the capacity only
    return solve_milp(problem) or solve_greedy(problem)


def solve_tree(problem: KeepProblem) -> tuple[int, ...]:
    """The exact optimum without coverage and capacity, in one pass up the tree: O(nodes).

    The best worth of a subtree with at least one leaf kept is its price off the sum of its children's positive
    worths, or off the largest one when none is positive.

    Example:
        >>> solve_tree(KeepProblem((-1, 0, 0), (1, 2), (0.5, 0.5), (0.1, 0.2, 0.6)))
        (0,)
    """
    count = len(problem.parents)
    gains = [0.0] * count  # a leaf's reward; the sum of a branch's positive children
    best = [-math.inf] * count  # the largest worth among the children, and whose it is
    best_child = [-1] * count
    worths = [0.0] * count
    for leaf, node in enumerate(problem.leaves):
        gains[node], best[node] = problem.rewards[leaf], math.inf
    for node in range(count - 1, 0, -1):
        worth = worths[node] = (gains[node] if best[node] > _TIE else best[node]) - problem.prices[node]
        parent = problem.parents[node]
        if worth > _TIE:
            gains[parent] += worth
        if worth >= best[parent]:  # nodes come in descending order: the first of equals wins
            best[parent], best_child[parent] = worth, node
    taken = [True] * count
    for node in range(1, count):
        parent = problem.parents[node]
        taken[node] = taken[parent] and (worths[node] > _TIE or best_child[parent] == node)
    return tuple(leaf for leaf, node in enumerate(problem.leaves) if taken[node])


def solve_reduced(problem: KeepProblem) -> tuple[int, ...] | None:
    """Decide what can be decided without search; a small rest goes to the program over clusters, a large one to HiGHS.

    Returns:
        Kept leaves in ascending order, or None when HiGHS was needed and failed.

    Example:
        >>> toy = KeepProblem((-1, 0, 0), (1, 2), (0.75, 0.25), (0.25, 0.25, 0.5), clusters=(0, 1), cluster_worth=0.5)
        >>> solve_reduced(toy)
        (0, 1)
    """
    gaining = _best_gaining(problem)
    return None if gaining is None else drop_idle(problem, gaining or _least_evil(problem))


def _best_gaining(problem: KeepProblem) -> tuple[int, ...] | None:
    """The best set of leaves if the root were paid for, empty when none gains then, None when HiGHS failed."""
    reduced = presolve(problem)
    if reduced.rest is None:
        return reduced.kept
    small = coverage_cells(reduced.rest) <= _MAX_CELLS
    found = solve_coverage(reduced.rest) if small else solve_milp(reduced.rest)
    if found is None:
        return None
    return tuple(sorted({*reduced.kept, *(reduced.names[leaf] for leaf in found if reduced.names[leaf] >= 0)}))


def _least_evil(problem: KeepProblem) -> tuple[int, ...]:
    """The best set when none gains, without a program over all leaves.

    Leaves below several children of the root are worth no more together than apart, for clusters count once. Apart
    none of them gains, so the best lies below one child; its price paid, the same holds there.
    """
    options: list[tuple[int, ...]] = []
    left = [(list(range(len(problem.leaves))), problem)]
    while left:
        names, above = left.pop()
        for child in [node for node, parent in enumerate(above.parents) if parent == 0]:
            while above.parents.count(child) == 1:  # whatever is kept below pays for all of a chain
                child = above.parents.index(child)
            leaves, below = above.below(child)
            own = [names[leaf] for leaf in leaves]
            if gaining := _best_gaining(below):
                options.append(tuple(own[leaf] for leaf in gaining))
            else:
                left.append((own, below))
    return max(options, key=problem.objective)


def solve_milp(problem: KeepProblem) -> tuple[int, ...] | None:
    """The integer program by HiGHS: binary leaves; branches and clusters are integral on their own.

    Columns are the leaves x, the branches y below the root, and the clusters z; a node needs its parent
    (`x_i <= y_parent`, `y_j <= y_parent`), a cluster a kept leaf (`z_k <= sum of its x`), and one leaf is kept.

    Returns:
        Kept leaves in ascending order, or None when HiGHS finds no feasible solution within its node limit.

    Example:
        >>> toy = KeepProblem((-1, 0, 0), (1, 2), (0.75, 0.25), (0.25, 0.25, 0.5), clusters=(0, 1), cluster_worth=0.5)
        >>> solve_milp(toy)
        (0, 1)
    """
    num_leaves, num_nodes = len(problem.leaves), len(problem.parents)
    if num_nodes == 1:
        return (0,)
    parents = np.asarray(problem.parents)  # [N]
    leaves = np.asarray(problem.leaves)  # [L]
    columns = np.full(num_nodes, -1)  # [N] variable of each node, -1 for the root
    columns[leaves] = np.arange(num_leaves)
    branches = np.flatnonzero(columns < 0)[1:]  # [B] without the root
    columns[branches] = num_leaves + np.arange(len(branches))
    clusters = np.asarray(problem.clusters, dtype=np.intp)  # [L] or [0]
    clustered = np.flatnonzero(clusters >= 0)  # leaves that cover something
    num_clusters = 1 + int(clusters.max(initial=-1))
    first_cluster = num_leaves + len(branches)
    num_columns = first_cluster + num_clusters

    prices = np.asarray(problem.prices, dtype=np.float64)  # [N]
    worth = np.full(num_columns, problem.cluster_worth)
    worth[:num_leaves] = np.asarray(problem.rewards) - prices[leaves]
    worth[num_leaves:first_cluster] = -prices[branches]

    chained = np.flatnonzero(parents > 0)  # nodes whose parent is a branch
    rows = np.arange(len(chained))
    entries = [
        (rows, columns[chained], np.ones(len(chained))),
        (rows, columns[parents[chained]], -np.ones(len(chained))),
    ]
    upper = [np.zeros(len(chained) + num_clusters)]
    if num_clusters:
        names = len(chained) + np.arange(num_clusters)
        entries.append((names, first_cluster + np.arange(num_clusters), np.ones(num_clusters)))
        entries.append((len(chained) + clusters[clustered], clustered, -np.ones(len(clustered))))
    next_row = len(chained) + num_clusters
    entries.append((np.full(num_leaves, next_row), np.arange(num_leaves), np.ones(num_leaves)))
    upper.append(np.array([problem.max_kept or num_leaves]))
    lower = np.full(next_row + 1, -np.inf)
    lower[next_row] = 1.0
    if problem.capacity is not None:
        sizes = np.asarray(problem.sizes, dtype=np.float64)  # [N]
        entries.append((np.full(num_nodes - 1, next_row + 1), columns[1:], sizes[1:]))
        upper.append(np.array([problem.capacity - sizes[0]]))
        lower = np.append(lower, -np.inf)
    row, column, value = (np.concatenate(part) for part in zip(*entries, strict=True))
    matrix = csr_array((value, (row, column)), shape=(len(lower), num_columns))
    integrality = np.zeros(num_columns)
    integrality[:num_leaves] = 1
    if problem.capacity is not None:
        integrality[:] = 1  # a knapsack row makes the program hard: to branch on whole subtrees halves its time
    found = cast(
        "Any",
        milp(
            -_OBJECTIVE_SCALE * worth,
            integrality=integrality,
            bounds=Bounds(0.0, 1.0),
            constraints=(matrix, lower, np.concatenate(upper)),
            options={"mip_rel_gap": 0.0, "node_limit": _NODE_LIMIT},
        ),
    )
    if found.x is None:
        return None
    kept = tuple(int(leaf) for leaf in np.flatnonzero(found.x[:num_leaves] > 0.5))
    return drop_idle(problem, kept) if problem.feasible(kept) else None


def solve_greedy(problem: KeepProblem) -> tuple[int, ...]:
    """Add the leaf with the best gain until none gains; the fallback when HiGHS gives nothing. O(leaves^2 * depth).

    Example:
        >>> toy = KeepProblem((-1, 0, 0), (1, 2), (0.75, 0.25), (0.25, 0.25, 0.5), clusters=(0, 1), cluster_worth=0.5)
        >>> solve_greedy(toy)
        (0, 1)
    """
    chosen = _Kept(problem)
    rest = list(range(len(problem.leaves)))
    while rest and len(chosen.leaves) < (problem.max_kept or len(problem.leaves)):
        gain, leaf = max((chosen.gain(leaf), -leaf) for leaf in rest)
        leaf = -leaf
        if chosen.leaves and gain <= _TIE:
            break
        rest.remove(leaf)
        if chosen.fits(leaf):
            chosen.add(leaf)
    return drop_idle(problem, tuple(sorted(chosen.leaves)))


def drop_idle(problem: KeepProblem, kept: Sequence[int]) -> tuple[int, ...]:
    """Drop kept leaves that add nothing to the objective, lowest reward first: equal value, less KV.

    Example:
        >>> toy = KeepProblem((-1, 0, 0), (1, 2), (1.0, 0.0), (0.0, 0.0, 0.0))
        >>> drop_idle(toy, (0, 1))
        (0,)
    """
    chosen = _Kept(problem)
    for leaf in kept:
        chosen.add(leaf)
    for leaf in sorted(kept, key=lambda leaf: (problem.rewards[leaf], -leaf)):
        if len(chosen.leaves) > 1:
            chosen.remove(leaf)
            if chosen.gain(leaf) > _TIE:
                chosen.add(leaf)
    return tuple(sorted(chosen.leaves))


class _Kept:
    """A set of kept leaves that knows what one more would gain."""

    def __init__(self, problem: KeepProblem) -> None:
        self.leaves: set[int] = set()
        self._problem = problem
        self._below: Counter[int] = Counter()  # kept leaves below each node
        self._covering: Counter[int] = Counter()  # kept leaves of each cluster

    def gain(self, leaf: int) -> float:
        """What adding this leaf changes in the objective."""
        problem = self._problem
        gain = problem.rewards[leaf]
        node = problem.leaves[leaf]
        while node >= 0 and not self._below[node]:
            gain -= problem.prices[node]
            node = problem.parents[node]
        if problem.clusters and problem.clusters[leaf] >= 0 and not self._covering[problem.clusters[leaf]]:
            gain += problem.cluster_worth
        return gain

    def fits(self, leaf: int) -> bool:
        """Whether this leaf's path fits the capacity beside what is kept."""
        problem = self._problem
        if problem.capacity is None:
            return True
        extra = sum(problem.sizes[node] for node in problem.path(leaf) if not self._below[node])
        return problem.size(self.leaves) + extra <= problem.capacity

    def add(self, leaf: int) -> None:
        self._count(leaf, 1)
        self.leaves.add(leaf)

    def remove(self, leaf: int) -> None:
        self._count(leaf, -1)
        self.leaves.discard(leaf)

    def _count(self, leaf: int, change: int) -> None:
        for node in self._problem.path(leaf):
            self._below[node] += change
        if self._problem.clusters:
            self._covering[self._problem.clusters[leaf]] += change
