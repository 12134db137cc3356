"""A layout cut into tiles of like size for a kernel: which queries read which stretch of K/V; it knows no device.

A shared segment and a row's tail are the same thing here, a *piece*: a list of slots, and queries that each see an
interval of it. A piece is cut both ways: its queries into blocks that fit a tile's height once their heads are stacked
(all query heads of a KV head read the same K/V), its slots into chunks (split-KV, as in Flash-Decoding), so that few
long pieces fill a device as well as many short ones do (DeFT, arXiv 2404.00242). A query that several tiles work on
leaves a partial result in each; they lie side by side and are merged in a fixed order, so results are deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ets_engine.attention.api import AttentionLayout

# Runs of slots, one after the other ([U]); how many queries see some of each run, >= 1 ([P]); and run after run those
# queries, and the interval of the slots that each sees, not empty ([F] x 3).
Pieces = tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]

IntArray = NDArray[np.int32]

ALIGN = 16  # tokens; chunks are multiples of it
SHARES = (5 / 4, 1, 5 / 8, 1 / 2, 1 / 3, 1 / 4)  # longest chunks to choose from, in even shares of all slots
WIDTH = 4  # numbers of a tile, of an entry and of a merge


class Tiles(NamedTuple):
    """Tiles of one height: `start` and `stop` in `WorkList.numbers`, and rows (queries x heads of a group) of each."""

    height: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class WorkList:
    """The work of one forward pass, the same in all its layers of one grouping; all tensors are views of one buffer.

    Counts are rounded up (`bucket`) and the rest is zeros: tiles, entries and merges that read and write nothing. Two
    work lists of equal `shape` launch alike, so `numbers` of one may be copied over another's, e.g. before a CUDA graph
    is replayed.

    Attributes:
        numbers: Everything below, one after the other. Shape [N], int32.
        slot_count, entry_count, merge_count: Rounded counts.
        parts: The tiles, by height.
        partials: Partial results that tiles leave behind (count, rounded).
        group: Query heads of one KV head.
    """

    numbers: torch.Tensor
    slot_count: int
    entry_count: int
    merge_count: int
    parts: tuple[Tiles, ...]
    partials: int
    group: int

    @property
    def slots(self) -> torch.Tensor:
        """The slots of all pieces, one after the other. Shape [U]."""
        return self.numbers[: self.slot_count]

    @property
    def entries(self) -> torch.Tensor:
        """A tile's queries: query, the interval of `slots` it sees, its partial result or -1 = the output. [E, 4]."""
        return self._table(self.slot_count, self.entry_count)

    @property
    def merges(self) -> torch.Tensor:
        """Queries with several partial results: query, the interval of partial results, 0. Shape [M, 4]."""
        return self._table(self.slot_count + WIDTH * self.entry_count, self.merge_count)

    @property
    def shape(self) -> tuple[object, ...]:
        """All that a launch depends on besides numbers."""
        return self.slot_count, self.entry_count, self.merge_count, self.parts, self.partials, self.group

    def tiles(self, part: Tiles) -> torch.Tensor:
        """Tiles of one height: the interval of `slots` to read, the first entry and how many. Shape [N, 4]."""
        return self._table(part.start, (part.stop - part.start) // WIDTH)

    def to(self, device: torch.device) -> WorkList:
        """The same on another device, in one copy."""
        return replace(self, numbers=self.numbers.to(device))

    def over(self, numbers: torch.Tensor) -> WorkList:
        """The same shape over other numbers ([N]), e.g. those that a CUDA graph reads."""
        return replace(self, numbers=numbers)

    def _table(self, start: int, count: int) -> torch.Tensor:
        return self.numbers[start : start + WIDTH * count].view(count, WIDTH)


def plan_work(
    layout: AttentionLayout,
    *,
    group: int,
    tiles_wanted: int | Sequence[int],
    heights: Sequence[int] = (16, 64, 128),
    min_chunk: int = 128,
    min_saved: int = 0,
) -> WorkList:
    """Cut a layout into tiles.

    Pieces with few queries go to tiles of the lowest height, all others to the next one that holds the largest, or to
    the highest. Those are a launch of their own, which the low tiles wait for, so where they would save little reading
    all pieces of the pass go to low ones. Chunks are as long as lets the device finish soonest (`_longest_chunk`), but
    not below `min_chunk`, nor below two slots for each row of a tile: a partial result is as long as a value and counts
    twice, written and read.

    Args:
        layout: Who sees what; its tensors are read on the CPU (a layout that lies elsewhere is copied).
        group: Query heads of one KV head, 1..heights[-1].
        tiles_wanted: Tiles that fill the device once, all KV heads apart (count), >= 1; one number, or one of each
            height.
        heights: Rows of a tile, ascending.
        min_chunk: Shortest stretch of slots worth a tile of its own (tokens), >= 1.
        min_saved: Slots that tall tiles must save low ones from reading again (tokens), >= 0, all of the pass together;
            counted as if each low tile read its whole piece, and tall ones read it once.

    Returns:
        On the CPU. Longest tiles first; tiles that read the same chunk side by side.

    Raises:
        ValueError: the group does not fit the tiles, or a query sees none of its tail, or not one interval of it.

    Example:
        >>> from ets_engine.kv import KVPool, LayerShape, LayoutBuilder, PrefixTree, Row
        >>> tree = PrefixTree(KVPool([LayerShape(1, 8)], page_tokens=4))
        >>> prompt = tree.root()
        >>> slots = tree.append(prompt, 4)
        >>> left, right = tree.fork(prompt), tree.fork(prompt)
        >>> slots = tree.append(left, 1), tree.append(right, 1)
        >>> layout = LayoutBuilder(tree, min_saved_tokens=1).build([Row(left, 0, 1), Row(right, 0, 1)])
        >>> work = plan_work(layout, group=1, tiles_wanted=1)
        >>> work.slots[:6].tolist(), work.tiles(work.parts[0])[:3].tolist()
        ([0, 1, 2, 3, 4, 8], [[0, 4, 0, 2], [4, 5, 2, 1], [5, 6, 3, 1]])
        >>> work.entries[:4].tolist(), work.merges[:2].tolist()
        ([[0, 0, 4, 0], [1, 0, 4, 2], [0, 4, 5, 1], [1, 5, 6, 3]], [[0, 0, 2, 0], [1, 2, 4, 0]])
    """
    return plan_pieces(
        flatten(layout),
        group,
        tiles_wanted=tiles_wanted,
        heights=heights,
        min_chunk=min_chunk,
        min_saved=min_saved,
    )


def plan_pieces(
    pieces: Pieces,
    group: int,
    *,
    tiles_wanted: int | Sequence[int],
    heights: Sequence[int] = (16, 64, 128),
    min_chunk: int = 128,
    min_saved: int = 0,
    room: int = 0,
) -> WorkList:
    """`plan_work` for who sees what as flat arrays.

    Args:
        pieces: Who sees what.
        group: See `plan_work`, as the next four.
        tiles_wanted: That fill the device once.
        heights: Of tiles.
        min_chunk: Of slots.
        min_saved: Of slots too.
        room: Queries that the counts of a small work list are rounded up for, so that all passes over about as many
            queries launch alike.
    """
    if group > heights[-1]:
        raise ValueError(f"{group} query heads for each KV head do not fit tiles of {heights[-1]} rows")
    slots, queries, *columns = (np.asarray(one, dtype=np.int32) for one in pieces)
    seen, begin = _Seen(*columns), _starts(queries)
    rows = queries * group
    lowest, tallest = (
        next((height for height in heights if height >= most), heights[-1]) for most in (group, rows.max())
    )
    narrow = (rows <= lowest) | (lowest == tallest)
    if not narrow.all():
        length = np.maximum.reduceat(seen.stop, begin) - np.minimum.reduceat(seen.first, begin)
        again = -(-queries // (lowest // group)) - 1  # times that low tiles would read a piece once more
        narrow |= int((again * length.astype(np.int64))[~narrow].sum()) < min_saved
    wanted = [tiles_wanted] * len(heights) if isinstance(tiles_wanted, int) else tiles_wanted
    tables: list[tuple[int, IntArray]] = []
    entries: list[IntArray] = []
    for height, chosen in ((tallest, ~narrow), (lowest, narrow)):
        if chosen.any():
            some = _Pieces(begin[chosen], queries[chosen])
            at_once = wanted[heights.index(height)]
            tiles, found = _cut(some, seen, height // group, at_once, max(min_chunk, 2 * height))
            tiles[:, 2] += sum(map(len, entries))
            tables.append((height, tiles))
            entries.append(found)
    listed = np.concatenate(entries)
    merges, partials = _give_targets(listed)
    return _pack(slots, listed, merges, tables, partials, group, room)


def bucket(count: int) -> int:
    """`count` rounded up to a power of two, at least 16, so that few shapes come about; 0 stays 0."""
    return 1 << max(4, (count - 1).bit_length()) if count else 0


class _Pieces(NamedTuple):
    """Where each piece's queries begin in `_Seen`, and how many they are. Shape [P] each."""

    begin: IntArray
    queries: IntArray


class _Seen(NamedTuple):
    """The queries of all pieces, and the interval of the flat slots that each sees. Shape [F] each."""

    query: IntArray
    first: IntArray
    stop: IntArray


def flatten(layout: AttentionLayout) -> Pieces:
    """A layout as pieces: its segments, then its tails."""
    tail = _array(layout.tail_slots)  # [B, L]
    first, stop, owner = _seen_of_tails(layout, tail.shape[1])
    per_row = np.bincount(owner, minlength=len(tail)).astype(np.int32)  # queries of each row, packed in order
    lengths = np.maximum.reduceat(stop, _starts(per_row))  # [B]
    everyone = torch.arange(len(owner), device=layout.tail_slots.device)
    shared: list[torch.Tensor] = []
    seers: list[torch.Tensor] = []
    hidden: list[torch.Tensor] = []
    for one in layout.segments:
        slots = one.slots
        if isinstance(slots, slice):
            slots = torch.arange(slots.start, slots.stop, device=everyone.device)
        shared.append(slots)
        seers.append(everyone if one.queries is None else one.queries)
        hidden.append(torch.zeros_like(seers[-1]) if one.hidden is None else one.hidden)
    slot_count = np.array([*map(len, shared), *lengths], dtype=np.int32)  # of each piece, segments first
    query_count = np.array([*map(len, seers), *per_row], dtype=np.int32)
    base = np.repeat(_starts(slot_count), query_count)
    whole = np.repeat(slot_count[: len(shared)], query_count[: len(shared)])
    flat = np.concatenate([_flat(shared), tail[np.arange(tail.shape[1]) < lengths[:, None]]])
    query = np.concatenate([_flat(seers), np.arange(len(owner), dtype=np.int32)])
    first, stop = np.concatenate([_flat(hidden), first]), np.concatenate([whole, stop])
    return flat, query_count, query, base + first, base + stop


def _seen_of_tails(layout: AttentionLayout, length: int) -> tuple[IntArray, IntArray, IntArray]:
    """First and one after the last tail token that each packed query sees, and its row. Shape [T] each."""
    num_rows, num_queries = layout.num_rows, layout.num_queries
    if layout.packed_index is None:
        place = np.arange(num_rows * num_queries, dtype=np.int32)
    else:
        place = _array(layout.packed_index)
    owner, step = np.divmod(place, np.int32(num_queries))
    if layout.tail_bias is not None:
        visible = (layout.tail_bias.cpu() == 0).numpy().reshape(num_rows * num_queries, -1)  # [B * Q, L]
        first = visible.argmax(-1)
        stop = visible.shape[1] - visible[:, ::-1].argmax(-1)
        wrong = np.flatnonzero(np.count_nonzero(visible, axis=-1) != stop - first)  # 0 seen: stop - first = L
        if len(wrong := wrong[np.isin(wrong, place)]):
            raise ValueError(
                f"query {wrong[0] % num_queries} of row {wrong[0] // num_queries} does not see one interval of its "
                "tail; a work list cannot hold that, use implementation='eager'"
            )
        first, stop = first[place].astype(np.int32), stop[place].astype(np.int32)
    elif layout.tail_causal:
        first, stop = np.zeros_like(step), step + np.int32(1)
    else:
        first, stop = np.zeros_like(step), np.full_like(step, length)
    return first, stop, owner


def _cut(pieces: _Pieces, seen: _Seen, queries_of_tile: int, at_once: int, min_chunk: int) -> tuple[IntArray, IntArray]:
    """Tiles [N, 4] of some pieces and their entries [E, 4], targets still 0."""
    blocks_of = -(-pieces.queries // queries_of_tile)
    piece = np.repeat(np.arange(len(blocks_of), dtype=np.int32), blocks_of)  # of each block
    within = _ranges(np.zeros_like(blocks_of), blocks_of) * queries_of_tile
    start = pieces.begin[piece] + within  # of each block, in `seen`
    count = np.minimum(pieces.queries[piece] - within, queries_of_tile)
    members = _ranges(start, count)
    begin = np.minimum.reduceat(seen.first[members], _starts(count))
    length = np.maximum.reduceat(seen.stop[members], _starts(count)) - begin
    chunk = _chunks(length, _longest_chunk(length, at_once, min_chunk))
    chunks_of = -(-length // chunk)
    block = np.repeat(np.arange(len(chunks_of), dtype=np.int32), chunks_of)  # of each tile
    order = _ranges(np.zeros_like(chunks_of), chunks_of)
    tile_start = begin[block] + order * chunk[block]
    tile_stop = np.minimum(tile_start + chunk[block], (begin + length)[block])
    member = _ranges(start[block], count[block])
    tile = np.repeat(np.arange(len(block), dtype=np.int32), count[block])
    meets = (seen.first[member] < tile_stop[tile]) & (seen.stop[member] > tile_start[tile])
    member, tile = member[meets], tile[meets]
    entries_of = np.bincount(tile, minlength=len(block)).astype(np.int32)
    entries = np.stack([seen.query[member], seen.first[member], seen.stop[member], np.zeros_like(member)], axis=1)
    tiles = np.stack([tile_start, tile_stop, _starts(entries_of), entries_of], axis=1)
    best = np.lexsort((block, tile_start, piece[block], tile_start - tile_stop))
    return tiles[best], entries


def _longest_chunk(length: IntArray, at_once: int, min_chunk: int) -> int:
    """The longest chunk that blocks of some lengths [B] are best cut into, as if so many tiles ran at once.

    Tiles run longest first, in rounds, each as long as its first tile and the time of `min_chunk` slots more, in which
    a tile finds out what it reads and leaves its result. Few long chunks pay that seldom; many short ones fill the last
    round. The longer of two that take as long, which leaves fewer results to merge.
    """
    share = int(length.sum()) / at_once
    ladder = (-(-max(min_chunk, math.ceil(share * part)) // ALIGN) * ALIGN for part in SHARES)
    candidates = sorted(set(ladder), reverse=True)
    if candidates[-1] >= length.max():
        return candidates[-1]  # cuts nothing
    chunk = _chunks(length, np.array(candidates, dtype=np.int32)[:, None])  # [C, B]
    tiles = -(-length // chunk)
    order = np.argsort(-chunk, axis=1)
    chunk, tiles = np.take_along_axis(chunk, order, 1), np.take_along_axis(tiles, order, 1)
    rounds = -(-tiles.cumsum(axis=1) // at_once)  # that have begun up to the tiles of a block
    begun = np.diff(rounds, axis=1, prepend=0)  # with a tile of it
    took = (begun * chunk).sum(axis=1) + min_chunk * rounds[:, -1]
    return candidates[int(took.argmin())]


def _chunks(length: IntArray, longest: int | IntArray) -> IntArray:
    """How long the chunks of each block are, as even as can be, if none is longer than a multiple of `ALIGN`.

    Of each block [B], for one such multiple; or for several [C, 1], then [C, B].
    """
    chunk = -(-length // -(-length // longest))
    return -(-chunk // ALIGN) * ALIGN


def _give_targets(entries: IntArray) -> tuple[IntArray, int]:
    """Number the partial results by query, in place; the merges [M, 4] and how many results there are."""
    query = entries[:, 0]
    counts = np.bincount(query).astype(np.int32)  # [T]
    kept = np.where(counts > 1, counts, 0).astype(np.int32)
    start = _starts(kept)
    by_query = np.argsort(query, kind="stable")
    targets = _ranges(start, counts)
    targets[np.repeat(counts == 1, counts)] = -1
    entries[by_query, 3] = targets
    merged = np.flatnonzero(kept).astype(np.int32)
    merges = np.stack([merged, start[merged], start[merged] + kept[merged], np.zeros_like(merged)], axis=1)
    return merges, int(kept.sum())


def _pack(
    slots: IntArray,
    entries: IntArray,
    merges: IntArray,
    tables: list[tuple[int, IntArray]],
    partials: int,
    group: int,
    room: int,
) -> WorkList:
    slot_count, entry_count = bucket(max(len(slots), 64 * room)), bucket(max(len(entries), 4 * room))
    merge_count = bucket(max(len(merges), room))
    stop = slot_count + WIDTH * (entry_count + merge_count)
    parts: list[Tiles] = []
    for i, (height, tiles) in enumerate(tables):
        least = room if i == len(tables) - 1 else 0  # rows of their own; tall tiles come in few counts anyway
        parts.append(Tiles(height, stop, stop + WIDTH * bucket(max(len(tiles), least))))
        stop = parts[-1].stop
    count = bucket(max(partials, 4 * room))
    numbers = np.zeros(stop, dtype=np.int32)
    entry_start = slot_count
    merge_start = entry_start + WIDTH * entry_count
    placed = [(0, slots), (entry_start, entries), (merge_start, merges)]
    placed += [(part.start, tiles) for part, (_, tiles) in zip(parts, tables, strict=True)]
    for start, array in placed:
        numbers[start : start + array.size] = array.ravel()
    return WorkList(torch.from_numpy(numbers), slot_count, entry_count, merge_count, tuple(parts), count, group)


def _flat(tensors: list[torch.Tensor]) -> IntArray:
    return _array(torch.cat(tensors)) if tensors else np.zeros(0, dtype=np.int32)


def _array(tensor: torch.Tensor) -> IntArray:
    return tensor.cpu().numpy().astype(np.int32)


def _starts(counts: IntArray) -> IntArray:
    """Where each of some runs begins when they lie one after the other."""
    return (counts.cumsum() - counts).astype(np.int32)


def _ranges(starts: IntArray, counts: IntArray) -> IntArray:
    """`starts[i], starts[i] + 1, ...`, `counts[i]` numbers of each, one after the other."""
    total = int(counts.sum())
    return np.arange(total, dtype=np.int32) + np.repeat(starts - _starts(counts), counts)
