"""From a search tree to the plain arrays that a selector sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ets_engine.protocols import Frontier
from ets_engine.search.tree import SearchTree

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def build_frontier(
    tree: SearchTree,
    leaves: Sequence[int],
    *,
    max_step_tokens: int = 0,
    embeddings: NDArray[np.floating] | None = None,
) -> Frontier:
    """The leaves and the tree above them, positions instead of ids.

    Args:
        tree: Read only.
        leaves: Ids of open leaves of one depth, at least one. Shape [L].
        max_step_tokens: Most tokens one child may add.
        embeddings: One vector per leaf, or None. Shape [L, D].

    Example:
        >>> from ets_engine.types import Step
        >>> tree = SearchTree(prompt_tokens=10)
        >>> tree.grow([1, 2, 3], [0, 0, 0], [Step("a", 5), Step("b", 6), Step("c", 7)], [0.1, 0.2, 0.3])
        >>> tree.grow([4, 5], [3, 3], [Step("d", 8), Step("e", 9)], [0.4, 0.5])
        >>> seen = build_frontier(tree, tree.frontier)
        >>> seen.parents, seen.num_tokens, seen.leaves, seen.subtrees
        ((-1, 0, 1, 1), (10, 7, 8, 9), (2, 3), (2, 2))
    """
    held = tree.union(leaves)
    places = {node: place for place, node in enumerate(held)}
    return Frontier(
        parents=(-1, *(places[tree[node].parent] for node in held[1:])),
        num_tokens=tuple(tree[node].step.num_tokens for node in held),
        leaves=tuple(places[leaf] for leaf in leaves),
        scores=tuple(tree[leaf].step_score for leaf in leaves),
        subtrees=tuple(tree.subtree(leaf) for leaf in leaves),
        depth=tree[leaves[0]].depth,
        max_step_tokens=max_step_tokens,
        embeddings=embeddings,
    )
