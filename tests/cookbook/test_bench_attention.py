"""What the attention bench hands to its peers is the tree that ours reads, and its floors are those of the case."""

from __future__ import annotations

import json
import re
import runpy
import sys
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from ets_engine.attention.reference import visible_slots

COOKBOOK = Path(__file__).parents[2] / "cookbook"
SIZES = {
    "whole pages": {"step_tokens": 16, "own_tokens": 32, "prompt": 48, "width": 16, "page_tokens": 16},
    "broken pages": {"step_tokens": 10, "own_tokens": 4, "prompt": 40, "width": 16, "page_tokens": 1},
    "uneven tree": {"step_tokens": 16, "own_tokens": 16, "prompt": 16, "width": 11, "page_tokens": 16},
    "one leaf": {"step_tokens": 4, "own_tokens": 3, "prompt": 7, "width": 1, "page_tokens": 1},
}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(COOKBOOK))
    import bench_attention

    return bench_attention


@pytest.fixture
def peers(bench: ModuleType) -> ModuleType:
    return sys.modules["flashinfer_sides"]


def build(bench: ModuleType, name: str) -> Any:
    sizes = SIZES[name]
    shape = bench.Shape(4, 2, 32, sizes["step_tokens"], sizes["own_tokens"])
    return bench.build_problem(shape, sizes["width"], sizes["prompt"], torch.float32, torch.device("cpu"))


def read_slots(level: Any, page_tokens: int) -> list[list[int]]:
    """Of each query, by the rules of FlashInfer's page tables."""
    seen = []
    for group in range(len(level.last_page_tokens)):
        pages = level.pages[level.page_starts[group] : level.page_starts[group + 1]].tolist()
        slots = [page * page_tokens + i for page in pages for i in range(page_tokens)]
        slots = slots[: (len(pages) - 1) * page_tokens + int(level.last_page_tokens[group])]
        seen += [slots] * int(level.query_starts[group + 1] - level.query_starts[group])
    return seen


@pytest.mark.parametrize("most", [None, 1, 2, 3])
@pytest.mark.parametrize("name", SIZES)
def test_levels_of_a_cascade_make_up_every_path(
    bench: ModuleType, peers: ModuleType, name: str, most: int | None
) -> None:
    problem = build(bench, name)
    table = peers.page_table(problem.paths)
    levels = peers.cascade_levels(table, most)
    by_level = [read_slots(level, table.tokens) for level in levels]
    assert table.tokens == SIZES[name]["page_tokens"]
    assert [list(chain(*parts)) for parts in zip(*by_level, strict=True)] == visible_slots(problem.layout)
    assert all(one.dtype == torch.int32 for level in levels for one in (level.query_starts, level.pages))


@pytest.mark.parametrize("name", SIZES)
def test_a_cascade_of_all_levels_reads_no_page_twice(bench: ModuleType, peers: ModuleType, name: str) -> None:
    problem = build(bench, name)
    table = peers.page_table(problem.paths)
    pages = torch.cat([level.pages for level in peers.cascade_levels(table)])
    assert len(pages.unique()) == len(pages)
    assert len(pages) * table.tokens == problem.layout.distinct_tokens


def test_pages_are_the_cache_itself(bench: ModuleType, peers: ModuleType) -> None:
    cache = build(bench, "whole pages").cache
    keys, values = peers._pages(cache, 16)
    assert keys.shape == (len(cache) // 16, 16, 2, 32)
    assert torch.equal(values[1, 3], cache[19, 1])
    assert keys.untyped_storage().data_ptr() == cache.untyped_storage().data_ptr()


def test_a_peer_that_does_not_run_is_a_warning_and_no_side(peers: ModuleType) -> None:
    def absent() -> None:
        raise ModuleNotFoundError("no such peer")

    works = peers.Planned(lambda: torch.ones(1), 0.1, 2, "fa2")
    slower = peers.Planned(lambda: torch.zeros(1), 0.1, 3, "fa2")
    with pytest.warns(UserWarning, match="no such peer"):
        assert peers._fastest([absent], lambda run: 1.0) is None
    with pytest.warns(UserWarning, match="no such peer"):
        assert peers._fastest([lambda: slower, absent, lambda: works], lambda run: 2.0 - run().item()) is works


@pytest.mark.parametrize(
    ("copy", "matmul", "floor_ms"),
    [pytest.param(1e6, 1e12, 34.8, id="memory"), pytest.param(1e12, 1e6, 96.3, id="arithmetic")],
)
def test_the_floor_is_the_larger_of_memory_and_arithmetic(
    bench: ModuleType, copy: float, matmul: float, floor_ms: float
) -> None:
    problem = bench.build_problem(bench.SHAPES["toy"], 4, 40, torch.float32, torch.device("cpu"))
    assert (problem.kv_bytes, problem.flops) == (
        68 * 2 * 2 * 32 * 4,
        4 * 4 * 4 * 32 * 47,
    )  # 68 distinct tokens, 47 seen
    assert bench.bench(problem, 1, copy, matmul)["floor_ms"] == floor_ms


def test_the_toy_bench_prints_a_line_per_case_and_its_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--shape", "toy", "--device", "cpu", "--dtype", "float32", "--repeats", "1")
    monkeypatch.setattr(sys, "argv", ["bench_attention.py", *arguments])
    monkeypatch.syspath_prepend(str(COOKBOOK))
    runpy.run_path(str(COOKBOOK / "bench_attention.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert len(re.findall(r"^ +40 +[48] .*% +\d+\.\d\d$", printed, re.M)) == 2
    row = json.loads(printed.splitlines()[-1])
    assert row["matmul_gflop_s"] > 0
    assert all(one["over_floor"] > 0 and one["max_error"]["eager"] < 1e-5 for one in row["results"])
