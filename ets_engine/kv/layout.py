"""Rows of a batch (a KV node and its new tokens each) -> index tensors for attention; it knows no model.

Every token of a row's path is read in one of two ways. A *segment* is a run of ancestors' tokens that many rows share:
all of its rows' queries are stacked and its K/V is read once (Hydragen, arXiv 2402.05099). What is left, the row's own
tokens and ancestors that too few rows share, is the row's *tail*: gathered per row, padded, causal over the new tokens.
While the same rows decode token after token, only the tails grow, and only that is rebuilt.

Layers that see through a sliding window get the same layout with the unseen left out, once per window and pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ets_engine.kv.prefix_tree import PrefixTree
from ets_engine.kv.window import PADDING, IntArray, Run, Tails, cut_run, cut_tails

# A segment costs a handful of small tensor operations per layer, about what gathering and attending this many numbers
# of K/V in tails costs; it must save at least as many. That is 256 tokens of 4 KV heads x 64, 682 of 3 x 32.
MIN_SAVED_NUMBERS = 1 << 17
# Tails are gathered, then attended, this many numbers of K/V at a time: 1 MB of fp32 per core of two stays in its L2
# cache, and rows of short tails are not padded to the longest of all. On one AVX2 core with 1 MB of it, 192 rows of 64
# tokens, 3 KV heads x 32, take 2.0 instead of 4.5 ms a layer.
BLOCK_NUMBERS = 1 << 19


class Row(NamedTuple):
    """One row of a forward pass: a node, its own tokens whose K/V is stored already, and its new tokens (counts)."""

    handle: int
    stored: int
    new: int


class Piece(NamedTuple):
    """Consecutive tokens of a path: where their K/V lies, and the path position of the first."""

    slots: IntArray  # [U]
    start: int


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens that several rows share, in path order.

    Attributes:
        queries: The new tokens that see it, None = all. Shape [R].
        slots: Where its K/V lies; a slice when contiguous. Shape [U].
        hidden: How many of its first tokens each of them does not see, because of a window, always less than U; None =
            all see it whole. Shape [R].
    """

    queries: torch.Tensor | None
    slots: torch.Tensor | slice
    hidden: torch.Tensor | None = None


class Block(NamedTuple):
    """Rows `start` to `stop` whose tails are read together, and their longest tail (tokens)."""

    start: int
    stop: int
    length: int


@dataclass(frozen=True, slots=True)
class TreeLayout:
    """One forward pass over B rows, T new tokens in all, at most Q per row.

    Attributes:
        position_ids: Path position of each new token. Shape [T].
        write_slots: Where its K/V goes; a slice when contiguous. Shape [T].
        segments: Shared parts; each row's segments and its tail make up its path.
        tail_slots: Each row's tail in path order, its new tokens last, padded with its first slot. Shape [B, L].
        tail_bias: 0 where a query sees a tail token, -inf elsewhere; None = see `tail_causal`. Shape [B, 1, Q, L].
        tail_causal: Without a bias: the tail is the new tokens alone, each seeing itself and those before it.
        tail_blocks: All rows in order, by blocks that fit in a processor's cache.
        query_index: New token of each padded query; None = no padding, the T tokens are B x Q. Shape [B, Q].
        packed_index: Padded query of each new token, as position in B x Q; None with `query_index`. Shape [T].
        last_index: Each row's last new token. Shape [B].
        num_rows, num_queries: B and Q.
        distinct_tokens: Distinct tokens whose K/V a layer reads.
        windowed: By window (tokens), the layout for layers that see no farther; None where nothing is hidden.
    """

    position_ids: torch.Tensor
    write_slots: torch.Tensor | slice
    segments: tuple[Segment, ...]
    tail_slots: torch.Tensor
    tail_bias: torch.Tensor | None
    tail_causal: bool
    tail_blocks: tuple[Block, ...]
    query_index: torch.Tensor | None
    packed_index: torch.Tensor | None
    last_index: torch.Tensor
    num_rows: int
    num_queries: int
    distinct_tokens: int
    windowed: Mapping[int, TreeLayout | None] = field(default_factory=dict)

    def within(self, window: int | None) -> TreeLayout:
        """The layout for layers that see through a window of so many tokens, None = that see whole paths.

        It is this very layout where the window hides nothing, so that what a pass derives from it serves all layers.
        """
        return self if window is None else self.windowed[window] or self


class Plan(NamedTuple):
    """Who reads what in a decode pass of B rows.

    Attributes:
        runs: Shared, with the rows that read each.
        tail, tail_positions, tail_tokens: Slots of the rest of each row's path, their path positions (None without
            windows), and how many there are. Shape [B, L], [B, L], [B].
        positions: Path position of each row's new token. Shape [B].
    """

    runs: Sequence[Run]
    tail: IntArray
    tail_positions: IntArray | None
    tail_tokens: IntArray
    positions: IntArray


class LayoutBuilder:
    """Builds layouts over one prefix tree; remembers the last batch so that decoding costs little per token.

    Args:
        tree: The KV tree.
        device: Of the index tensors.
        bias_dtype: Of `TreeLayout.tail_bias`.
        min_saved_tokens: Shared tokens a segment must save from being read again, >= 0; None = what pays on a CPU.
        windows: Sliding windows of the model's layers (tokens, >= 1); each pass has a layout for each.
    """

    def __init__(
        self,
        tree: PrefixTree,
        *,
        device: torch.device | str = "cpu",
        bias_dtype: torch.dtype = torch.float32,
        min_saved_tokens: int | None = None,
        windows: Iterable[int] = (),
    ) -> None:
        self.tree = tree
        self._device = torch.device(device)
        self._bias_dtype = bias_dtype
        token_numbers = max(2 * one.kv_heads * one.head_dim for one in tree.pool.shapes)
        if min_saved_tokens is None:
            min_saved_tokens = MIN_SAVED_NUMBERS // token_numbers
        self._min_saved_tokens = min_saved_tokens
        self._block_tokens = BLOCK_NUMBERS // token_numbers if self._device.type == "cpu" else None
        self.windows = sorted(set(windows))
        self._next_rows: list[Row] | None = None  # the rows that the remembered plan can be grown to

    def build(self, rows: Sequence[Row]) -> TreeLayout:
        """The layout of one forward pass; `PrefixTree.append` has made room for the new tokens already.

        Args:
            rows: Distinct held leaves, each with at least one new token.

        Example:
            >>> from ets_engine.kv.pool import KVPool, LayerShape
            >>> tree = PrefixTree(KVPool([LayerShape(1, 8)], page_tokens=4))
            >>> prompt = tree.root()
            >>> slots = tree.append(prompt, 4)
            >>> left, right = tree.fork(prompt), tree.fork(prompt)
            >>> slots = tree.append(left, 1), tree.append(right, 1)
            >>> layout = LayoutBuilder(tree, min_saved_tokens=1).build([Row(left, 0, 1), Row(right, 0, 1)])
            >>> layout.position_ids.tolist(), layout.segments[0].slots, layout.tail_slots.tolist()
            ([4, 4], slice(0, 4, None), [[4], [8]])
        """
        rows = list(rows)
        grown, self._next_rows = self._next_rows == rows, None  # whatever fails below, a half-grown plan is not used
        if grown:
            self._grow_tails(rows)
        else:
            self._plan(rows)
            self._segments = tuple(self._segment(run) for run in self._runs)
        decoding = all(row.new == 1 for row in rows)
        self._next_rows = [Row(row.handle, row.stored + 1, 1) for row in rows] if decoding else None
        return self._layout(rows, decoding)

    # ------------------------------------------------------------------ plan: who reads what, and how

    def plan(self, handles: Sequence[int]) -> Plan:
        """Who reads what when each of some leaves decodes its last token; the arrays are the caller's to change."""
        self._next_rows = None
        self._plan([Row(handle, self.tree.num_tokens(handle) - 1, 1) for handle in handles])
        positions = self._tail_positions if self.windows else None
        return Plan(self._runs, self._tail, positions, self._tail_lengths, self._starts)

    def _plan(self, rows: list[Row]) -> None:
        tree = self.tree
        rows_of: dict[int, list[int]] = {}  # parent -> its rows
        for index, row in enumerate(rows):
            rows_of.setdefault(tree.parent(row.handle), []).append(index)
        paths = {parent: self._path(parent) for parent in rows_of}
        below: dict[int, list[int]] = {}  # node -> rows that read it
        for parent, path in paths.items():
            for node in path:
                below.setdefault(node, []).extend(rows_of[parent])
        private: dict[int, Piece] = {}  # the runs that are no segments, by their first node
        shared: dict[int, tuple[list[int], Piece]] = {}  # the others, with their readers
        tails: list[list[Piece]] = [[]] * len(rows)
        for parent, path in paths.items():
            prefix: list[Piece] = []
            for run in _runs(path, below):
                first = run[0]
                if first not in private and first not in shared:
                    piece = Piece(np.concatenate([tree.slots(node) for node in run]), tree.prefix_tokens(first))
                    saved = (len(below[first]) - 1) * len(piece.slots)
                    if len(piece.slots) and (len(rows) == 1 or saved >= self._min_saved_tokens):
                        shared[first] = below[first], piece
                    else:
                        private[first] = piece
                if first in private:
                    prefix.append(private[first])
            for index in rows_of[parent]:
                row = rows[index]
                own = Piece(tree.slots(row.handle)[: row.stored + row.new], tree.prefix_tokens(row.handle))
                if len(rows) == 1 and row.new > 1 and row.stored:  # a further chunk of one prompt
                    shared[row.handle] = [0], Piece(own.slots[: row.stored].copy(), own.start)
                    own = Piece(own.slots[row.stored :], own.start + row.stored)
                tails[index] = [*prefix, own]
        self._plan_runs(list(shared.values()), rows)
        self._plan_tails(tails)
        starts = [tree.prefix_tokens(row.handle) + row.stored for row in rows]
        self._starts = np.array(starts, dtype=np.int64)  # position of each row's first new token
        self._row_index = np.arange(len(rows))
        self._distinct_tokens = sum(tree.num_tokens(node) for node in below) + sum(row.stored + row.new for row in rows)

    def _path(self, node: int) -> list[int]:
        path = []
        while node >= 0:
            path.append(node)
            node = self.tree.parent(node)
        return path[::-1]

    def _plan_runs(self, shared: list[tuple[list[int], Piece]], rows: list[Row]) -> None:
        ends = np.cumsum([row.new for row in rows])
        self._num_tokens = int(ends[-1])
        self._runs: list[Run] = []
        for readers, piece in shared:
            queries = np.arange(self._num_tokens)
            if len(readers) < len(rows):
                queries = np.concatenate([np.arange(ends[i] - rows[i].new, ends[i]) for i in readers])
            self._runs.append(Run(queries, *piece))

    def _plan_tails(self, tails: list[list[Piece]]) -> None:
        slots = [np.concatenate([piece.slots for piece in tail]) for tail in tails]
        self._tail_lengths = np.array([len(one) for one in slots], dtype=np.int64)  # [B], new tokens included
        self._tail = np.empty((len(tails), int(self._tail_lengths.max()) + 16), dtype=np.int64)
        for index, one in enumerate(slots):
            self._tail[index] = one[0]
            self._tail[index, : len(one)] = one
        if self.windows:
            self._tail_positions = np.full(self._tail.shape, PADDING)
            for index, tail in enumerate(tails):
                positions = [np.arange(piece.start, piece.start + len(piece.slots)) for piece in tail]
                self._tail_positions[index, : len(slots[index])] = np.concatenate(positions)

    def _grow_tails(self, rows: list[Row]) -> None:
        slots = [self.tree.slots(row.handle)[row.stored] for row in rows]
        full = int(self._tail_lengths.max()) == self._tail.shape[1]
        if full:
            padding = np.repeat(self._tail[:, :1], self._tail.shape[1], axis=1)
            self._tail = np.concatenate([self._tail, padding], axis=1)
        self._tail[self._row_index, self._tail_lengths] = slots
        self._starts += 1
        if self.windows:
            if full:
                padding = np.full_like(self._tail_positions, PADDING)
                self._tail_positions = np.concatenate([self._tail_positions, padding], axis=1)
            self._tail_positions[self._row_index, self._tail_lengths] = self._starts
        self._tail_lengths += 1
        self._distinct_tokens += len(rows)

    # ------------------------------------------------------------------ tensors

    def _layout(self, rows: list[Row], decoding: bool) -> TreeLayout:
        length = int(self._tail_lengths.max())
        new = np.ones(len(rows), dtype=np.int64) if decoding else np.array([row.new for row in rows], dtype=np.int64)
        num_queries = int(new.max())
        before = self._tail_lengths - new  # tail tokens that all of a row's new tokens see
        query_index = packed_index = None
        if decoding:
            positions, last_index = self._starts, self._row_index
            write_slots = self._tail[self._row_index, before]
        else:
            offsets = np.concatenate([np.arange(count) for count in new])
            owners = np.repeat(self._row_index, new)
            positions = self._starts[owners] + offsets
            write_slots = self._tail[owners, before[owners] + offsets]
            last_index = np.cumsum(new) - 1
            if (new < num_queries).any():
                steps = np.minimum(np.arange(num_queries)[None], new[:, None] - 1)  # padding repeats the last query
                query_index = self._tensor((np.cumsum(new) - new)[:, None] + steps)
                packed_index = self._tensor(owners * num_queries + offsets)
        causal = not before.any() and query_index is None
        layout = TreeLayout(
            position_ids=self._tensor(positions),
            write_slots=self._slots(write_slots),
            segments=self._segments,
            tail_slots=self._tensor(self._tail[:, :length]),
            tail_bias=None if causal else self._bias(before, new, num_queries, length),
            tail_causal=causal,
            tail_blocks=self._blocks(self._tail_lengths),
            query_index=query_index,
            packed_index=packed_index,
            last_index=self._tensor(last_index),
            num_rows=len(rows),
            num_queries=num_queries,
            distinct_tokens=self._distinct_tokens,
        )
        if not self.windows:
            return layout
        return replace(layout, windowed={one: self._through(one, layout, positions, new) for one in self.windows})

    def _through(self, window: int, layout: TreeLayout, positions: IntArray, new: IntArray) -> TreeLayout | None:
        """The layout without what a window hides, None where that is nothing.

        Args:
            window: Tokens that each new one sees, itself included.
            layout: Of whole paths.
            positions: Path position of each new token. Shape [T].
            new: New tokens of each row. Shape [B].
        """
        if int(positions.max()) < window:
            return None
        segments, distinct = [], 0
        for run, whole in zip(self._runs, layout.segments, strict=True):
            if (cut := cut_run(run, positions, window)) is not None:
                part, hidden = cut
                segments.append(whole if part is run else self._segment(part, hidden))
                distinct += len(part.slots)
        length = int(self._tail_lengths.max())
        tails = Tails(self._tail[:, :length], self._tail_positions[:, :length], self._tail_lengths)
        tails = cut_tails(tails, self._starts - window + 1)
        causal = layout.query_index is None and bool((tails.lengths == new).all()) and layout.num_queries <= window
        own = self._starts[:, None] + np.minimum(np.arange(layout.num_queries)[None], new[:, None] - 1)  # [B, Q]
        distance = own[:, :, None] - tails.positions[:, None]  # [B, Q, L], of each query to each tail token
        hidden = (distance < 0) | (distance >= window)
        return replace(
            layout,
            segments=tuple(segments),
            tail_slots=self._tensor(tails.slots),
            tail_bias=None if causal or not hidden.any() else self._hide(hidden),
            tail_causal=causal,
            tail_blocks=self._blocks(tails.lengths),
            distinct_tokens=distinct + len(np.unique(tails.slots)),
        )

    def _segment(self, run: Run, hidden: IntArray | None = None) -> Segment:
        return Segment(
            queries=None if len(run.queries) == self._num_tokens else self._tensor(run.queries),
            slots=self._slots(run.slots),
            hidden=None if hidden is None else self._tensor(hidden),
        )

    def _blocks(self, tail_lengths: IntArray) -> tuple[Block, ...]:
        lengths: list[int] = tail_lengths.tolist()
        if self._block_tokens is None:
            return (Block(0, len(lengths), max(lengths)),)
        blocks: list[Block] = []
        start = longest = 0
        for row, length in enumerate(lengths):
            if row > start and max(longest, length) * (row + 1 - start) > self._block_tokens:
                blocks.append(Block(start, row, longest))
                start, longest = row, 0
            longest = max(longest, length)
        return (*blocks, Block(start, len(lengths), longest))

    def _bias(self, before: IntArray, new: IntArray, num_queries: int, length: int) -> torch.Tensor | None:
        if num_queries == 1 and (before == length - 1).all():
            return None  # every tail is full length, and one query sees all of it
        last_seen = before[:, None] + np.minimum(np.arange(num_queries)[None], new[:, None] - 1)  # [B, Q]
        return self._hide(np.arange(length)[None, None] > last_seen[:, :, None])

    def _hide(self, hidden: NDArray[np.bool_]) -> torch.Tensor:
        bias = torch.zeros((len(hidden), 1, *hidden.shape[1:]), dtype=self._bias_dtype)
        return bias.masked_fill_(torch.from_numpy(hidden)[:, None], float("-inf")).to(self._device)

    def _tensor(self, array: IntArray) -> torch.Tensor:
        return torch.from_numpy(array.copy()).to(self._device)

    def _slots(self, slots: IntArray) -> torch.Tensor | slice:
        if len(slots) == 1 or (slots[-1] - slots[0] == len(slots) - 1 and (np.diff(slots) == 1).all()):
            return slice(int(slots[0]), int(slots[-1]) + 1)
        return self._tensor(slots)


def _runs(path: list[int], below: dict[int, list[int]]) -> list[list[int]]:
    """Split a root-to-leaf path where the number of readers changes; the readers of a child are among its parent's."""
    runs: list[list[int]] = []
    for node in path:
        if runs and len(below[runs[-1][0]]) == len(below[node]):
            runs[-1].append(node)
        else:
            runs.append([node])
    return runs
