"""The exact dynamic program for pruning with coverage when few clusters count: its state is the set covered so far."""

from __future__ import annotations

import numpy as np

from ets_engine.search.problem import KeepProblem, preorder


def coverage_cells(problem: KeepProblem) -> int:
    """Entries of the table that `solve_coverage` fills: nodes times sets of clusters."""
    return (len(problem.parents) + 1) << (1 + max(problem.clusters, default=-1))


def solve_coverage(problem: KeepProblem) -> tuple[int, ...]:
    """The best set of leaves, the empty one included. O(nodes * 2^clusters), vectorised over sets of clusters.

    With the nodes in depth-first preorder, `D[k][s]` is the best value from position k on when the clusters s are
    covered already: either skip the subtree of k, or take k and go on with its first child.

    Args:
        problem: Without capacity and `max_kept`.

    Returns:
        Kept leaves in ascending order; empty when nothing gains.

    Example:
        >>> solve_coverage(KeepProblem((-1, 0, 0), (1, 2), (0.1, 0.2), (0.0, 0.3, 0.3), (0, 0), 0.5))
        (1,)
    """
    num_clusters = 1 + max(problem.clusters, default=-1)
    order, ends = preorder(problem.parents)
    leaf_at = {node: leaf for leaf, node in enumerate(problem.leaves)}
    sets = np.arange(1 << num_clusters)  # [S]
    table = np.zeros((len(order) + 1, len(sets)))  # [N + 1, S]
    for place in range(len(order) - 1, -1, -1):
        node, row = order[place], table[place]
        np.subtract(table[place + 1], problem.prices[node], out=row)
        leaf = leaf_at.get(node)
        if leaf is not None:
            cluster = problem.clusters[leaf]
            if cluster >= 0:
                with_it = sets | (1 << cluster)
                row += (table[place + 1][with_it] - table[place + 1]) + problem.cluster_worth * (with_it != sets)
            row += problem.rewards[leaf]
        if node != 0:
            np.maximum(row, table[ends[place]], out=row)
    kept: list[int] = []
    covered, place = 0, 0
    while place < len(order):
        leaf = leaf_at.get(order[place])
        if order[place] != 0 and table[place, covered] <= table[ends[place], covered]:
            place = ends[place]
            continue
        if leaf is not None:
            kept.append(leaf)
            covered |= 1 << problem.clusters[leaf] if problem.clusters[leaf] >= 0 else 0
        place += 1
    return tuple(sorted(kept))
