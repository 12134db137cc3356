"""ETS's pruning problem (arXiv 2502.13575) as plain values: what a set of kept leaves is worth, not how to find one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KeepProblem:
    """Which leaves to keep: rewards of the kept, minus prices of every node on their paths, plus cluster coverage.

    `sum(rewards) - sum(prices of the union of root-to-kept paths) + cluster_worth * covered clusters`, over at least
    one kept leaf.

    Attributes:
        parents: Parent position of each node, -1 for the root at position 0; parents come first. Shape [N].
        leaves: Position of each leaf; every other node has a leaf below it. Shape [L], L >= 1.
        rewards: Reward of keeping each leaf. Shape [L].
        prices: Price of each node, lambda_b included. Shape [N].
        clusters: Cluster of each leaf, -1 for none; empty when coverage does not count. Shape [L] or [0].
        cluster_worth: Worth of covering one more cluster (lambda_d / K), >= 0.
        max_kept: Most leaves that may be kept, None = all.
        sizes: Budget units that each node takes; empty without a capacity. Shape [N] or [0].
        capacity: Most units the kept paths may take, None = no limit.
    """

    parents: tuple[int, ...]
    leaves: tuple[int, ...]
    rewards: tuple[float, ...]
    prices: tuple[float, ...]
    clusters: tuple[int, ...] = ()
    cluster_worth: float = 0.0
    max_kept: int | None = None
    sizes: tuple[int, ...] = ()
    capacity: int | None = None

    def path(self, leaf: int) -> list[int]:
        """Node positions from a leaf (named by its place in `leaves`) up to the root."""
        nodes = [self.leaves[leaf]]
        while (parent := self.parents[nodes[-1]]) >= 0:
            nodes.append(parent)
        return nodes

    def held(self, kept: Iterable[int]) -> set[int]:
        """Node positions on the union of root-to-kept paths."""
        nodes: set[int] = set()
        for leaf in kept:
            node = self.leaves[leaf]
            while node >= 0 and node not in nodes:
                nodes.add(node)
                node = self.parents[node]
        return nodes

    def below(self, top: int) -> tuple[list[int], KeepProblem]:
        """The problem of one node's subtree, without limits, and the leaf here behind each of its leaves. Shape [R]."""
        places = {top: 0}
        for node in range(top + 1, len(self.parents)):
            if self.parents[node] in places:
                places[node] = len(places)
        names = [leaf for leaf, node in enumerate(self.leaves) if node in places]
        numbers = {-1: -1}
        for leaf in names if self.clusters else ():
            numbers.setdefault(self.clusters[leaf], len(numbers) - 1)
        return names, KeepProblem(
            (-1, *(places[self.parents[node]] for node in places if node != top)),
            tuple(places[self.leaves[leaf]] for leaf in names),
            tuple(self.rewards[leaf] for leaf in names),
            tuple(self.prices[node] for node in places),
            tuple(numbers[self.clusters[leaf]] for leaf in names if self.clusters),
            self.cluster_worth,
        )

    def own_prices(self) -> list[float]:
        """Price of the nodes that each leaf shares with no other: what pruning it alone would save. Shape [L].

        Example:
            >>> KeepProblem((-1, 0, 0, 1), (2, 3), (0.5, 0.5), (0.125, 0.25, 0.5, 1.0)).own_prices()
            [0.5, 1.25]
        """
        leaves_below = [0] * len(self.parents)
        for leaf in self.leaves:
            leaves_below[leaf] = 1
        for node in range(len(self.parents) - 1, 0, -1):
            leaves_below[self.parents[node]] += leaves_below[node]
        prices: list[float] = []
        for leaf in self.leaves:
            node, price = leaf, 0.0
            while node >= 0 and leaves_below[node] == 1:
                price += self.prices[node]
                node = self.parents[node]
            prices.append(price)
        return prices

    def path_prices(self, kept: Iterable[int]) -> list[float]:
        """Price of what each leaf's path holds beside the paths of the other kept leaves. Shape [L].

        Example:
            >>> toy = KeepProblem((-1, 0, 0, 1), (2, 3), (0.5, 0.5), (0.125, 0.25, 0.5, 1.0))
            >>> toy.path_prices([0]), toy.path_prices([0, 1])
            ([0.625, 1.25], [0.5, 1.25])
        """
        kept = set(kept)
        kept_below = [0] * len(self.parents)
        for leaf in kept:
            kept_below[self.leaves[leaf]] = 1
        for node in range(len(self.parents) - 1, 0, -1):
            kept_below[self.parents[node]] += kept_below[node]
        prices: list[float] = []
        for leaf, node in enumerate(self.leaves):
            itself, price = leaf in kept, 0.0
            while node >= 0 and kept_below[node] == itself:
                price += self.prices[node]
                node = self.parents[node]
            prices.append(price)
        return prices

    def cluster_gains(self, kept: Iterable[int]) -> list[float]:
        """Worth of each leaf's cluster where no other kept leaf is in it, else 0; empty without coverage. Shape [L].

        Example:
            >>> toy = KeepProblem((-1, 0, 0, 0), (1, 2, 3), (0.5,) * 3, (0.0,) * 4, (0, 0, 1), cluster_worth=0.25)
            >>> toy.cluster_gains([0])
            [0.25, 0.0, 0.25]
        """
        kept = set(kept)
        members = Counter(self.clusters[leaf] for leaf in kept) if self.clusters else Counter[int]()
        return [
            self.cluster_worth if cluster >= 0 and members[cluster] == (leaf in kept) else 0.0
            for leaf, cluster in enumerate(self.clusters)
        ]

    def objective(self, kept: Iterable[int]) -> float:
        """Value of keeping exactly these leaves.

        Example:
            >>> toy = KeepProblem((-1, 0, 0), (1, 2), (0.75, 0.25), (0.25, 0.25, 0.5))
            >>> toy.objective([0]), toy.objective([0, 1])
            (0.25, 0.0)
        """
        kept = set(kept)
        rewards = math.fsum(self.rewards[leaf] for leaf in kept)
        prices = math.fsum(self.prices[node] for node in self.held(kept))
        covered = len({self.clusters[leaf] for leaf in kept} - {-1}) if self.clusters else 0
        return rewards - prices + self.cluster_worth * covered

    def size(self, kept: Iterable[int]) -> int:
        """Budget units that these leaves' paths take together."""
        return sum(self.sizes[node] for node in self.held(kept)) if self.sizes else 0

    def feasible(self, kept: Iterable[int]) -> bool:
        """Whether at least one leaf is kept, not too many, and within the capacity."""
        kept = set(kept)
        within = self.capacity is None or self.size(kept) <= self.capacity
        return bool(kept) and len(kept) <= (self.max_kept or len(kept)) and within


def preorder(parents: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """Nodes in depth-first preorder, and for each place the first place after its subtree.

    Example:
        >>> preorder((-1, 0, 0, 1))
        ([0, 1, 3, 2], [4, 3, 3, 4])
    """
    children: list[list[int]] = [[] for _ in parents]
    for node, parent in enumerate(parents):
        if parent >= 0:
            children[parent].append(node)
    subtree = [1] * len(parents)  # nodes in each subtree
    for node in range(len(parents) - 1, 0, -1):
        subtree[parents[node]] += subtree[node]
    order: list[int] = []
    stack = [0]
    while stack:
        node = stack.pop()
        order.append(node)
        stack.extend(reversed(children[node]))
    return order, [place + subtree[node] for place, node in enumerate(order)]
