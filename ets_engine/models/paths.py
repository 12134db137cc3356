"""Which nodes a search still needs: those on the paths to the ones that it kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


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
