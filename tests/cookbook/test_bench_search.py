"""Replays say what the engine does, token by token, and the bench that runs them needs no checkpoint."""

from __future__ import annotations

import json
import re
import runpy
import statistics
import sys
from itertools import zip_longest
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from ets_engine.config import EngineConfig
from ets_engine.errors import ConfigError, PoolExhaustedError
from ets_engine.runtime import Runner
from ets_engine.types import StopReason, TraceNode

COOKBOOK = Path(__file__).parents[2] / "cookbook"
NESTED = {"task": "nested", "index": 7, "nodes": [[-1, 10], [0, 3], [1, 2], [1, 4], [0, 1], [4, 0]]}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(COOKBOOK))
    import bench_search

    return bench_search


@pytest.fixture
def replay(bench: ModuleType) -> ModuleType:
    return sys.modules["replay"]


@pytest.fixture
def floors(bench: ModuleType) -> ModuleType:
    return sys.modules["replay_floors"]


@pytest.fixture
def players(bench: ModuleType) -> ModuleType:
    return sys.modules["replay_players"]


@pytest.fixture
def searches(bench: ModuleType) -> ModuleType:
    return sys.modules["replay_searches"]


@pytest.fixture
def pools(bench: ModuleType) -> ModuleType:
    return sys.modules["replay_pools"]


@pytest.fixture
def runner(floors: ModuleType, players: ModuleType) -> Runner:
    model, _ = players.build_models(floors.SHAPES["toy"], torch.float32, "cpu", seed=0)
    return Runner(model, EngineConfig(kv_pool_tokens=4096, page_tokens=4))


def test_nodes_become_rounds_by_depth_and_tokenless_leaves_are_left_out(replay: ModuleType) -> None:
    nodes = NESTED["nodes"]
    tree = replay.from_nodes("nested", [parent for parent, _ in nodes], [tokens for _, tokens in nodes])
    assert tree.prompt_tokens == 10
    assert tree.rounds == (replay.Round((0, 0), (3, 1)), replay.Round((1, 1), (2, 4)))
    assert [one.retained for one in tree.rounds] == [(0,), (1,)]
    assert (tree.generated_tokens, tree.longest_path_tokens) == (10, 17)


@pytest.mark.parametrize(
    ("parents", "num_tokens"),
    [
        pytest.param([], [], id="empty"),
        pytest.param([-1], [5], id="no step"),
        pytest.param([-1, 0], [0, 5], id="empty prompt"),
        pytest.param([-1, -1], [5, 5], id="two roots"),
        pytest.param([-1, 2, 0], [5, 5, 5], id="child before parent"),
        pytest.param([-1, 0, 1], [5, 0, 5], id="below nothing"),
        pytest.param([-1, 0], [5], id="a number missing"),
    ],
)
def test_what_is_no_tree_is_refused(replay: ModuleType, parents: list[int], num_tokens: list[int]) -> None:
    with pytest.raises(ConfigError, match="bad"):
        replay.from_nodes("bad", parents, num_tokens)


def test_decode_steps_count_shared_tokens_once_and_free_pruned_ones(replay: ModuleType) -> None:
    tree = replay.Replay("two", 10, (replay.Round((0, 0), (3, 2)), replay.Round((2, 2), (1, 3))))
    assert [tuple(step) for step in replay.decode_steps(tree)] == [
        (2, 12, 12),  # both read their first token above the prompt
        (1, 12, 13),  # the first reads its second; the other's only unread token waits
        (1, 12, 12),  # the first is pruned; the other reads its last one
        (1, 13, 13),
        (1, 14, 14),
    ]


def test_a_recorded_search_is_found_by_its_folder_and_by_its_file(replay: ModuleType, tmp_path: Path) -> None:
    head = {"kind": "tree", "problem": "p", "answer": None, "strategy": "ets", "width": 2, "seed": 0, "best": [0]}
    nodes = [
        TraceNode(id=0, parent=-1, depth=0, text="", num_tokens=4, step_score=1.0, stop=StopReason.BOUNDARY),
        TraceNode(id=1, parent=0, depth=1, text="a", num_tokens=2, step_score=0.5, stop=StopReason.FINISHED),
        TraceNode(id=2, parent=0, depth=1, text="", num_tokens=0, step_score=0.0, stop=StopReason.ERROR),
    ]
    file = tmp_path / "traces" / "ets@2" / "0-p.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text("\n".join([json.dumps(head), *(node.model_dump_json() for node in nodes)]))
    expected = replay.Replay("ets@2/0-p", 4, (replay.Round((0,), (2,)),))
    assert replay.read_traces(tmp_path) == replay.read_traces(tmp_path / "traces") == [expected]
    assert [one.rounds for one in replay.read_traces(file)] == [expected.rounds]
    with pytest.raises(ConfigError, match="no traces"):
        replay.read_traces(tmp_path / "elsewhere")


def test_a_file_of_trees_is_read_and_another_refused(replay: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "trees.json"
    path.write_text(json.dumps({"trees": [NESTED]}))
    assert [(tree.name, tree.generated_tokens) for tree in replay.read_trees(path)] == [("nested/7", 10)]
    for text in ("{}", "[", '{"trees": [{"task": "t", "index": 0, "nodes": [[-1]]}]}', '{"trees": [{"nodes": []}]}'):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"trees\.json"):
            replay.read_trees(path)


def test_grown_trees_differ_only_as_their_selectors_do(replay: ModuleType) -> None:
    work = replay.Workload(prompt_tokens=20, min_step_tokens=3, max_step_tokens=9, depth=5)
    rebase, ets = (replay.grow(strategy, 16, work, seed=1) for strategy in ("rebase", "ets"))
    assert replay.grow("ets", 16, work, seed=1) == ets
    assert replay.grow("ets", 16, work, seed=2).rounds != ets.rounds
    assert rebase.rounds[0] == ets.rounds[0] and rebase.rounds != ets.rounds
    for tree in (rebase, ets):
        assert 3 <= len(tree.rounds) <= 7
        assert all(len(one.parents) <= 16 and set(one.num_tokens) <= set(range(3, 10)) for one in tree.rounds)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-3.2-1b", 1_235_814_400),
        ("qwen2.5-7b", 7_615_616_512),
        ("llama-3.1-8b", 8_030_261_248),
        ("llemma-7b", 6_738_546_688),
    ],
)
def test_shapes_have_the_published_parameters(floors: ModuleType, name: str, parameters: int) -> None:
    assert floors.num_parameters(floors.SHAPES[name]) == parameters


def test_both_models_have_the_same_weights(floors: ModuleType, players: ModuleType) -> None:
    model, plain = players.build_models(floors.SHAPES["toy"], torch.float32, "cpu", seed=0)
    assert model.lm_head.weight.data_ptr() == plain.lm_head.weight.data_ptr()


def test_the_engine_reads_and_holds_what_the_replay_says(
    runner: Runner, searches: ModuleType, players: ModuleType, floors: ModuleType, replay: ModuleType
) -> None:
    shape = floors.SHAPES["toy"]
    tree = replay.grow("ets", 6, shape.work)
    played = searches.our_player(runner)(tree, players.token_ids(tree, shape.vocabulary, seed=0))
    steps = replay.decode_steps(tree)
    prompt = replay.DecodeStep(1, tree.prompt_tokens, tree.prompt_tokens)
    assert runner.stats.bytes_moved == sum(floors.step_bytes(step, shape, itemsize=4) for step in (prompt, *steps))
    assert runner.stats.tokens == tree.prompt_tokens + sum(step.rows for step in steps)
    assert len(played.step_seconds) == len(steps)
    assert played.mean_kv_tokens == statistics.mean(step.resident_tokens for step in steps)
    assert played.peak_kv_tokens == max(step.resident_tokens for step in steps)
    pages = searches.peak_pages(tree, runner.tree.pool.page_tokens)
    assert played.peak_kv_bytes == pages * runner.tree.pool.page_tokens * runner.bytes_per_token
    assert runner.tree.resident_tokens == 0


def test_trees_at_once_are_played_as_alone_and_never_outgrow_the_pool(
    runner: Runner, searches: ModuleType, players: ModuleType, floors: ModuleType, replay: ModuleType
) -> None:
    shape = floors.SHAPES["toy"]
    trees = [replay.grow(strategy, 6, shape.work, seed) for seed in range(3) for strategy in ("rebase", "ets")]
    work = [(tree, players.token_ids(tree, shape.vocabulary, seed=0)) for tree in trees]
    alone = [searches.our_player(runner)(*one) for one in work]
    pages = [searches.peak_pages(tree, runner.config.page_tokens) for tree in trees]
    runner.reserve((pages[0] + pages[1]) * runner.config.page_tokens)
    together = searches.play_together(runner, work)
    for one, expected in zip(together.played, alone, strict=True):
        assert (one.mean_kv_tokens, one.peak_kv_tokens) == (expected.mean_kv_tokens, expected.peak_kv_tokens)
        assert len(one.step_seconds) == len(expected.step_seconds)
    assert 2 <= together.at_once < len(trees)
    assert max(pages) < together.peak_pages <= runner.tree.pool.max_pages
    assert together.rows == sum(1 + sum(step.rows for step in replay.decode_steps(tree)) for tree in trees)
    assert together.passes < sum(1 + len(replay.decode_steps(tree)) for tree in trees)
    assert runner.tree.resident_tokens == 0
    runner.tree.check_integrity()


def test_all_run_at_once_where_all_fit_and_one_by_one_where_one_does(
    runner: Runner, searches: ModuleType, players: ModuleType, floors: ModuleType, replay: ModuleType
) -> None:
    tree = replay.grow("rebase", 4, floors.SHAPES["toy"].work)
    work = [(tree, players.token_ids(tree, 256, seed)) for seed in range(3)]
    pages = searches.peak_pages(tree, runner.config.page_tokens)
    for most_pages, at_once in ((None, 3), (3 * pages, 3), (2 * pages - 1, 1)):
        runner.reserve(most_pages and most_pages * runner.config.page_tokens)
        together = searches.play_together(runner, work)
        assert (together.at_once, together.peak_pages) == (at_once, at_once * pages)
        assert together.passes == 3 // at_once * (1 + len(replay.decode_steps(tree)))


def test_searches_at_once_draw_what_they_draw_alone(
    runner: Runner,
    searches: ModuleType,
    players: ModuleType,
    floors: ModuleType,
    replay: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trees = [replay.grow("ets", 4, floors.SHAPES["toy"].work, seed) for seed in (0, 1)]
    work = [(tree, players.token_ids(tree, 256, seed=0)) for tree in trees]
    drawn: list[list[int]] = []  # of each pass
    draw = runner.draw

    def watch(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, logprobs = draw(*args)
        drawn.append(tokens.tolist())
        return tokens, logprobs

    monkeypatch.setattr(runner, "draw", watch)
    searches.our_player(runner, seed=5)(*work[0])
    first, drawn = drawn, []
    searches.our_player(runner, seed=6)(*work[1])
    second, drawn = drawn, []
    searches.play_together(runner, work, seed=5)
    assert drawn == [one + other for one, other in zip_longest(first, second, fillvalue=[])]


def test_a_pool_is_taken_before_the_clock_runs(pools: ModuleType, runner: Runner) -> None:
    assert pools.use_pool(runner, 8192) is runner.tree.pool
    assert runner.tree.pool.num_pages == runner.tree.pool.num_free_pages == 8192 // runner.config.page_tokens


def test_graphs_are_captured_with_those_that_fill_the_pool_at_first(
    pools: ModuleType, runner: Runner, replay: ModuleType
) -> None:
    pool = pools.use_pool(runner, 96)
    tokens = (pool.num_pages // 2 - 1) * pool.page_tokens  # and a page for the step
    work = [(replay.Replay(str(number), tokens, (replay.Round((0,), (2,)),)), []) for number in range(3)]
    assert [one.name for one, _ in pools.together_at_first(work, pool)] == ["0", "1"]


def test_a_tree_that_does_not_fit_a_pool_is_reported_and_not_run(
    pools: ModuleType, runner: Runner, searches: ModuleType, replay: ModuleType
) -> None:
    small, large = (replay.Replay(name, tokens, (replay.Round((0,), (2,)),)) for name, tokens in (("s", 60), ("l", 90)))
    pools.use_pool(runner, 90)
    found = pools.play_pool(runner, {"rebase": [small, large], "ets": [small, small], "dora": [large]}, 0, repeats=1)
    assert {name: (row["searches"], row["do_not_fit"]) for name, row in found.items()} == {
        "rebase": (1, 1),
        "ets": (2, 0),
        "dora": (0, 1),
    }
    assert "seconds" not in found["dora"]
    rows = [{"pool_tokens": 90, "width": 1, "strategy": name, **row} for name, row in found.items()]
    assert pools.compare_pools(rows) == []  # of rebase, not all trees ran
    with pytest.raises(PoolExhaustedError):
        searches.play_together(runner, [(large, [[1] * 90, [1, 2]])])


def test_a_floor_is_the_slower_of_memory_and_matmul(floors: ModuleType, replay: ModuleType) -> None:
    shape = floors.SHAPES["toy"]
    step = replay.DecodeStep(rows=3, read_tokens=50, resident_tokens=60)
    moved = (shape.read_weights + 50 * 2 * 2 * 2 * 16) * 2  # K and V of 2 layers x 2 heads x 16 numbers, 2 bytes each
    flops = 2 * 3 * shape.read_weights
    assert floors.floor_s(step, shape, 2, floors.Speed(1.0, 1e9)) == moved
    assert floors.floor_s(step, shape, 2, floors.Speed(1e9, 1.0)) == flops


def test_a_peer_that_fails_is_a_line_and_ours_raises(
    bench: ModuleType, players: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise players.Unavailable("no such thing\nat all")

    assert bench.attempt("vllm", fail) is None
    assert capsys.readouterr().out == "vllm: skipped, no such thing\n"
    with pytest.raises(players.Unavailable):
        bench.attempt("ours", fail)


def test_the_toy_shape_runs_to_its_end_and_writes_no_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = COOKBOOK / "results" / "bench_search.jsonl"
    before = results.read_bytes() if results.exists() else None
    arguments = "--shape toy --widths 3 --rounds 2 --steps 20 --threads 1 --pools 1024 --together 3"
    monkeypatch.setattr(sys, "argv", ["bench_search.py", *arguments.split()])
    monkeypatch.syspath_prepend(str(COOKBOOK))  # as for a script that is run by its path
    runpy.run_path(str(COOKBOOK / "bench_search.py"), run_name="__main__")
    *printed, last = capsys.readouterr().out.splitlines()
    row = json.loads(last)
    assert [tree["tree"] for tree in row["trees"]] == ["rebase@3", "ets@3"]
    for tree in row["trees"]:
        assert {"ours", "generate"} <= set(tree["sides"])
        assert tree["sides"]["ours"]["peak_kv_tokens"] < tree["sides"]["generate"]["peak_kv_tokens"]
        assert tree["sides"]["ours"]["over_floor"] > 0
    assert row["memory"]["decode_steps"] >= 20
    assert set(row["ets_over_rebase"]) == {"3"}
    assert [(one["strategy"], one["searches"], one["at_once"]) for one in row["pools"]] == [
        ("rebase", 3, 3),
        ("ets", 3, 3),
    ]
    assert [(one["pool_tokens"], one["width"]) for one in row["pools_ets_over_rebase"]] == [(1024, 3)]
    for side in {"continuous", "vllm"} - set(row["trees"][0]["sides"]):
        assert any(line.startswith(f"{side}: skipped, ") for line in printed)
    assert (results.read_bytes() if results.exists() else None) == before


def test_the_roofline_note_holds_what_the_bench_prints(floors: ModuleType) -> None:
    noted = (COOKBOOK / "roofline.md").read_text()
    printed = floors.roofline([16], 0, {"H200": floors.H200}).splitlines()
    assert len(printed) == 2 + 4 * 2
    for line in printed[2:]:
        assert re.search("^" + re.escape(line.removesuffix(" |")), noted, re.M), line
