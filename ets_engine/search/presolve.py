"""What can be decided about a pruning problem with coverage without search, exactly; the rest is a smaller problem."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from ets_engine.search.problem import KeepProblem

_TIE = 1e-12


@dataclass(frozen=True, slots=True)
class Reduced:
    """A problem partly decided.

    Attributes:
        kept: Leaves that some optimum keeps. Shape [F].
        rest: What is still open, None when nothing is.
        names: Leaf of the original problem behind each leaf of `rest`, -1 for a stand-in. Shape [R].
    """

    kept: tuple[int, ...]
    rest: KeepProblem | None
    names: tuple[int, ...] = ()


def presolve(problem: KeepProblem) -> Reduced:
    """Fix what pays for itself, drop what never can, and repeat while that covers clusters.

    Given that its parent is kept, a node whose subtree gains without any coverage is kept by every optimum; one whose
    subtree loses even if each of its leaves covered a cluster of its own is kept by none. A kept leaf covers its
    cluster, so that the others of the cluster lose that worth; a cluster with one leaf left is part of its reward.

    Args:
        problem: With clusters, without capacity and `max_kept`, prices >= 0.

    Returns:
        The decided leaves and the open rest. Where nothing gains both are empty, or the best of `rest` is its stand-in.

    Example:
        >>> toy = KeepProblem((-1, 0, 0), (1, 2), (0.75, 0.25), (0.25, 0.25, 0.5), clusters=(0, 1), cluster_worth=0.5)
        >>> presolve(toy)
        Reduced(kept=(0, 1), rest=None, names=())
    """
    return _Presolve(problem).run()


class _Presolve:
    """The state of one presolve: what is fixed, what is dropped, and what each leaf is still worth."""

    def __init__(self, problem: KeepProblem) -> None:
        self._problem = problem
        self._rewards = list(problem.rewards)
        self._clusters = list(problem.clusters)
        self._leaf_at = {node: leaf for leaf, node in enumerate(problem.leaves)}
        count = len(problem.parents)
        self._fixed = [False] * count
        self._fixed[0] = True
        self._alive = [True] * count

    def run(self) -> Reduced:
        while self._fold_clusters() | self._decide():
            pass
        kept = tuple(leaf for leaf, node in enumerate(self._problem.leaves) if self._fixed[node])
        rest = [leaf for leaf, node in enumerate(self._problem.leaves) if self._alive[node] and not self._fixed[node]]
        return self._remainder(kept, rest) if rest else Reduced(kept, None)

    def _fold_clusters(self) -> bool:
        """Settle clusters that are covered or have one leaf left; whether any was."""
        problem = self._problem
        covered: set[int] = set()
        options: Counter[int] = Counter()
        for leaf, node in enumerate(problem.leaves):
            if self._fixed[node]:
                covered.add(self._clusters[leaf])
            elif self._alive[node]:
                options[self._clusters[leaf]] += 1
        changed = False
        for leaf, node in enumerate(problem.leaves):
            cluster = self._clusters[leaf]
            if cluster < 0 or not self._alive[node]:
                continue
            if cluster in covered:
                self._clusters[leaf] = -1
                changed = True
            elif options[cluster] == 1:
                self._clusters[leaf] = -1
                self._rewards[leaf] += problem.cluster_worth
                changed = True
        return changed

    def _decide(self) -> bool:
        """Fix and drop nodes by what their subtrees are worth at least and at most; whether any was."""
        problem, count = self._problem, len(self._problem.parents)
        least, most = [0.0] * count, [0.0] * count  # the children's gains, then the subtree's worth
        for node in range(count - 1, 0, -1):
            if not self._alive[node]:
                continue
            leaf = self._leaf_at.get(node)
            if leaf is not None:
                least[node] = self._rewards[leaf]
                most[node] = least[node] + (problem.cluster_worth if self._clusters[leaf] >= 0 else 0.0)
            least[node] -= problem.prices[node]
            most[node] -= problem.prices[node]
            least[problem.parents[node]] += max(0.0, least[node])
            most[problem.parents[node]] += max(0.0, most[node])
        changed = False
        for node in range(1, count):
            if not self._alive[node] or self._fixed[node]:
                continue
            parent = problem.parents[node]
            if not self._alive[parent] or most[node] <= _TIE:
                self._alive[node] = False
                changed = True
            elif self._fixed[parent] and least[node] > _TIE:
                self._fixed[node] = True
                changed = True
        return changed

    def _remainder(self, kept: tuple[int, ...], rest: list[int]) -> Reduced:
        """The open leaves below one root that stands for everything fixed.

        A leaf that costs nothing stands in for what is fixed, or for nothing, so that keeping no other is allowed.
        """
        problem = self._problem
        above = sorted({node for leaf in rest for node in problem.path(leaf) if not self._fixed[node]})
        places = {node: place for place, node in enumerate(above, start=1)}
        parents = [-1, *(places.get(problem.parents[node], 0) for node in above)]
        prices = [0.0, *(problem.prices[node] for node in above)]
        numbers: dict[int, int] = {-1: -1}
        for leaf in rest:
            numbers.setdefault(self._clusters[leaf], len(numbers) - 1)
        leaves = [places[problem.leaves[leaf]] for leaf in rest]
        rewards = [self._rewards[leaf] for leaf in rest]
        clusters = [numbers[self._clusters[leaf]] for leaf in rest]
        names = list(rest)
        parents.append(0)
        prices.append(0.0)
        leaves.append(len(parents) - 1)
        rewards.append(1.0)
        clusters.append(-1)
        names.append(-1)
        smaller = KeepProblem(
            tuple(parents), tuple(leaves), tuple(rewards), tuple(prices), tuple(clusters), problem.cluster_worth
        )
        return Reduced(kept, smaller, tuple(names))
