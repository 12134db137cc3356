"""The exact dynamic program for pruning under a hard KV budget without coverage: a knapsack on a tree."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ets_engine.search.problem import KeepProblem, preorder

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_CELLS = 4_000_000  # table entries up to which the program is exact


def solve_knapsack(problem: KeepProblem, *, max_cells: int = MAX_CELLS) -> tuple[int, ...] | None:
    """The best feasible set of leaves when clusters do not count.

    With the nodes in depth-first preorder, `D[k][b]` is the best value from position k on with b units left: either
    skip the subtree of k, or take k and go on with its first child. O(nodes * capacity), vectorised over b. A tree
    whose table would exceed `max_cells` is solved in coarser units, sizes rounded up: never over the capacity, but
    possibly below the optimum.

    Args:
        problem: With `sizes` and `capacity`, prices >= 0; clusters and `max_kept` are not looked at.
        max_cells: Largest table (count of entries) before units get coarser.

    Returns:
        Kept leaves in ascending order, or None when not even one path fits (in coarse units).

    Example:
        >>> toy = KeepProblem((-1, 0, 0), (1, 2), (0.6, 0.4), (0.0, 0.0, 0.0), sizes=(5, 9, 3), capacity=10)
        >>> solve_knapsack(toy)
        (1,)
    """
    if problem.capacity is None:
        raise ValueError("solve_knapsack needs a capacity; use solve() for a problem without one")
    count = len(problem.parents)
    unit = max(1, -(-count * (problem.capacity + 1) // max_cells))
    capacity = problem.capacity // unit
    order, ends = preorder(problem.parents)
    leaf_at = {node: leaf for leaf, node in enumerate(problem.leaves)}
    values = [(problem.rewards[leaf_at[node]] if node in leaf_at else 0.0) - problem.prices[node] for node in order]
    sizes = [-(-problem.sizes[node] // unit) for node in order]
    is_leaf = [node in leaf_at for node in order]

    free = _table(values, sizes, ends, capacity, np.zeros(capacity + 1))
    kept = _walk(is_leaf, sizes, ends, capacity, free, None)
    if not kept:  # nothing pays for itself, and yet one leaf must be kept
        forced = _table(values, sizes, ends, capacity, np.full(capacity + 1, -np.inf), is_leaf, free)
        if not np.isfinite(forced[0, capacity]):
            return None
        kept = _walk(is_leaf, sizes, ends, capacity, free, forced)
    return tuple(sorted(leaf_at[order[place]] for place in kept))


def _table(
    values: list[float],
    sizes: list[int],
    ends: list[int],
    capacity: int,
    last: NDArray[np.float64],
    is_leaf: list[bool] | None = None,
    free: NDArray[np.float64] | None = None,
) -> NDArray[np.float64]:
    """Best values by place and units left; given `free`, with at least one leaf from that place on."""
    table = np.empty((len(values) + 1, capacity + 1))  # [N + 1, capacity + 1]
    table[-1] = last
    for place in range(len(values) - 1, -1, -1):
        row = table[place]
        row[:] = table[ends[place]]
        size = sizes[place]
        if size <= capacity:
            below = free if free is not None and is_leaf is not None and is_leaf[place] else table
            np.maximum(row[size:], values[place] + below[place + 1, : capacity + 1 - size], out=row[size:])
    return table


def _walk(
    is_leaf: list[bool],
    sizes: list[int],
    ends: list[int],
    left: int,
    free: NDArray[np.float64],
    forced: NDArray[np.float64] | None,
) -> list[int]:
    """Places of the kept leaves, read off the table; ties skip."""
    kept: list[int] = []
    table = free if forced is None else forced
    place = 0
    while place < len(is_leaf):
        if table[place, left] > table[ends[place], left]:
            left -= sizes[place]
            if is_leaf[place]:
                kept.append(place)
                table = free
            place += 1
        else:
            place = ends[place]
    return kept
