"""Which rows share a forward pass: long rows are cut into chunks, rows of like length go together (less padding)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Chunk(NamedTuple):
    """New tokens `start` to `stop` of one row."""

    row: int
    start: int
    stop: int


def plan_forwards(lengths: Sequence[int], chunk_tokens: int) -> list[list[Chunk]]:
    """Split rows over forward passes; each row's chunks come in order.

    Args:
        lengths: New tokens of each row, >= 1.
        chunk_tokens: Most tokens of one pass, padding included, unless a single token per row is more, >= 1.

    Returns:
        Forward passes in order; a row has at most one chunk in each.

    Example:
        >>> [[tuple(chunk) for chunk in forward] for forward in plan_forwards([1, 5, 1], 4)]
        [[(1, 0, 4)], [(0, 0, 1), (1, 4, 5), (2, 0, 1)]]
    """
    forwards = [
        [Chunk(row, start, start + chunk_tokens)]
        for row, length in enumerate(lengths)
        for start in range(0, length - chunk_tokens, chunk_tokens)
    ]
    rest = [  # what is left of each row, at most `chunk_tokens` long
        Chunk(row, (length - 1) // chunk_tokens * chunk_tokens, length) for row, length in enumerate(lengths)
    ]
    batch: list[Chunk] = []
    shortest = 0
    for chunk in sorted(rest, key=lambda chunk: (chunk.stop - chunk.start, chunk.row)):
        longest = chunk.stop - chunk.start
        padded = longest * (len(batch) + 1)
        if batch and longest > 1 and (padded > chunk_tokens or longest > 2 * shortest + 8):
            forwards.append(sorted(batch))
            batch = []
        if not batch:
            shortest = longest
        batch.append(chunk)
    if batch:
        forwards.append(sorted(batch))
    return forwards
