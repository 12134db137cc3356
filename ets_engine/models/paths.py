"""Which nodes of a search tree are still needed, and how many tokens its steps have in all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise


def count_distinct(sequences: Iterable[Sequence[int]]) -> int:
    """Tokens of sequences in which a common beginning counts once: the size of their trie (count).

    Example:
        >>> count_distinct([(5, 6, 7), (5, 6, 8, 9), (5,), (5, 6, 7)])
        5
    """
    ordered = sorted(map(tuple, sequences))
    return sum(map(len, ordered)) - sum(count_alike(one, other) for one, other in pairwise(ordered))


def count_alike(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that two sequences begin with alike (count); among sorted ones, what the first and last share, all share.

    Example:
        >>> count_alike((5, 6, 7), (5, 6, 8, 9)), count_alike((5,), (5, 6))
        (2, 1)
    """
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def ancestors(nodes: Iterable[int], paths: Mapping[int, tuple[int, object]]) -> list[int]:
    """These nodes and all above them, parents first.

    Args:
        nodes: Ids of a search tree, where a parent's is below its children's.
        paths: Each node's parent (-1 above the root), and what it holds.

    Example:
        >>> ancestors([4], {0: (-1, "prompt"), 1: (0, "a"), 2: (0, "b"), 4: (2, "c")})
        [0, 2, 4]
    """
    found: set[int] = set()
    for node in nodes:
        while node >= 0 and node not in found:
            found.add(node)
            node = paths[node][0]
    return sorted(found)
