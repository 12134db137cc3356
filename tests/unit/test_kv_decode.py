"""Layouts of decode passes: whatever rows grow, leave and join, they say what a layout planned anew says."""

from __future__ import annotations

import random

import pytest

from ets_engine.attention.reference import visible_slots
from ets_engine.kv import DecodeLayout, DecodeLayoutBuilder, KVPool, LayerShape, LayoutBuilder, PrefixTree, Row

WINDOWS = (7, 30)


def seen(layout: DecodeLayout, window: int | None) -> list[list[int]]:
    """The slots that each row sees, sorted."""
    slots, queries, query, first, stop = layout.within(window)
    assert queries.min() >= 1 and queries.sum() == len(query)
    found: list[list[int]] = [[] for _ in layout.positions]
    for row, begin, end in zip(query.tolist(), first.tolist(), stop.tolist(), strict=True):
        assert begin < end
        found[row] += slots[begin:end].tolist()
    assert all(len(one) == len(set(one)) for one in found), "no slot is seen twice"
    return [sorted(one) for one in found]


def check(tree: PrefixTree, leaves: list[int], layout: DecodeLayout, min_saved_tokens: int) -> None:
    builder = LayoutBuilder(tree, min_saved_tokens=min_saved_tokens, windows=WINDOWS)
    expected = builder.build([Row(leaf, tree.num_tokens(leaf) - 1, 1) for leaf in leaves])
    assert layout.positions.tolist() == expected.position_ids.tolist()
    write = expected.write_slots
    assert layout.write_slots.tolist() == (
        list(range(write.start, write.stop)) if isinstance(write, slice) else write.tolist()
    )
    for window in (None, *WINDOWS):
        within = expected.within(window)
        assert seen(layout, window) == [sorted(slots) for slots in visible_slots(within)]
        assert layout.distinct_tokens[window] == len({slot for row in visible_slots(within) for slot in row})
    assert layout.distinct_tokens[None] == expected.distinct_tokens


@pytest.mark.parametrize("min_saved_tokens", [0, 20, 10**9], ids=["segments", "some", "tails"])
@pytest.mark.parametrize("seed", range(4))
def test_a_layout_that_grew_says_what_one_planned_anew_says(seed: int, min_saved_tokens: int) -> None:
    rng = random.Random(seed)
    tree = PrefixTree(KVPool([LayerShape(1, 8)], page_tokens=4))
    builder = DecodeLayoutBuilder(LayoutBuilder(tree, min_saved_tokens=min_saved_tokens, windows=WINDOWS))
    root = tree.root()
    tree.append(root, rng.randrange(1, 25))
    live = [tree.fork(root)]
    for _ in range(40):
        choice = rng.random()
        if choice < 0.15:  # some end, others fork
            parents = rng.sample(live, min(len(live), 4))
            children = [tree.fork(parent) for parent in parents for _ in range(rng.randrange(1, 4))]
            for leaf in live:
                tree.release(leaf)
            live = children
        elif choice < 0.5 and len(live) > 1:  # some end
            gone = set(rng.sample(live, rng.randrange(1, len(live))))
            for leaf in gone:
                tree.release(leaf)
            live = [leaf for leaf in live if leaf not in gone]
        elif choice < 0.55:
            rng.shuffle(live)
        for leaf in live:
            tree.append(leaf, 1)
        check(tree, live, builder.build(live), min_saved_tokens)


def test_a_token_taken_back_is_noticed() -> None:
    tree = PrefixTree(KVPool([LayerShape(1, 8)], page_tokens=1))
    root = tree.root()
    tree.append(root, 3)
    left, right = tree.fork(root), tree.fork(root)
    builder = DecodeLayoutBuilder(LayoutBuilder(tree, windows=WINDOWS))
    for leaf in (left, right):
        tree.append(leaf, 1)
    builder.build([left, right])
    for leaf in (left, right):
        tree.truncate(leaf, 0)
    for leaf in (right, left):  # which takes the pages the other way round
        tree.append(leaf, 1)
    check(tree, [left, right], builder.build([left, right]), 0)


def test_most_passes_plan_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = PrefixTree(KVPool([LayerShape(1, 8)]))
    layouts = LayoutBuilder(tree)
    builder = DecodeLayoutBuilder(layouts)
    planned, usual = [], layouts.plan
    monkeypatch.setattr(layouts, "plan", lambda handles: planned.append(len(handles)) or usual(handles))
    root = tree.root()
    tree.append(root, 3)
    live = [tree.fork(root) for _ in range(6)]
    for _ in range(20):
        for leaf in live:
            tree.append(leaf, 1)
        builder.build(live)
        if len(live) > 1:
            tree.release(live.pop(2 % len(live)))
    assert planned == [6]
