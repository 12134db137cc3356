from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ets_engine.attention.reference import visible_slots
from ets_engine.attention.work import ALIGN, WorkList, bucket, plan_pieces, plan_work
from ets_engine.kv import KVPool, LayerShape, LayoutBuilder, PrefixTree, Row, TreeLayout


def random_layout(seed: int, *, decoding: bool, windows: tuple[int, ...] = ()) -> TreeLayout:
    rng = random.Random(seed)
    tree = PrefixTree(KVPool([LayerShape(1, 8)], page_tokens=rng.randrange(1, 5)))
    frontier = [tree.root()]
    tree.append(frontier[0], rng.randrange(1, 60))
    for _ in range(rng.randrange(5)):
        frontier = [tree.fork(parent) for parent in frontier for _ in range(rng.randrange(1, 4))][:40]
        for node in frontier:
            tree.append(node, rng.randrange(0, 9))
    rows = []
    for leaf in frontier:
        new = 1 if decoding else rng.randrange(1, 20)
        rows.append(Row(leaf, tree.num_tokens(leaf), new))
        tree.append(leaf, new)
    return LayoutBuilder(tree, min_saved_tokens=rng.choice([0, 10, 10**9]), windows=windows).build(rows)


def seen_by_tiles(work: WorkList) -> list[tuple[int, int]]:
    """(query, slot) as often as a tile lets the query see the slot."""
    slots, entries = work.slots.tolist(), work.entries.tolist()
    pairs = []
    for part in work.parts:
        for begin, end, first_entry, count in work.tiles(part).tolist():
            assert count * work.group <= part.height
            for query, first, stop, _ in entries[first_entry : first_entry + count]:
                pairs += [(query, slot) for slot in slots[max(begin, first) : min(end, stop)]]
    return pairs


@given(
    seed=st.integers(0, 10**6),
    decoding=st.booleans(),
    window=st.none() | st.integers(1, 40),
    group=st.integers(1, 8),
    tiles_wanted=st.integers(1, 100),
    min_chunk=st.sampled_from([1, 16, 128]),
    min_saved=st.sampled_from([0, 40, 10**9]),
)
def test_tiles_cover_what_each_query_sees_exactly_once(
    seed: int, decoding: bool, window: int | None, group: int, tiles_wanted: int, min_chunk: int, min_saved: int
) -> None:
    layout = random_layout(seed, decoding=decoding, windows=() if window is None else (window,)).within(window)
    work = plan_work(
        layout,
        group=group,
        tiles_wanted=tiles_wanted,
        heights=(2, 8, 32),
        min_chunk=min_chunk,
        min_saved=min_saved,
    )
    expected = [(query, slot) for query, slots in enumerate(visible_slots(layout)) for slot in slots]
    assert sorted(seen_by_tiles(work)) == sorted(expected)


@given(seed=st.integers(0, 10**6), decoding=st.booleans(), tiles_wanted=st.integers(1, 100))
def test_each_query_goes_to_the_output_or_has_its_partial_results_merged(
    seed: int, decoding: bool, tiles_wanted: int
) -> None:
    layout = random_layout(seed, decoding=decoding)
    work = plan_work(layout, group=2, tiles_wanted=tiles_wanted, heights=(2, 8), min_chunk=1)
    targets: dict[int, list[int]] = {}
    for part in work.parts:
        for _, _, first_entry, count in work.tiles(part).tolist():
            for query, _, _, target in work.entries[first_entry : first_entry + count].tolist():
                targets.setdefault(query, []).append(target)
    merged = {query: list(range(start, stop)) for query, start, stop, _ in work.merges.tolist() if stop > start}
    assert merged == {query: sorted(found) for query, found in targets.items() if found != [-1]}
    results = sorted(target for found in targets.values() for target in found if target >= 0)
    assert results == list(range(len(results))) and len(results) <= work.partials


@given(seed=st.integers(0, 10**6), tiles_wanted=st.integers(1, 60), decoding=st.booleans())
def test_tiles_are_balanced_and_the_longest_come_first(seed: int, tiles_wanted: int, decoding: bool) -> None:
    work = plan_work(
        random_layout(seed, decoding=decoding), group=1, tiles_wanted=tiles_wanted, heights=(2, 8), min_chunk=1
    )
    for part in work.parts:
        lengths = [end - begin for begin, end, _, count in work.tiles(part).tolist() if count]
        assert lengths == sorted(lengths, reverse=True)
        fair = max(-(-5 * sum(lengths) // (4 * tiles_wanted)), 2 * part.height)  # a quarter more than an even share
        assert max(lengths) < fair + ALIGN


def chain(prompt_tokens: int, branches: int) -> tuple[PrefixTree, list[int]]:
    tree = PrefixTree(KVPool([LayerShape(1, 8)]))
    root = tree.root()
    tree.append(root, prompt_tokens)
    return tree, [tree.fork(root) for _ in range(branches)]


def decode(tree: PrefixTree, leaves: list[int], builder: LayoutBuilder) -> TreeLayout:
    rows = [Row(leaf, tree.num_tokens(leaf), 1) for leaf in leaves]
    for leaf in leaves:
        tree.append(leaf, 1)
    return builder.build(rows)


def test_one_long_path_fills_the_device() -> None:
    tree, leaves = chain(10_000, 1)
    work = plan_work(decode(tree, leaves, LayoutBuilder(tree)), group=7, tiles_wanted=50)
    tiles = work.tiles(work.parts[0])
    assert 45 <= int((tiles[:, 3] > 0).sum()) <= 50
    assert work.merges[0].tolist() == [0, 0, int((tiles[:, 3] > 0).sum()), 0]


@pytest.mark.parametrize("branches", [64, 96, 256])
def test_a_long_prompt_runs_in_one_full_round(branches: int) -> None:
    """Blocks of equal length, also where they do not divide the tiles that run at once; no lone tile comes after."""
    tree, leaves = chain(16_384, branches)
    work = plan_work(decode(tree, leaves, LayoutBuilder(tree)), group=4, tiles_wanted=(49, 33, 16))
    tiles = [tile for tile in work.tiles(work.parts[0]).tolist() if tile[3]]
    assert work.parts[0].height == 128 and 15 <= len(tiles) <= 16
    blocks = branches // 32
    assert all(one[:2] == tiles[i - i % blocks][:2] for i, one in enumerate(tiles)), "blocks of a chunk side by side"


def test_a_prompt_goes_to_tall_tiles_where_they_save_enough_reading() -> None:
    """64 queries of 4 heads are 16 low tiles, so 15 x 200 slots would be read again; alone, one launch is better."""
    tree, leaves = chain(200, 64)
    layout = decode(tree, leaves, LayoutBuilder(tree))
    heights = [
        [part.height for part in plan_work(layout, group=4, tiles_wanted=16, min_saved=least).parts]
        for least in (0, 3000, 3001)
    ]
    assert heights == [[128, 16], [128, 16], [16]]


def test_what_is_saved_is_counted_in_full() -> None:
    """(16,384 - 1) x 262,144 slots that low tiles would read again: more than 32 bits hold with their sign."""
    length, queries = 1 << 18, 1 << 16
    who = np.arange(queries)
    pieces = np.zeros(length), np.array([queries]), who, np.zeros(queries), np.full(queries, length)
    work = plan_pieces(pieces, 4, tiles_wanted=16, min_saved=18_432)
    assert [part.height for part in work.parts] == [128]


def test_tiles_of_one_height_are_one_launch() -> None:
    tree, leaves = chain(200, 64)
    work = plan_work(decode(tree, leaves, LayoutBuilder(tree)), group=4, tiles_wanted=16, heights=(16,))
    assert [part.height for part in work.parts] == [16]


def test_each_height_is_cut_for_the_tiles_of_it_that_run_at_once() -> None:
    tree, leaves = chain(10_000, 1)
    layout = decode(tree, leaves, LayoutBuilder(tree))
    counts = []
    for wanted in (10, (10, 1, 1), (1, 10, 10)):
        work = plan_work(layout, group=7, tiles_wanted=wanted)
        counts.append(sum(end - begin > 1 for begin, end, _, _ in work.tiles(work.parts[0]).tolist()))
    assert counts == [10, 10, 1]


def test_many_blocks_are_not_left_for_a_last_round_of_few() -> None:
    """17 blocks of 1000 slots on 16 places: whole, they take two rounds, the second of one tile."""
    tree, leaves = chain(1000, 17 * 32)
    work = plan_work(decode(tree, leaves, LayoutBuilder(tree)), group=4, tiles_wanted=16)
    lengths = [end - begin for begin, end, _, count in work.tiles(work.parts[0]).tolist() if count]
    assert sum(lengths[::16]) < 1600 and sum(lengths) == 17_000


def test_a_prompt_read_at_once_needs_no_merge() -> None:
    tree = PrefixTree(KVPool([LayerShape(1, 8)]))
    tree.append(root := tree.root(), 500)
    work = plan_work(LayoutBuilder(tree).build([Row(root, 0, 500)]), group=4, tiles_wanted=4)
    assert work.merge_count == work.partials == 0
    assert [part.height for part in work.parts] == [128]
    assert max(end - begin for begin, end, _, _ in work.tiles(work.parts[0]).tolist()) == 500, "no chunk is cut"


def test_most_decode_steps_launch_alike() -> None:
    """So that a CUDA graph can be replayed: only now and then does a count reach its next bucket."""
    tree, leaves = chain(300, 24)
    builder = LayoutBuilder(tree, min_saved_tokens=0)
    shapes = [plan_work(decode(tree, leaves, builder), group=2, tiles_wanted=8).shape for _ in range(64)]
    changes = sum(before != after for before, after in pairwise(shapes))
    assert changes <= 6


def test_counts_are_rounded_up_to_powers_of_two() -> None:
    assert [bucket(count) for count in (0, 1, 16, 17, 128, 129, 1025)] == [0, 16, 16, 32, 128, 256, 2048]
    for count in range(17, 5000):
        assert count <= bucket(count) < 2 * count


def test_what_a_work_list_cannot_hold_is_refused() -> None:
    tree, leaves = chain(8, 2)
    layout = decode(tree, leaves, LayoutBuilder(tree, min_saved_tokens=10**9))
    with pytest.raises(ValueError, match="200 query heads"):
        plan_work(layout, group=200, tiles_wanted=1)
    gap = torch.zeros(2, 1, 1, 9)
    gap[1, 0, 0, 4] = float("-inf")
    with pytest.raises(ValueError, match=r"query 0 of row 1 .* one interval"):
        plan_work(replace(layout, tail_bias=gap), group=1, tiles_wanted=1)
    with pytest.raises(ValueError, match="one interval"):
        plan_work(replace(layout, tail_bias=torch.full_like(gap, float("-inf"))), group=1, tiles_wanted=1)


def test_the_types_of_index_tensors_do_not_matter() -> None:
    tree, leaves = chain(40, 3)
    wide = decode(tree, leaves, LayoutBuilder(tree, min_saved_tokens=0))
    narrow = replace(wide, tail_slots=wide.tail_slots.int())
    works = [plan_work(layout, group=1, tiles_wanted=1) for layout in (wide, narrow)]
    assert torch.equal(works[0].numbers, works[1].numbers)
