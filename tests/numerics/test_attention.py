"""The fast attention equals its specification, and the specification equals attention with every prefix written out."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from ets_engine.attention import tree_attention
from ets_engine.attention.eager import attend, attend_by_matmul, merge
from ets_engine.attention.reference import visible_slots
from ets_engine.kv import KVPool, LayerShape, LayoutBuilder, PrefixTree, Row, TreeLayout

HEAD_DIM = 8


def random_batch(
    seed: int, kv_heads: int, min_saved_tokens: int, decoding: bool, windows: tuple[int, ...] = ()
) -> tuple[torch.Tensor, TreeLayout, list[list[int]]]:
    """A cache of random numbers, a layout over a random tree, and the slots of each query's whole path, in order."""
    rng = random.Random(seed)
    tree = PrefixTree(KVPool([LayerShape(kv_heads, HEAD_DIM)], page_tokens=3, dtype=torch.float64))
    frontier = [tree.root()]
    tree.append(frontier[0], rng.randrange(1, 30))
    for _ in range(rng.randrange(1, 4)):
        frontier = [tree.fork(parent) for parent in frontier for _ in range(rng.randrange(1, 4))]
        for node in frontier[:-1]:  # the last one stays empty: a node without tokens is legal
            tree.append(node, rng.randrange(0, 9))
    rows = []
    for leaf in frontier:
        stored, new = tree.num_tokens(leaf), 1 if decoding else rng.randrange(1, 7)
        tree.append(leaf, new)
        rows.append(Row(leaf, stored, new))
    builder = LayoutBuilder(tree, bias_dtype=torch.float64, min_saved_tokens=min_saved_tokens, windows=windows)
    layout = builder.build(rows)
    expected = []
    for row in rows:
        path, node = [], row.handle
        while node >= 0:
            path = tree.slots(node).tolist() + path
            node = tree.parent(node)
        expected += [path[: len(path) - row.new + i + 1] for i in range(row.new)]
    generator = torch.Generator().manual_seed(seed)
    cache = torch.randn(tree.pool.layers[0].shape, generator=generator, dtype=torch.float64)
    return cache, layout, expected


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("min_saved_tokens", [0, 8, 10**9])
@pytest.mark.parametrize("decoding", [False, True])
@pytest.mark.parametrize("block_numbers", [0, 400, 1 << 19])
def test_fast_attention_equals_the_specification(
    seed: int, min_saved_tokens: int, decoding: bool, block_numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ets_engine.kv.layout.BLOCK_NUMBERS", block_numbers)
    kv_heads, heads = (1, 4) if seed % 3 == 0 else (2, 6) if seed % 3 == 1 else (3, 3)
    cache, layout, paths = random_batch(seed, kv_heads, min_saved_tokens, decoding)
    assert [sorted(slots) for slots in visible_slots(layout)] == [sorted(slots) for slots in paths]
    query = torch.randn(len(paths), heads, HEAD_DIM, dtype=torch.float64)
    fast = tree_attention(query, cache, layout, scale=0.3)
    specified = tree_attention(query, cache, layout, scale=0.3, implementation="reference")
    assert (fast - specified).abs().max() < 1e-12


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("min_saved_tokens", [0, 8, 10**9])
@pytest.mark.parametrize("decoding", [False, True])
def test_windows_caps_and_sinks_equal_the_specification(seed: int, min_saved_tokens: int, decoding: bool) -> None:
    """Each query sees the last tokens of its path, itself included; none of a segment's queries sees nothing of it."""
    windows = (1, 3, 8, 10**6)
    cache, layout, paths = random_batch(seed, 2, min_saved_tokens, decoding, windows)
    query, sinks = torch.randn(len(paths), 6, HEAD_DIM, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    assert layout.within(None) is layout and layout.within(10**6).segments is layout.segments
    for window in windows:
        view = layout.within(window)
        assert [sorted(slots) for slots in visible_slots(view)] == [sorted(slots[-window:]) for slots in paths]
        assert all(int(one.hidden.max()) < len_of(one.slots) for one in view.segments if one.hidden is not None)
        assert view.distinct_tokens == len({slot for slots in paths for slot in slots[-window:]})
        for options in ({}, {"softcap": 0.7}, {"sinks": sinks}, {"softcap": 0.7, "sinks": sinks}):
            fast = tree_attention(query, cache, view, scale=0.9, **options)
            specified = tree_attention(query, cache, view, scale=0.9, implementation="reference", **options)
            assert (fast - specified).abs().max() < 1e-12, (window, options)


def len_of(slots: torch.Tensor | slice) -> int:
    """How many slots a segment has."""
    return slots.stop - slots.start if isinstance(slots, slice) else len(slots)


def test_the_specification_caps_scores_then_masks_and_sinks_have_no_value() -> None:
    """The formulas by hand, for the last query: softmax over [cap(q k), sink], values for the former alone."""
    cache, layout, paths = random_batch(1, 1, 0, False, (5,))
    query, sinks = torch.randn(len(paths), 1, HEAD_DIM, dtype=torch.float64), torch.tensor([0.3]).double()
    keys, values = cache[paths[-1][-5:], :, 0].unbind(1)
    scores = 0.7 * torch.tanh(0.9 * (keys @ query[-1, 0]) / 0.7)
    expected = scores.exp() @ values / (scores.exp().sum() + sinks[0].exp())
    options = {"scale": 0.9, "softcap": 0.7, "sinks": sinks, "implementation": "reference"}
    assert (tree_attention(query, cache, layout.within(5), **options)[-1, 0] - expected).abs().max() < 1e-12


def test_capped_scores_in_bfloat16_are_as_exact_as_uncapped_ones() -> None:
    """A processor without fast bf16 matmuls widens them; the result is rounded once."""
    cache, layout, paths = random_batch(2, 2, 0, True, (5,))
    query = torch.randn(len(paths), 4, HEAD_DIM).bfloat16()
    half, layout = cache.bfloat16(), layout.within(5)
    for options in ({}, {"softcap": 2.0}):
        ours = tree_attention(query, half, layout, scale=0.3, **options)
        exact = tree_attention(query.double(), half.double(), layout, scale=0.3, **options)
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - exact).abs().max() < 0.02


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("seed", range(6))
def test_low_precision_errs_little_more_than_plain_attention(dtype: torch.dtype, seed: int) -> None:
    """The yardstick is fp64 on the same rounded inputs. Each part is rounded before merging: 1.2 times on average."""
    cache, layout, paths = random_batch(seed, 2, 0, decoding=seed % 2 == 0)
    query = torch.randn(len(paths), 4, HEAD_DIM, generator=torch.Generator().manual_seed(seed)).to(dtype)
    cache = cache.to(dtype)
    exact = tree_attention(query.double(), cache.double(), layout, scale=0.3, implementation="reference")
    narrow = replace(layout, tail_bias=None if layout.tail_bias is None else layout.tail_bias.float())
    ours = tree_attention(query, cache, narrow, scale=0.3)
    plain = []
    for one, slots in zip(query, paths, strict=True):
        keys, values = cache[slots].repeat_interleave(2, dim=2).transpose(0, 2).unbind(1)  # [H, N, D]
        plain.append(
            torch.nn.functional.scaled_dot_product_attention(one[None, :, None], keys[None], values[None], scale=0.3)
        )
    plain_error = (torch.cat(plain)[:, :, 0].double() - exact).abs().mean()
    assert (ours.double() - exact).abs().mean() <= 1.6 * plain_error


def test_the_matmul_path_equals_the_flash_path() -> None:
    query, keys, values = (torch.randn(2, 3, n, 8, dtype=torch.float64) for n in (5, 5, 5))
    bias = torch.zeros(2, 1, 5, 5, dtype=torch.float64).masked_fill(torch.rand(2, 1, 5, 5) < 0.3, float("-inf"))
    bias[..., 0] = 0.0
    for options in ({}, {"causal": True}, {"bias": bias}):
        for left, right in zip(
            attend(query, keys, values, 0.4, **options),
            attend_by_matmul(query, keys, values, 0.4, **options),
            strict=True,
        ):
            assert (left - right).abs().max() < 1e-12


def test_merging_parts_is_attention_over_the_union_even_when_one_part_dominates() -> None:
    query, keys, values = (torch.randn(1, 2, n, 8, dtype=torch.float64) for n in (3, 10, 10))
    keys[:, :, :4] *= 100
    whole = attend(query, keys, values, 1.0)
    parts = [attend(query, keys[:, :, part], values[:, :, part], 1.0) for part in (slice(0, 4), slice(4, 10))]
    for merged in (merge(parts[0], parts[1]), merge(parts[1], parts[0])):
        assert (merged[0] - whole[0]).abs().max() < 1e-12
        assert (merged[1] - whole[1]).abs().max() < 1e-12


def test_bad_shapes_are_refused_at_the_door() -> None:
    cache, layout, paths = random_batch(0, 2, 0, decoding=True)
    good = torch.randn(len(paths), 4, HEAD_DIM, dtype=torch.float64)
    for query, message in ((good[:, :3], "multiple"), (good[:, :, :4], "head dims"), (good[0], r"\[T, H, D\]")):
        with pytest.raises(ValueError, match=message):
            tree_attention(query, cache, layout, scale=1.0)
    with pytest.raises(ValueError, match="queries"):
        tree_attention(torch.cat([good, good]), cache, layout, scale=1.0)
    with pytest.raises(ValueError, match="use None for scores without a cap"):
        tree_attention(good, cache, layout, scale=1.0, softcap=0.0)
    with pytest.raises(ValueError, match="each of 4 query heads"):
        tree_attention(good, cache, layout, scale=1.0, sinks=torch.zeros(2))
    with pytest.raises(ValueError, match="'reference'"):
        tree_attention(good, cache, layout, scale=1.0, implementation="fast")


@pytest.mark.gpu
def test_attention_on_a_gpu(cuda: torch.device) -> None:
    cache, layout, paths = random_batch(3, 2, 10**9, decoding=False)
    query = torch.randn(len(paths), 4, HEAD_DIM, dtype=torch.float64)
    specified = tree_attention(query, cache, layout, scale=0.3, implementation="reference")
    tensors = {name: getattr(layout, name) for name in layout.__slots__}
    moved = replace(layout, **{name: one.to(cuda) for name, one in tensors.items() if isinstance(one, torch.Tensor)})
    assert (tree_attention(query.to(cuda), cache.to(cuda), moved, scale=0.3).cpu() - specified).abs().max() < 1e-10
