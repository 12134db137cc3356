"""Layouts small enough to check by eye: pages of 4 tokens, so node n's first token lies at a multiple of 4."""

from __future__ import annotations

import pytest

from ets_engine.attention.reference import visible_slots
from ets_engine.errors import ConfigError
from ets_engine.kv import KVPool, LayerShape, LayoutBuilder, PrefixTree, Row


def small_tree() -> tuple[PrefixTree, int, int, int]:
    """Prompt [0..5] -> left [8, 9] and right []."""
    tree = PrefixTree(KVPool([LayerShape(1, 8)], page_tokens=4))
    prompt = tree.root()
    tree.append(prompt, 6)
    left, right = tree.fork(prompt), tree.fork(prompt)
    tree.append(left, 2)
    return tree, prompt, left, right


def test_a_decode_step() -> None:
    tree, _, left, right = small_tree()
    tree.append(left, 1)
    tree.append(right, 1)
    layout = LayoutBuilder(tree, min_saved_tokens=6).build([Row(left, 2, 1), Row(right, 0, 1)])
    assert layout.position_ids.tolist() == [8, 6]
    assert layout.write_slots.tolist() == [10, 12]
    assert [(segment.queries, segment.slots) for segment in layout.segments] == [(None, slice(0, 6))]
    assert layout.tail_slots.tolist() == [[8, 9, 10], [12, 12, 12]]
    assert layout.tail_bias[:, 0, 0].tolist() == [[0, 0, 0], [0, -float("inf"), -float("inf")]]
    assert layout.distinct_tokens == 6 + 3 + 1
    assert layout.query_index is None and layout.last_index.tolist() == [0, 1]


def test_sharing_that_saves_too_little_goes_to_the_tails() -> None:
    tree, _, left, right = small_tree()
    tree.append(left, 1)
    tree.append(right, 1)
    layout = LayoutBuilder(tree, min_saved_tokens=7).build([Row(left, 2, 1), Row(right, 0, 1)])
    assert layout.segments == ()
    assert layout.tail_slots[0].tolist() == [0, 1, 2, 3, 4, 5, 8, 9, 10]
    assert visible_slots(layout)[1] == [0, 1, 2, 3, 4, 5, 12]


def test_ragged_rows_are_padded_and_mapped_back() -> None:
    tree, _, left, right = small_tree()
    tree.append(left, 1)
    tree.append(right, 3)
    layout = LayoutBuilder(tree, min_saved_tokens=0).build([Row(left, 2, 1), Row(right, 0, 3)])
    assert layout.position_ids.tolist() == [8, 6, 7, 8]
    assert layout.query_index.tolist() == [[0, 0, 0], [1, 2, 3]]
    assert layout.packed_index.tolist() == [0, 3, 4, 5]
    assert layout.last_index.tolist() == [0, 3]
    assert visible_slots(layout)[1:] == [[*range(6), 12], [*range(6), 12, 13], [*range(6), 12, 13, 14]]


def test_groups_below_different_ancestors_get_segments_of_their_own() -> None:
    tree, _, left, right = small_tree()
    leaves = [tree.fork(left), tree.fork(left), tree.fork(right)]
    for leaf in leaves:
        tree.append(leaf, 1)
    layout = LayoutBuilder(tree, min_saved_tokens=1).build([Row(leaf, 0, 1) for leaf in leaves])
    first, second = layout.segments
    assert (first.queries, first.slots) == (None, slice(0, 6))
    assert (second.queries.tolist(), second.slots) == ([0, 1], slice(8, 10))
    assert layout.tail_slots.tolist() == [[12], [16], [20]] and layout.tail_bias is None


def test_a_prompt_reads_itself_causally_and_its_next_chunk_reads_it_in_place() -> None:
    tree = PrefixTree(KVPool([LayerShape(1, 8)], page_tokens=4))
    prompt = tree.root()
    tree.append(prompt, 9)
    builder = LayoutBuilder(tree)
    first, second = builder.build([Row(prompt, 0, 5)]), builder.build([Row(prompt, 5, 4)])
    assert first.tail_causal and first.tail_bias is None and first.segments == ()
    assert second.tail_causal and second.segments[0].slots == slice(0, 5)
    assert second.write_slots == slice(5, 9) and second.position_ids.tolist() == [5, 6, 7, 8]


def test_tails_are_read_by_blocks_that_fit_and_no_longer_than_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ets_engine.kv.layout.BLOCK_NUMBERS", 16 * 6)  # 6 tokens of 16 numbers
    tree = PrefixTree(KVPool([LayerShape(1, 8)], page_tokens=4))
    leaves = [tree.root() for _ in range(5)]
    for leaf, count in zip(leaves, (2, 3, 1, 9, 1), strict=True):
        tree.append(leaf, count)
    layout = LayoutBuilder(tree).build([Row(leaf, tree.num_tokens(leaf) - 1, 1) for leaf in leaves])
    assert layout.tail_blocks == ((0, 2, 3), (2, 3, 1), (3, 4, 9), (4, 5, 1))


def test_grown_layouts_equal_layouts_built_afresh() -> None:
    """Decoding reuses the last plan; 40 tokens pass page ends and the growth of the tail array."""
    tree, prompt, left, right = small_tree()
    third = tree.fork(prompt)
    builder = LayoutBuilder(tree, min_saved_tokens=6)
    for step in range(40):
        rows = [Row(leaf, tree.num_tokens(leaf), 1) for leaf in ((left, right, third) if step < 20 else (third, left))]
        for row in rows:
            tree.append(row.handle, 1)
        grown, fresh = builder.build(rows), LayoutBuilder(tree, min_saved_tokens=6).build(rows)
        assert grown.tail_blocks == fresh.tail_blocks
        for name in ("position_ids", "write_slots", "tail_slots", "last_index"):
            assert getattr(grown, name).tolist() == getattr(fresh, name).tolist(), (step, name)
        assert visible_slots(grown) == visible_slots(fresh)
        assert grown.distinct_tokens == fresh.distinct_tokens


def test_a_plan_that_was_being_grown_when_something_failed_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    tree, _, left, right = small_tree()
    builder = LayoutBuilder(tree)
    grow = builder._grow_tails
    for step in range(2):
        tree.append(left, 1)
        tree.append(right, 1)
        rows = [Row(left, 2 + step, 1), Row(right, step, 1)]
        monkeypatch.setattr(builder, "_grow_tails", lambda rows: (grow(rows), 1 / 0))
        if step == 1:
            with pytest.raises(ZeroDivisionError):
                builder.build(rows)
        layout = builder.build(rows)
    assert layout.position_ids.tolist() == [9, 7]
    assert [len(slots) for slots in visible_slots(layout)] == [10, 8]


def test_pages_come_contiguous_where_possible() -> None:
    pool = KVPool([LayerShape(1, 8)], page_tokens=4, initial_tokens=40)
    assert pool.allocate(3) == [0, 1, 2]
    assert pool.allocate(1) == [3]
    pool.free([1, 2])
    assert pool.allocate(3) == [4, 5, 6], "a run of 3 rather than the hole of 2"
    assert pool.allocate(1, after=6) == [7]
    assert pool.allocate(4) == [1, 2, 8, 9], "scattered before the pool grows"


def test_the_pool_doubles_and_keeps_what_it_holds() -> None:
    pool = KVPool([LayerShape(1, 8), LayerShape(2, 4)], page_tokens=4, initial_tokens=4)
    pool.allocate(1)
    pool.layers[1][0] = 7.0
    pool.allocate(2)
    assert pool.num_pages == 3 and pool.layers[0].shape == (12, 2, 1, 8)
    assert bool((pool.layers[1][0] == 7.0).all())
    assert pool.bytes_per_token == (2 * 8 + 2 * 8) * 4
    with pytest.raises(ValueError, match="twice"):
        pool.free([0, 0])
    with pytest.raises(ConfigError, match="one page of 4"):
        KVPool([LayerShape(1, 8)], page_tokens=4, max_tokens=3)
