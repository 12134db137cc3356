"""Rows that decode a token each -> flat numbers for a kernel, at little cost per step; it knows no model and no device.

Who reads what is planned when rows that were not there join (`LayoutBuilder.plan`), and laid out flat with room for
tokens to come. In most passes after that rows only grow by a token and leave; then a layout says no more than this, and
whoever made a work list of the one before changes that in place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ets_engine.kv.layout import LayoutBuilder

IntArray = NDArray[np.int64]

SPARE_TOKENS = 32  # that a row may grow by before all is laid out anew


class Pieces(NamedTuple):
    """Runs of slots and the queries that see an interval of each, piece after piece; the last are each row's own part.

    Attributes:
        slots: Of all pieces, one after the other; behind each row's own part is room for more. Shape [U].
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
        pieces: Who reads what, by the window of a layer (tokens, None = it sees whole paths); None = as in the last
            pass, but rows may have left, and each of the others sees its new token too.
        rows: The places that these rows had in the last pass, ascending; None = the same as now. Shape [B].
        distinct_tokens: Distinct tokens whose K/V a layer reads, by window.
    """

    positions: IntArray
    write_slots: IntArray
    pieces: Mapping[int | None, Pieces] | None
    rows: IntArray | None
    distinct_tokens: Mapping[int | None, int]


@dataclass(slots=True)
class _Batch:
    """The rows of the last pass, and all that the next one can be made from.

    Attributes:
        handles, stored: KV node of each row, and its own tokens. Shape [B].
        positions: Path position of each row's last token. Shape [B].
        run_slots, run_tokens, run_start: Slots of all shared runs, and tokens and first path position of each.
        reader, run: Who reads a run, and which, run after run. Shape [F].
        tail, tail_positions, tail_tokens: Slots of each row's own part, their path positions, how many. [B, L], [B].
        laid_out, spare: Rows when they were last laid out (count), and how much each may still grow (tokens).
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
    laid_out: int = 0
    spare: int = 0

    def keep(self, rows: IntArray) -> IntArray:
        """Only these rows, in their order; runs that nobody reads any more go too. The slots that went. [G]."""
        renumbered = np.full(len(self.handles), -1)
        renumbered[rows] = np.arange(len(rows))
        goes = renumbered < 0
        gone = [self.tail[goes][self.is_own(self.tail_tokens[goes])]]
        stays = renumbered[self.reader] >= 0
        self.reader, self.run = renumbered[self.reader[stays]], self.run[stays]
        is_read = np.bincount(self.run, minlength=len(self.run_tokens)) > 0
        if not is_read.all():
            in_read = np.repeat(is_read, self.run_tokens)
            gone.append(self.run_slots[~in_read])
            self.run_slots = self.run_slots[in_read]
            self.run_tokens, self.run_start = self.run_tokens[is_read], self.run_start[is_read]
            self.run = (np.cumsum(is_read) - 1)[self.run]
        self.handles, self.stored, self.positions = self.handles[rows], self.stored[rows], self.positions[rows]
        self.tail, self.tail_tokens = self.tail[rows], self.tail_tokens[rows]
        if self.tail_positions is not None:
            self.tail_positions = self.tail_positions[rows]
        return np.concatenate(gone)

    def grow(self, slots: IntArray) -> None:
        """One more token for every row, at these slots. [B]."""
        self.make_room(1)
        rows = np.arange(len(slots))
        self.positions += 1
        self.stored += 1
        self.tail[rows, self.tail_tokens] = slots
        if self.tail_positions is not None:
            self.tail_positions[rows, self.tail_tokens] = self.positions
        self.tail_tokens += 1

    def make_room(self, tokens: int) -> None:
        """For so many more tokens in each row's own part."""
        if int(self.tail_tokens.max()) + tokens > self.tail.shape[1]:
            wider = ((0, 0), (0, max(tokens, 64)))
            self.tail = np.pad(self.tail, wider)
            if self.tail_positions is not None:
                self.tail_positions = np.pad(self.tail_positions, wider)

    def is_own(self, tokens: IntArray) -> NDArray[np.bool_]:
        """The first so many numbers of each row of `tail`. [R] -> [R, L]."""
        return np.arange(self.tail.shape[1]) < tokens[:, None]


@dataclass(slots=True)
class _Listed:
    """How often a batch lists each slot, since it began anew.

    Attributes:
        distinct: Slots that it lists (count).
    """

    distinct: int = 0
    _times: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))  # what is not listed says nothing
    _mark: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def restart(self, slots: IntArray) -> None:
        self._make_room(slots)
        self._times[slots] = 0
        np.add.at(self._times, slots, 1)
        self.distinct = self._count(slots)

    def add(self, slots: IntArray) -> None:
        """Slots that are not listed yet, each once."""
        self._make_room(slots)
        self._times[slots] = 1
        self.distinct += len(slots)

    def drop(self, slots: IntArray) -> None:
        np.subtract.at(self._times, slots, 1)
        self.distinct -= self._count(slots[self._times[slots] == 0])

    def count_seen(self, pieces: Pieces) -> int:
        """Distinct slots that some query sees (count)."""
        edges = np.zeros(len(pieces.slots) + 1, dtype=np.int64)
        np.add.at(edges, pieces.first, 1)
        np.add.at(edges, pieces.stop, -1)
        return self._count(pieces.slots[np.cumsum(edges)[:-1] > 0])

    def _count(self, slots: IntArray) -> int:
        """Distinct ones among some slots (count): those that are the last to leave their mark."""
        order = np.arange(len(slots))
        self._mark[slots] = order
        return int(np.count_nonzero(self._mark[slots] == order))

    def _make_room(self, slots: IntArray) -> None:
        if (most := int(slots.max())) >= len(self._times):
            more = (0, 2 * most + 1 - len(self._times))
            self._times, self._mark = np.pad(self._times, more), np.pad(self._mark, more)


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
        >>> slots, *_, stop = layout.pieces[None]
        >>> layout.positions.tolist(), stop.tolist(), slots[:5].tolist(), slots[4 + 1 + SPARE_TOKENS].item()
        ([4, 4], [4, 4, 5, 38], [0, 1, 2, 3, 4], 8)
        >>> slots = [tree.append(leaf, 1) for leaf in leaves]
        >>> layout = builder.build(leaves)
        >>> layout.pieces, layout.rows, layout.write_slots.tolist(), layout.distinct_tokens
        (None, None, [5, 9], {None: 8})
    """

    layouts: LayoutBuilder
    _batch: _Batch | None = None
    _listed: _Listed = field(default_factory=_Listed)

    def build(self, handles: Sequence[int]) -> DecodeLayout:
        """The layout of one pass; `PrefixTree.append` has made room for each row's one new token already.

        Args:
            handles: Distinct held leaves.
        """
        asked = np.array(handles, dtype=np.int64)
        tokens, last_slots = self.layouts.tree.ends(handles)
        stored, new = np.array(tokens, dtype=np.int64) - 1, np.array(last_slots, dtype=np.int64)
        batch, self._batch = self._batch, None  # whatever fails below, a half-grown batch is not used
        rows = None if batch is None else _places(batch, asked, stored)
        if batch is None or rows is None:
            batch, rows = self._plan(asked, stored), None
        else:
            if len(rows) < len(batch.handles):
                self._listed.drop(batch.keep(rows))
            else:
                rows = None
            batch.grow(new)
            self._listed.add(new)
            batch.spare -= 1
        oldest = {window: batch.positions - window + 1 for window in self.layouts.windows}  # seen by each row. [B]
        hides = [window for window, first in oldest.items() if int(first.max()) > 0]
        pieces: dict[int | None, Pieces] | None = None
        if batch.spare < 0 or 8 * len(handles) < 7 * batch.laid_out or hides:
            pieces = self._lay_out(batch, {window: oldest[window] for window in hides})
        distinct: dict[int | None, int] = dict.fromkeys((None, *oldest), self._listed.distinct)
        if pieces is not None:
            distinct |= {window: self._listed.count_seen(pieces[window]) for window in hides}
        self._batch = batch
        return DecodeLayout(batch.positions.copy(), new, pieces, rows, distinct)

    def forget(self) -> None:
        """The last pass counts for nothing: its tokens were taken back."""
        self._batch = None

    def _plan(self, handles: IntArray, stored: IntArray) -> _Batch:
        plan = self.layouts.plan(handles.tolist())
        nothing = np.zeros(0, dtype=np.int64)
        batch = _Batch(
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
            spare=-1,
        )
        self._listed.restart(np.concatenate([batch.run_slots, batch.tail[batch.is_own(batch.tail_tokens)]]))
        return batch

    def _lay_out(self, batch: _Batch, oldest: Mapping[int, IntArray]) -> dict[int | None, Pieces]:
        """All pieces, with room to grow; for the windows that hide something, path positions of what is seen. [B]."""
        num_rows, num_runs = len(batch.handles), len(batch.run_tokens)
        batch.make_room(SPARE_TOKENS)
        batch.laid_out, batch.spare = num_rows, SPARE_TOKENS
        room = batch.tail_tokens + SPARE_TOKENS
        slots = np.concatenate([batch.run_slots, batch.tail[batch.is_own(room)]])
        run_begin = np.cumsum(batch.run_tokens) - batch.run_tokens
        tail_begin = len(batch.run_slots) + np.cumsum(room) - room
        first = np.concatenate([run_begin[batch.run], tail_begin])
        stop = np.concatenate([(run_begin + batch.run_tokens)[batch.run], tail_begin + batch.tail_tokens])
        query = np.concatenate([batch.reader, np.arange(num_rows)])
        readers = np.bincount(batch.run, minlength=num_runs)
        whole = Pieces(slots, np.concatenate([readers, np.ones(num_rows, dtype=np.int64)]), query, first, stop)
        pieces: dict[int | None, Pieces] = dict.fromkeys((None, *self.layouts.windows), whole)
        return pieces | {window: _through(batch, whole, first) for window, first in oldest.items()}


def _through(batch: _Batch, whole: Pieces, oldest: IntArray) -> Pieces:
    """Without what lies before each row's oldest token ([B]); slots that nobody sees any more stay unread."""
    assert batch.tail_positions is not None
    hidden_of_run = np.clip(oldest[batch.reader] - batch.run_start[batch.run], 0, None)
    hidden_of_tail = ((batch.tail_positions < oldest[:, None]) & batch.is_own(batch.tail_tokens)).sum(1)
    first = np.minimum(whole.first + np.concatenate([hidden_of_run, hidden_of_tail]), whole.stop)
    sees = first < whole.stop
    piece = np.repeat(np.arange(len(whole.queries)), whole.queries)[sees]
    queries = np.bincount(piece, minlength=len(whole.queries))
    return Pieces(whole.slots, queries[queries > 0], whole.query[sees], first[sees], whole.stop[sees])


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
