"""A work list of decode rows that goes on from pass to pass: rows leave it, and each of the others sees a token more.

A plan is some hundred array operations, and what was cut evenly still is so a few tokens later: until rows join, or so
many have left that others would be cut better, a handful of operations bring the last pass's list up to date.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ets_engine.attention.work import WIDTH, IntArray, Tiles, WorkList


class GrowingWork:
    """The only owner of a work list whose queries are rows of one new token each.

    Args:
        work: As planned; its numbers are changed in place from now on.
        ends: One behind the last of `work.slots` that each row alone sees, ascending; there is room after it. Shape
            [B].

    Attributes:
        work: The list as it is now, always of the same shape.

    Example:
        >>> from ets_engine.attention.work import plan_pieces
        >>> pieces = [7, 8, 3, 0, 0, 5, 0, 0], [2, 1, 1], [0, 1, 0, 1], [0, 0, 2, 5], [2, 2, 3, 6]
        >>> growing = GrowingWork(plan_pieces(pieces, 1, tiles_wanted=1), np.array([3, 6]))
        >>> growing.keep(np.array([1]))
        >>> growing.grow(np.array([6]))
        >>> work = growing.work
        >>> work.slots[:8].tolist(), work.tiles(work.parts[0])[:3].tolist()
        ([7, 8, 3, 0, 0, 5, 6, 0], [[0, 2, 0, 1], [2, 3, 1, 0], [5, 7, 1, 1]])
        >>> work.entries[:2].tolist(), work.merges[:2].tolist()
        ([[0, 0, 2, 2], [0, 5, 7, 3]], [[0, 2, 4, 0], [0, 0, 0, 0]])
    """

    def __init__(self, work: WorkList, ends: NDArray[np.integer]) -> None:
        self.work = work
        self._numbers: IntArray = work.numbers.numpy()
        self._ends = ends.astype(np.int32)
        # found by `_look_through`: where in `_numbers` the tile with each row's last token is, and what the list holds
        self._tile_of = np.zeros(0, dtype=np.int32)  # [B]
        self._num_entries = self._num_merges = 0

    def keep(self, rows: NDArray[np.integer]) -> None:
        """Only these rows, ascending places among those there are; what the others saw is read for them no more."""
        self._look_through()
        place = np.full(len(self._ends), -1, dtype=np.int32)
        place[rows] = np.arange(len(rows), dtype=np.int32)
        stays, self._num_entries = _keep(self.work.entries.numpy()[: self._num_entries], place)
        before = np.concatenate([[0], stays.cumsum()])
        for part in self.work.parts:
            tiles = self._tiles(part)
            tiles[:, 2:] += tiles[:, 2:3] * (0, 1)  # as an interval
            tiles[:, 2:] = before[tiles[:, 2:]]
            tiles[:, 3] -= tiles[:, 2]
        merges = self.work.merges.numpy()[: self._num_merges]
        _, self._num_merges = _keep(merges, place)
        merges[self._num_merges :] = 0
        self._ends, self._tile_of = self._ends[rows], self._tile_of[rows]

    def grow(self, slots: NDArray[np.integer]) -> None:
        """One more token for each row, at these slots. [B]."""
        self._look_through()
        numbers = self._numbers
        numbers[self._ends] = slots
        self._ends += 1
        numbers[self._tile_of + 1] = self._ends
        entry = self.work.slot_count + WIDTH * numbers[self._tile_of + 2]  # the tile's only one
        numbers[entry + 2] = self._ends

    def check_integrity(self) -> None:
        """Prove that each row's own part ends in one tile of its own, and that all tiles have entries of such rows.

        Raises:
            AssertionError: naming what is wrong.
        """
        self._look_through()
        entries, num_rows = self.work.entries.numpy(), len(self._ends)
        for row, (at, end) in enumerate(zip(self._tile_of, self._ends, strict=True)):
            _, stop, first, count = self._numbers[at : at + WIDTH]
            assert at >= 0 and (stop, count) == (end, 1), f"row {row} ends at {end}, its tile is {at}: {stop}, {count}"
            assert entries[first, [0, 2]].tolist() == [row, end], f"entry {first} is {entries[first]}, not row {row}'s"
        for part in self.work.parts:
            for begin, end, first, count in self._tiles(part):
                for query, start, stop, _ in entries[first : first + count]:
                    assert 0 <= query < num_rows, f"entry of {query}, one of {num_rows} rows"
                    assert max(begin, start) < min(end, stop), f"row {query} sees nothing of slots {begin} to {end}"

    def _look_through(self) -> None:
        """Find what is changed later, before the first change: many a list is read once and planned anew."""
        if len(self._tile_of):
            return
        self._tile_of = np.full(len(self._ends), -1, dtype=np.int32)
        for part in self.work.parts:
            stops = self._tiles(part)[:, 1]
            row = np.searchsorted(self._ends, stops).clip(max=len(self._ends) - 1)
            found = np.flatnonzero(self._ends[row] == stops)
            self._tile_of[row[found]] = part.start + WIDTH * found
        self._num_entries = max(int(self._tiles(part)[:, 2:].sum(axis=1).max()) for part in self.work.parts)
        self._num_merges = int(np.count_nonzero(self.work.merges[:, 2]))

    def _tiles(self, part: Tiles) -> IntArray:
        return self.work.tiles(part).numpy()


def _keep(table: IntArray, place: IntArray) -> tuple[NDArray[np.bool_], int]:
    """Move to the front those lines of a table whose row, their first number, has a new place; which, and how many."""
    moved = place[table[:, 0]]
    stays = moved >= 0
    left = table[stays]
    left[:, 0] = moved[stays]
    table[: len(left)] = left
    return stays, len(left)
