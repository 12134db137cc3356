"""Layouts small enough to check by eye: pages of 4 tokens, so node n's first token lies at a multiple of 4."""

from __future__ import annotations

import pytest

from ets_engine.attention.reference import visible_slots
from ets_engine.errors import ConfigError
from ets_engine.kv import KVPool, LayerShape, LayoutBuilder, PrefixTree, Row
from ets_engine.kv.layout import Segment, TreeLayout


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


def deep_tree() -> tuple[PrefixTree, list[Row]]:
    """Prompt [0..5] -> left [8..11], and it goes on; right has 3 tokens of its own; each decodes one more."""
    tree, _, left, right = small_tree()
    tree.append(left, 2)
    leaf = tree.fork(left)
    for node, count in ((leaf, 1), (right, 4)):
        tree.append(node, count)
    return tree, [Row(leaf, 0, 1), Row(right, 3, 1)]


def readable(segment: Segment) -> tuple[list[int] | None, slice | list[int], list[int] | None]:
    """A segment's queries, slots and hidden tokens as plain values."""
    queries, slots, hidden = segment.queries, segment.slots, segment.hidden
    return (
        None if queries is None else queries.tolist(),
        slots if isinstance(slots, slice) else slots.tolist(),
        None if hidden is None else hidden.tolist(),
    )


def test_a_window_leaves_out_the_unseen_and_cuts_what_some_see() -> None:
    """Paths of 11 and 10 tokens; the queries are at positions 10 and 9, left's tokens at 6 to 9."""
    tree, rows = deep_tree()
    layout = LayoutBuilder(tree, min_saved_tokens=0, windows=[2, 5, 6, 7, 10, 11]).build(rows)
    assert [readable(one) for one in layout.segments] == [(None, slice(0, 6), None), ([0], slice(8, 12), None)]

    def seen(window: int) -> tuple[list[object], list[list[int]], int]:
        view: TreeLayout = layout.within(window)
        return [readable(one) for one in view.segments], view.tail_slots.tolist(), view.distinct_tokens

    assert seen(11)[0] == [(None, slice(0, 6), None), ([0], slice(8, 12), None)], "wholly inside"
    assert seen(10)[0][0] == (None, slice(0, 6), [1, 0]), "cut for the one, whole for the other"
    assert seen(7)[0][0] == (None, slice(3, 6), [1, 0]), "first what neither sees is left out"
    assert seen(6)[0][0] == (None, slice(4, 6), [1, 0])
    assert seen(5) == ([([1], slice(5, 6), None), ([0], slice(8, 12), None)], [[12, 12, 12, 12], [16, 17, 18, 19]], 10)
    assert seen(2) == ([([0], slice(11, 12), None)], [[12, 12], [18, 19]], 4), "the prompt lies outside"


def test_a_window_cuts_tails_with_gaps_by_path_position() -> None:
    """Tokens too few to pay as a segment stay in the tail, before a segment that pays: positions tell, not places."""
    tree = PrefixTree(KVPool([LayerShape(1, 8)], page_tokens=4))
    prompt = tree.root()
    tree.append(prompt, 2)
    middle = tree.fork(prompt)
    tree.append(middle, 8)
    leaves = [tree.fork(middle), tree.fork(middle), tree.fork(prompt)]
    for leaf in leaves:
        tree.append(leaf, 1)
    rows = [Row(leaf, 0, 1) for leaf in leaves]
    layout = LayoutBuilder(tree, min_saved_tokens=8, windows=[3, 10]).build(rows)
    assert [readable(one)[:2] for one in layout.segments] == [([0, 1], slice(4, 12))]
    assert layout.tail_slots.tolist() == [[0, 1, 12], [0, 1, 16], [0, 1, 20]]
    assert visible_slots(layout.within(10)) == [[*range(4, 12), 1, 12], [*range(4, 12), 1, 16], [0, 1, 20]]
    assert visible_slots(layout.within(3)) == [[10, 11, 12], [10, 11, 16], [0, 1, 20]]


def test_a_window_longer_than_all_paths_costs_nothing() -> None:
    tree, rows = deep_tree()
    layout = LayoutBuilder(tree, windows=[11, 12]).build(rows)
    assert layout.within(11) is layout.within(12) is layout
    with pytest.raises(KeyError):
        layout.within(5)


def test_a_prompts_chunks_through_a_window() -> None:
    tree = PrefixTree(KVPool([LayerShape(1, 8)], page_tokens=4))
    prompt = tree.root()
    tree.append(prompt, 12)
    builder = LayoutBuilder(tree, windows=[4])
    first, second = (builder.build([Row(prompt, start, stop - start)]).within(4) for start, stop in ((0, 4), (4, 12)))
    assert first.tail_causal and first.tail_bias is None
    assert [readable(one) for one in second.segments] == [([0, 1, 2], slice(1, 4), [0, 1, 2])]
    assert not second.tail_causal and second.tail_slots.tolist() == [list(range(4, 12))]
    assert visible_slots(second) == [list(range(last - 3, last + 1)) for last in range(4, 12)]


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
    builder = LayoutBuilder(tree, min_saved_tokens=6, windows=[9])
    for step in range(40):
        rows = [Row(leaf, tree.num_tokens(leaf), 1) for leaf in ((left, right, third) if step < 20 else (third, left))]
        for row in rows:
            tree.append(row.handle, 1)
        whole = builder.build(rows), LayoutBuilder(tree, min_saved_tokens=6, windows=[9]).build(rows)
        for grown, fresh in (whole, [one.within(9) for one in whole]):
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
