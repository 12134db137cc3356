"""Rows that decode a token each -> flat numbers for a kernel, at little cost per step; it knows no model and no device.

A layout is planned once, when rows that were not there join (`LayoutBuilder.plan`). From then on rows grow by a token
and leave; both are a handful of operations on flat arrays, whatever the tree looks like.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ets_engine.kv.layout import LayoutBuilder

IntArray = NDArray[np.int64]


class Pieces(NamedTuple):
    """Runs of slots and the queries that see an interval of each, piece after piece.

    Attributes:
        slots: Of all pieces, one after the other. Shape [U].
        queries: How many each piece has, >= 1. Shape [P].
        query, first, stop: Each of those, and the interval of `slots` that it sees, not empty. Shape [F].
    """

    slots: IntArray
    queries: IntArray
    query: IntArray
    first: IntArray
    stop: IntArray


@dataclass(frozen=True, slots=True)
class DecodeLayout:
    """One decode pass over B rows.

    Attributes:
        positions: Path position of each row's new token. Shape [B].
        write_slots: Where its K/V goes. Shape [B].
        pieces: Who reads what, for layers that see whole paths.
        windowed: The same for layers that see no farther than so many tokens; None where nothing is hidden.
        distinct_tokens: Distinct tokens whose K/V a layer reads, by window.
    """

    positions: IntArray
    write_slots: IntArray
    pieces: Pieces
    windowed: dict[int, Pieces | None]
    distinct_tokens: dict[int | None, int]

    def within(self, window: int | None) -> Pieces:
        """For layers that see through a window of so many tokens, None = that see whole paths."""
        return self.pieces if window is None else self.windowed[window] or self.pieces


@dataclass(slots=True)
class _Batch:
    """The rows of the last pass, and all that the next one can be made from.

    Attributes:
        handles, stored: KV node of each row, and its own tokens. Shape [B].
        positions: Path position of each row's last token. Shape [B].
        run_slots, run_tokens, run_start: Slots of all shared runs, and tokens and first path position of each.
        reader, run: Who reads a run, and which, run after run. Shape [F].
        tail, tail_positions, tail_tokens: Slots of each row's own part, their path positions, how many. [B, L], [B].
    """

    handles: IntArray
    stored: IntArray
    positions: IntArray
    run_slots: IntArray
    run_tokens: IntArray
    run_start: IntArray
    reader: IntArray
    run: IntArray
    tail: IntArray
    tail_positions: IntArray | None
    tail_tokens: IntArray

    def keep(self, rows: IntArray) -> None:
        """Only these rows, in their order; runs that nobody reads any more go too."""
        renumbered = np.full(len(self.handles), -1)
        renumbered[rows] = np.arange(len(rows))
        stays = renumbered[self.reader] >= 0
        self.reader, self.run = renumbered[self.reader[stays]], self.run[stays]
        is_read = np.bincount(self.run, minlength=len(self.run_tokens)) > 0
        if not is_read.all():
            self.run_slots = self.run_slots[np.repeat(is_read, self.run_tokens)]
            self.run_tokens, self.run_start = self.run_tokens[is_read], self.run_start[is_read]
            self.run = (np.cumsum(is_read) - 1)[self.run]
        self.handles, self.stored, self.positions = self.handles[rows], self.stored[rows], self.positions[rows]
        self.tail, self.tail_tokens = self.tail[rows], self.tail_tokens[rows]
        if self.tail_positions is not None:
            self.tail_positions = self.tail_positions[rows]

    def grow(self, slots: IntArray) -> None:
        """One more token for every row, at these slots. [B]."""
        if int(self.tail_tokens.max()) == self.tail.shape[1]:
            wider = ((0, 0), (0, 64))
            self.tail = np.pad(self.tail, wider)
            if self.tail_positions is not None:
                self.tail_positions = np.pad(self.tail_positions, wider)
        rows = np.arange(len(slots))
        self.positions += 1
        self.stored += 1
        self.tail[rows, self.tail_tokens] = slots
        if self.tail_positions is not None:
            self.tail_positions[rows, self.tail_tokens] = self.positions
        self.tail_tokens += 1


@dataclass(slots=True, eq=False)
class DecodeLayoutBuilder:
    """Builds layouts of decode passes; remembers the last one.

    Attributes:
        layouts: Plans for rows that were not there before; its tree and its windows are the ones here too.

    Example:
        >>> from ets_engine.kv import KVPool, LayerShape, LayoutBuilder, PrefixTree
        >>> tree = PrefixTree(KVPool([LayerShape(1, 8)], page_tokens=4))
        >>> prompt = tree.root()
        >>> slots = tree.append(prompt, 4)
        >>> leaves = [tree.fork(prompt), tree.fork(prompt)]
        >>> builder = DecodeLayoutBuilder(LayoutBuilder(tree, min_saved_tokens=1))
        >>> slots = [tree.append(leaf, 1) for leaf in leaves]
        >>> layout = builder.build(leaves)
        >>> layout.positions.tolist(), layout.pieces.slots.tolist(), layout.pieces.stop.tolist()
        ([4, 4], [0, 1, 2, 3, 4, 8], [4, 4, 5, 6])
    """

    layouts: LayoutBuilder
    _batch: _Batch | None = None
    _mark: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def build(self, handles: Sequence[int]) -> DecodeLayout:
        """The layout of one pass; `PrefixTree.append` has made room for each row's one new token already.

        Args:
            handles: Distinct held leaves.
        """
        asked = np.array(handles, dtype=np.int64)
        tokens, last_slots = self.layouts.tree.ends(handles)
        stored = np.array(tokens, dtype=np.int64) - 1
        batch, self._batch = self._batch, None  # whatever fails below, a half-grown batch is not used
        rows = None if batch is None else _places(batch, asked, stored)
        if batch is None or rows is None:
            batch = self._plan(asked, stored)
        else:
            if len(rows) < len(batch.handles):
                batch.keep(rows)
            batch.grow(np.array(last_slots, dtype=np.int64))
        self._batch = batch
        return self._layout(batch)

    def _plan(self, handles: IntArray, stored: IntArray) -> _Batch:
        plan = self.layouts.plan(handles.tolist())
        nothing = np.zeros(0, dtype=np.int64)
        return _Batch(
            handles=handles,
            stored=stored,
            positions=plan.positions,
            run_slots=np.concatenate([nothing, *(run.slots for run in plan.runs)]),
            run_tokens=np.array([len(run.slots) for run in plan.runs], dtype=np.int64),
            run_start=np.array([run.start for run in plan.runs], dtype=np.int64),
            reader=np.concatenate([nothing, *(run.queries for run in plan.runs)]),
            run=np.repeat(np.arange(len(plan.runs)), [len(run.queries) for run in plan.runs]),
            tail=plan.tail,
            tail_positions=plan.tail_positions,
            tail_tokens=plan.tail_tokens,
        )

    def _layout(self, batch: _Batch) -> DecodeLayout:
        num_rows, num_runs = len(batch.handles), len(batch.run_tokens)
        rows = np.arange(num_rows)
        is_tail = np.arange(int(batch.tail_tokens.max())) < batch.tail_tokens[:, None]  # [B, L]
        slots = np.concatenate([batch.run_slots, batch.tail[:, : is_tail.shape[1]][is_tail]])
        run_begin = np.cumsum(batch.run_tokens) - batch.run_tokens
        tail_begin = len(batch.run_slots) + np.cumsum(batch.tail_tokens) - batch.tail_tokens
        first = np.concatenate([run_begin[batch.run], tail_begin])
        stop = np.concatenate([(run_begin + batch.run_tokens)[batch.run], tail_begin + batch.tail_tokens])
        query = np.concatenate([batch.reader, rows])
        readers = np.bincount(batch.run, minlength=num_runs)
        whole = Pieces(slots, np.concatenate([readers, np.ones(num_rows, dtype=np.int64)]), query, first, stop)
        distinct: dict[int | None, int] = {None: self._count_distinct(slots)}
        windowed: dict[int, Pieces | None] = {}
        for window in self.layouts.windows:
            windowed[window] = None
            distinct[window] = distinct[None]
            oldest = batch.positions - window + 1  # [B], path position of the first token seen
            if int(oldest.max()) > 0:
                windowed[window] = self._through(batch, whole, is_tail, oldest)
                distinct[window] = self._count_seen(windowed[window] or whole)
        new = batch.tail[rows, batch.tail_tokens - 1]
        return DecodeLayout(batch.positions.copy(), new, whole, windowed, distinct)

    def _through(self, batch: _Batch, whole: Pieces, is_tail: NDArray[np.bool_], oldest: IntArray) -> Pieces:
        """Without what lies before each row's oldest token; slots that nobody sees any more stay unread."""
        assert batch.tail_positions is not None
        hidden_of_run = np.clip(oldest[batch.reader] - batch.run_start[batch.run], 0, None)
        hidden_of_tail = ((batch.tail_positions[:, : is_tail.shape[1]] < oldest[:, None]) & is_tail).sum(1)
        first = np.minimum(whole.first + np.concatenate([hidden_of_run, hidden_of_tail]), whole.stop)
        sees = first < whole.stop
        piece = np.repeat(np.arange(len(whole.queries)), whole.queries)[sees]
        queries = np.bincount(piece, minlength=len(whole.queries))
        return Pieces(whole.slots, queries[queries > 0], whole.query[sees], first[sees], whole.stop[sees])

    def _count_distinct(self, slots: IntArray) -> int:
        """Distinct ones among some slots (count): those that are the last to leave their mark."""
        if len(slots) and (most := int(slots.max())) >= len(self._mark):
            self._mark = np.zeros(2 * most + 1, dtype=np.int64)
        order = np.arange(len(slots))
        self._mark[slots] = order
        return int(np.count_nonzero(self._mark[slots] == order))

    def _count_seen(self, pieces: Pieces) -> int:
        edges = np.zeros(len(pieces.slots) + 1, dtype=np.int64)
        np.add.at(edges, pieces.first, 1)
        np.add.at(edges, pieces.stop, -1)
        return self._count_distinct(pieces.slots[np.cumsum(edges)[:-1] > 0])


def _places(batch: _Batch, handles: IntArray, stored: IntArray) -> IntArray | None:
    """Where in the last batch these rows are, None if it was no pass of theirs, one token ago, and in this order."""
    if len(handles) == len(batch.handles):
        rows = np.arange(len(handles))
    else:
        order = np.argsort(batch.handles)
        place = np.searchsorted(batch.handles[order], handles).clip(max=len(order) - 1)
        rows = order[place]
    same = (batch.handles[rows] == handles).all() and (batch.stored[rows] + 1 == stored).all()
    return rows if same and (np.diff(rows) > 0).all() else None
