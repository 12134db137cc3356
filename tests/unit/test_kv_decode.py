"""Layouts of decode passes, and the work lists that go on with them: whatever rows grow, leave and join."""

from __future__ import annotations

import random
from functools import partial

import pytest

from ets_engine.attention.growing import GrowingWork
from ets_engine.attention.reference import visible_slots
from ets_engine.attention.work import ALIGN, WorkList, plan_pieces
from ets_engine.kv import DecodeLayout, DecodeLayoutBuilder, KVPool, LayerShape, LayoutBuilder, PrefixTree, Row
from ets_engine.kv.decode import SPARE_TOKENS, Pieces


class Seen:
    """What each row of the last pass saw, by window, as its layouts tell them one after the other.

    Attributes:
        rows: The slots.
        works: What a kernel reads, made once and then brought up to date.
        laid_out: Rows of each layout that did not go on from the one before.
    """

    def __init__(self, group: int = 1, tiles_wanted: int = 4) -> None:
        self.rows: dict[int | None, list[list[int]]] = {}
        self.works: dict[int | None, GrowingWork] = {}
        self.laid_out: list[int] = []
        self._plan = partial(
            plan_pieces, group=group, tiles_wanted=tiles_wanted, heights=(2, 8), min_chunk=ALIGN, min_saved=40
        )

    def take(self, layout: DecodeLayout) -> None:
        num_rows = len(layout.positions)
        if layout.pieces is not None:
            self.laid_out.append(num_rows)
            self.rows = {window: read(pieces, num_rows) for window, pieces in layout.pieces.items()}
            self.works = {
                window: GrowingWork(self._plan(pieces), pieces.stop[-num_rows:])
                for window, pieces in layout.pieces.items()
            }
            return
        stay = range(num_rows) if layout.rows is None else layout.rows
        for window, rows in self.rows.items():
            self.rows[window] = [
                [*rows[row], slot] for row, slot in zip(stay, layout.write_slots.tolist(), strict=True)
            ]
        shapes = [growing.work.shape for growing in self.works.values()]
        for growing in self.works.values():
            if layout.rows is not None:
                growing.keep(layout.rows)
            growing.grow(layout.write_slots)
        assert [growing.work.shape for growing in self.works.values()] == shapes


def read(pieces: Pieces, num_rows: int) -> list[list[int]]:
    """The slots that each row sees."""
    slots, queries, query, first, stop = pieces
    assert queries.min() >= 1 and queries.sum() == len(query)
    assert query[-num_rows:].tolist() == list(range(num_rows)), "the last pieces are the rows' own"
    found: list[list[int]] = [[] for _ in range(num_rows)]
    for row, begin, end in zip(query.tolist(), first.tolist(), stop.tolist(), strict=True):
        assert begin < end
        found[row] += slots[begin:end].tolist()
    return found


def read_tiles(work: WorkList, num_rows: int) -> list[list[int]]:
    """The slots that tiles let each row see; every result goes to the output, or is merged, once."""
    slots, entries = work.slots.tolist(), work.entries.tolist()
    found: list[list[int]] = [[] for _ in range(num_rows)]
    targets: list[list[int]] = [[] for _ in range(num_rows)]
    for part in work.parts:
        for begin, end, first_entry, count in work.tiles(part).tolist():
            for query, first, stop, target in entries[first_entry : first_entry + count]:
                found[query] += slots[max(begin, first) : min(end, stop)]
                targets[query].append(target)
    merged = {query: list(range(start, stop)) for query, start, stop, _ in work.merges.tolist() if stop > start}
    assert merged == {row: sorted(of_row) for row, of_row in enumerate(targets) if of_row != [-1]}
    results = [target for of_row in targets for target in of_row if target >= 0]
    assert len(set(results)) == len(results) and all(result < work.partials for result in results)
    return found


def check(tree: PrefixTree, leaves: list[int], layout: DecodeLayout, seen: Seen, layouts: LayoutBuilder) -> None:
    """It says what a layout planned anew says, to those who read pieces and to those who read tiles."""
    expected = layouts.build([Row(leaf, tree.num_tokens(leaf) - 1, 1) for leaf in leaves])
    assert layout.positions.tolist() == expected.position_ids.tolist()
    write = expected.write_slots
    assert layout.write_slots.tolist() == (
        list(range(write.start, write.stop)) if isinstance(write, slice) else write.tolist()
    )
    seen.take(layout)
    for window in (None, *layouts.windows):
        visible = visible_slots(expected.within(window))
        for told in (seen.rows[window], read_tiles(seen.works[window].work, len(leaves))):
            assert [sorted(slots) for slots in told] == [sorted(slots) for slots in visible]
        seen.works[window].check_integrity()
        assert layout.distinct_tokens[window] == len({slot for row in visible for slot in row})
    assert layout.distinct_tokens[None] == expected.distinct_tokens


@pytest.mark.parametrize("windows", [(), (7, 30), (60, 200)], ids=["no-window", "windows-hide", "windows-hide-late"])
@pytest.mark.parametrize("min_saved_tokens", [0, 20, 10**9], ids=["segments", "some", "tails"])
@pytest.mark.parametrize("seed", range(3))
def test_a_layout_that_grew_says_what_one_planned_anew_says(
    seed: int, min_saved_tokens: int, windows: tuple[int, ...]
) -> None:
    rng = random.Random(seed)
    tree = PrefixTree(KVPool([LayerShape(1, 8)], page_tokens=4))
    anew, kept = (LayoutBuilder(tree, min_saved_tokens=min_saved_tokens, windows=windows) for _ in range(2))
    builder, seen = DecodeLayoutBuilder(kept), Seen(group=rng.randrange(1, 5), tiles_wanted=rng.randrange(1, 30))
    root = tree.root()
    tree.append(root, rng.randrange(1, 25))
    live = [tree.fork(root)]
    for _ in range(60):
        choice = rng.random()
        if choice < 0.1:  # some end, others fork
            parents = rng.sample(live, min(len(live), 4))
            children = [tree.fork(parent) for parent in parents for _ in range(rng.randrange(1, 12))]
            for leaf in live:
                tree.release(leaf)
            live = children
        elif choice < 0.5 and len(live) > 1:  # some end
            gone = set(rng.sample(live, min(rng.choice([1, 1, 2, len(live) // 2]), len(live) - 1)))
            for leaf in gone:
                tree.release(leaf)
            live = [leaf for leaf in live if leaf not in gone]
        elif choice < 0.53:
            rng.shuffle(live)
        for leaf in live:
            tree.append(leaf, 1)
        check(tree, live, builder.build(live), seen, anew)
    assert len(seen.laid_out) < 40 or windows == (7, 30)


def test_a_token_taken_back_is_noticed() -> None:
    tree = PrefixTree(KVPool([LayerShape(1, 8)], page_tokens=1))
    root = tree.root()
    tree.append(root, 3)
    left, right = tree.fork(root), tree.fork(root)
    builder, seen = DecodeLayoutBuilder(LayoutBuilder(tree, windows=(7,))), Seen()
    for leaf in (left, right):
        tree.append(leaf, 1)
    seen.take(builder.build([left, right]))
    for leaf in (left, right):
        tree.truncate(leaf, 0)
    for leaf in (right, left):  # which takes the pages the other way round
        tree.append(leaf, 1)
    check(tree, [left, right], builder.build([left, right]), seen, LayoutBuilder(tree, windows=(7,)))


def grow(tree: PrefixTree, builder: DecodeLayoutBuilder, leaves: list[int]) -> DecodeLayout:
    for leaf in leaves:
        tree.append(leaf, 1)
    return builder.build(leaves)


def test_most_passes_plan_nothing_and_lay_nothing_out(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = PrefixTree(KVPool([LayerShape(1, 8)]))
    layouts = LayoutBuilder(tree)
    builder, seen = DecodeLayoutBuilder(layouts), Seen()
    planned, usual = [], layouts.plan
    monkeypatch.setattr(layouts, "plan", lambda handles: planned.append(len(handles)) or usual(handles))
    root = tree.root()
    tree.append(root, 3)
    live = [tree.fork(root) for _ in range(20)]
    for _ in range(20):
        seen.take(grow(tree, builder, live))
        if len(live) > 1:
            tree.release(live.pop(2 % len(live)))
    assert planned == [20]
    assert seen.laid_out == [20, 17, 14, 12, 10, 8, 6, 5, 4, 3, 2, 1], "where more than an eighth left"


def test_rows_are_laid_out_anew_when_their_room_is_used_up() -> None:
    tree = PrefixTree(KVPool([LayerShape(1, 8)], page_tokens=4))
    layouts = LayoutBuilder(tree)
    builder, seen = DecodeLayoutBuilder(layouts), Seen()
    root = tree.root()
    tree.append(root, 3)
    leaves = [tree.fork(root) for _ in range(2)]
    for count in range(1, 3 * SPARE_TOKENS):
        check(tree, leaves, grow(tree, builder, leaves), seen, LayoutBuilder(tree))
        assert len(seen.laid_out) == -(-count // (SPARE_TOKENS + 1))
