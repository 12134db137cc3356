"""Searches are written down and summed up as the figures claim; without a model."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from ets_engine.config import SearchConfig
from ets_engine.errors import ConfigError
from ets_engine.evaluation import (
    EvalProblem,
    Outcome,
    Pass,
    Record,
    Results,
    Settings,
    methods_of,
    read_results,
    read_summary,
    summarise,
)
from ets_engine.evaluation.bench import RANK, Bench
from ets_engine.evaluation.columns import blocks, comparison_lines
from ets_engine.evaluation.methods import Method
from ets_engine.evaluation.paired import percent
from ets_engine.evaluation.same_cost import same_cost_methods, samples_for, stale_methods
from ets_engine.evaluation.statistics import bootstrap, rank_correlation
from ets_engine.evaluation.table import summary_view
from ets_engine.hosted import HostedEngine, ProposalRequest
from ets_engine.results import counted_kv
from ets_engine.search import SearchTree
from ets_engine.types import Candidate, KVStats, Step, StopReason

SETTINGS = Settings(
    model="m",
    verifier="v",
    weights="w",
    data="d",
    search={"lambda_b": 1.0},
    device="cpu",
    dtype="float32",
    machine={"machine": "cpu", "commit": "abc"},
    copy_gb_s=10.0,
)


def problem(answer: str, **more: str) -> EvalProblem:
    return EvalProblem(id="1", problem="?", answer=answer, **more)


def record(problem: str, method: str, *, right: bool = True, concurrency: int = 4, **more: Any) -> Record:
    votes = ("majority", "weighted", "best") if method.startswith("best_of_n") else ("weighted",)
    outcomes = {vote: Outcome(answer="1", strict=right, lenient=right, solved=right) for vote in votes}
    fields: dict[str, Any] = {"level": "4", "digest": "", "seed": 0, "outcomes": outcomes, "any_right": right} | more
    return Record(problem=problem, method=method, concurrency=concurrency, **fields)


# ---------------------------------------------------------------- problems


def test_greedy_is_measured_once_and_unknown_names_are_refused() -> None:
    assert [one.name for one in methods_of(["ets", "greedy"], [64, 16])] == ["ets@16", "greedy", "ets@64"]
    assert [methods_of(["best_of_n"], [8])[0].label(vote) for vote in ("majority", "weighted", "best")] == [
        "majority@8",
        "weighted@8",
        "best_of_n@8",
    ]
    for strategies, widths, message in (
        (["mcts"], [4], "strategy='mcts'"),
        (["ets"], [0], "width=0"),
        ([], [4], "at least one"),
        (["ets"], [], "at least one"),
    ):
        with pytest.raises(ConfigError, match=message):
            methods_of(strategies, widths)


def test_the_verifier_has_no_say_in_a_majority() -> None:
    """One vote each: whoever the PRM likes best must not win more often than the others."""
    answers = [str(n) for n in range(100)]
    wins = [0] * 10
    for start in range(0, 100, 10):
        found = [Candidate(answer=one, votes=1, weight=1 - i / 20, score=0.5, steps=()) for i, one in
                 enumerate(answers[start : start + 10])]  # fmt: skip
        wins[found.index(max(found, key=RANK["majority"]))] += 1
        assert max(found, key=RANK["weighted"]) is found[0]
        twice = found[7].model_copy(update={"votes": 2})
        assert max([*found, twice], key=RANK["majority"]) is twice
    assert wins[0] < 4 and max(wins) < 5


# ---------------------------------------------------------------- records


def key(problem: str, *, alone: bool = False, digest: str = "") -> Any:
    return (problem, digest), "ets@4", 0, alone


@pytest.mark.parametrize("left", [1, 40, 200])
def test_a_second_run_goes_on_where_the_first_was_cut_off(tmp_path: Path, left: int) -> None:
    path = tmp_path / "out" / "results.jsonl"
    results = Results(path, SETTINGS)
    results.add(record("p1", "ets@4"))
    results.add(record("p2", "ets@4", error="boom", outcomes={}))
    results.close()
    with path.open("a") as file:
        file.write(record("p3", "ets@4").model_dump_json()[:-left])  # killed while it wrote
    again = Results(path, SETTINGS.model_copy(update={"copy_gb_s": 12.0}))
    assert again.has(key("p1"))
    assert not again.has(key("p1", alone=True)), "its latency was not measured"
    assert not again.has(key("p1", digest="other")), "the problem was changed since"
    assert not again.has(key("p2")), "it failed"
    assert not again.has(key("p3"))
    again.add(record("p3", "ets@4", error="\N{LINE SEPARATOR}\ud800"))
    again.close()
    lines = read_results(path)
    assert [type(line).__name__ for line in lines] == ["Settings", "Record", "Record", "Record"]
    assert lines[-1].error == "\N{LINE SEPARATOR}\ud800"  # type: ignore[union-attr]


@pytest.mark.parametrize("cut", range(-9, 0))
def test_whatever_a_crash_leaves_can_be_gone_on_from(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "results.jsonl"
    results = Results(path, SETTINGS)
    results.add(record("p1", "ets@4", error='}"} \u2028 é'))
    results.close()
    path.write_bytes(path.read_bytes()[:cut])
    assert [type(line).__name__ for line in read_results(path)] == ["Settings"]
    again = Results(path, SETTINGS)
    again.add(record("p1", "ets@4"))
    again.close()
    assert len(read_results(path)) == 2


def test_results_of_other_settings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    Results(path, SETTINGS).close()
    with pytest.raises(ConfigError, match=r"lambda_b=1\.0 instead of 2\.0"):
        Results(path, SETTINGS.model_copy(update={"search": {"lambda_b": 2.0}}))
    for name in ("model", "verifier", "weights", "data", "device", "dtype"):
        with pytest.raises(ConfigError, match=f"{name}='.*' instead of 'other'"):
            Results(path, SETTINGS.model_copy(update={name: "other"}))
    Results(path, SETTINGS.model_copy(update={"machine": {"machine": "other"}})).close()
    assert len(read_results(path)) == 2, "another machine is told, not refused"
    for text in ('{"kind": "other"}\n', "\xff\n", "{\n"):
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(ConfigError, match=":1 is no line of results"):
            read_results(path)


# ---------------------------------------------------------------- summary


def test_a_row_says_what_its_searches_say() -> None:
    lines = [
        SETTINGS,
        record("p1", "ets@4", right=True, mean_kv_tokens=10.0, kv_token_bytes=1000, generated_tokens=6),
        record("p2", "ets@4", right=False, level="10", mean_kv_tokens=30.0, kv_token_bytes=1000, generated_tokens=8),
        record("p3", "ets@4", error="boom", outcomes={}, any_right=False),
        record("p1", "ets@4", concurrency=1, wall_s=1.0, model_s=0.5, bytes_moved=10**9, mean_kv_tokens=10.0),
        record("p2", "ets@4", concurrency=1, wall_s=3.0, model_s=0.5, bytes_moved=10**9, right=False),
        Pass(method="ets@4", concurrency=4, searches=3, wall_s=1.5),
    ]
    (row,) = summarise(lines).rows
    assert (row.problems, row.searches, row.failed) == (3, 3, 1)
    assert row.solved.mean == row.strict.mean == pytest.approx(100 / 3) and row.first_error == "boom"
    assert row.by_level == {"4": 50.0, "10": 0.0}
    assert row.any_right == pytest.approx(100 / 3) and row.selection == 100
    assert (row.mean_kv_tokens, row.mean_kv_mb, row.generated_tokens) == (20.0, 0.02, 7.0)
    assert (row.p50_s, row.p95_s, row.gb_s) == (2.0, pytest.approx(2.9), 2.0)
    assert (row.alone_per_s, row.together_per_s, row.concurrency) == (0.5, 2.0, 4)


def test_rows_are_compared_on_the_problems_that_both_have() -> None:
    def measured(problem: str, method: str, right: bool, kv: float, wall_s: float) -> list[Record]:
        return [record(problem, method, right=right, concurrency=n, mean_kv_tokens=kv, wall_s=wall_s) for n in (4, 1)]

    lines = [one for i in range(4) for one in measured(f"p{i}", "rebase@4", i < 2, 900.0 if i == 0 else 40.0, 4.0)]
    lines += [one for i in range(1, 5) for one in measured(f"p{i}", "ets@4", True, 700.0 if i == 4 else 20.0, 1.0)]
    rows = {row.name: row for row in summarise(lines).rows}
    (versus,) = rows["ets@4"].versus
    assert (versus.other, versus.problems, versus.kv, versus.latency) == ("rebase@4", 3, 2.0, 4.0)
    assert versus.points.mean == pytest.approx(200 / 3)
    (back,) = [one for one in rows["rebase@4"].versus if one.other == "ets@4"] or [None]
    assert back is None, "only what it is usually compared with"


def test_seconds_are_of_the_last_machine_alone_and_a_commit_is_no_machine() -> None:
    other = SETTINGS.model_copy(update={"machine": {"machine": "gpu", "commit": "abc"}})
    later = SETTINGS.model_copy(update={"machine": {"machine": "gpu", "commit": "def"}})
    alone = [record(f"p{i}", "ets@4", concurrency=1, wall_s=float(i)) for i in range(1, 4)]
    passes = [Pass(method="ets@4", concurrency=n, searches=n, wall_s=1.0) for n in (16, 4, 8)]
    lines = [SETTINGS, alone[0], passes[0], other, alone[1], passes[1], later, alone[2], passes[2]]
    (row,) = summarise(lines).rows
    assert (row.problems, row.p50_s, row.concurrency, row.together_per_s) == (3, 2.5, 8, 8.0)
    assert summarise(lines).settings == (SETTINGS, other, later)


def test_only_the_problems_asked_for_count() -> None:
    kept = problem("4")
    lines = [record(kept.id, "ets@4", digest=kept.digest), record(kept.id, "ets@4", digest="old", right=False)]
    lines.append(record("gone", "rebase@4", right=False))
    (row,) = summarise(lines, [kept]).rows
    assert (row.name, row.problems, row.solved.mean) == ("ets@4", 1, 100.0)


def test_a_failed_search_is_forgotten_once_it_worked() -> None:
    tries = [record("p1", "ets@4", error="boom", outcomes={}), record("p1", "ets@4")]
    for lines in (tries, tries[::-1]):
        (row,) = summarise(lines).rows
        assert (row.failed, row.solved.mean) == (0, 100.0)
    apart = [record("p1", "ets@4", error="full", outcomes={}), record("p1", "ets@4", concurrency=1)]
    for lines in (apart, apart[::-1]):
        (row,) = summarise(lines).rows
        assert (row.searches, row.failed, row.solved.mean) == (1, 0, 100.0), "it worked when it was alone"


def test_seeds_of_one_problem_are_one_observation() -> None:
    lines = [record("p1", "ets@4", seed=seed, right=seed == 0) for seed in range(4)]
    (row,) = summarise(lines).rows
    assert (row.problems, row.searches) == (1, 4)
    assert row.solved.mean == 25.0 and row.solved == percent([0.25]), "as uncertain as one problem leaves it"


def test_samples_of_the_same_cost_stand_beside_ets() -> None:
    lines = [record("p1", f"best_of_n@{n}", mean_kv_tokens=10.0 * n, concurrency=1, wall_s=n / 4) for n in (4, 16)]
    lines.append(record("p1", "ets@8", right=False, mean_kv_tokens=80.0, concurrency=1, wall_s=6.0))
    more = same_cost_methods(summarise(lines).rows)
    assert [(one.width, one.note) for one in more] == [(8, "(same KV as ets@8)"), (24, "(same time as ets@8)")]
    rows = {row.name: row for row in summarise([*lines, record("p1", more[0].name)]).rows}
    assert "majority@8 (same KV as ets@8)" in rows
    assert "weighted@8 (same KV as ets@8)" in [one.other for one in rows["ets@8"].versus]
    assert stale_methods([*rows.values()]) == set(), "its figures have not changed"
    moved = [one.model_copy(update={"mean_kv_tokens": 120.0}) for one in lines if one.method == "ets@8"]
    later = summarise([*lines[:-1], *moved, record("p1", more[0].name), record("p1", more[1].name)]).rows
    assert stale_methods(later) == {more[0].name}
    assert stale_methods(summarise([record("p1", more[0].name)]).rows) == {more[0].name}, "there is no cost to share"
    assert samples_for([(4, 10.0)], 10.0) is None and samples_for([(4, 10.0), (8, None)], 10.0) is None
    for points, cost in (([(4, 10.0), (8, 20.0)], 1e9), ([(4, 10.0), (8, 20.0)], 1.0), ([(4, 0.5), (16, 0.49)], 0.6)):
        assert samples_for(points, cost) is None, "too far from what was measured, or it does not rise"


def test_which_cost_tells_latency() -> None:
    lines = [
        record("p1", f"ets@{width}", concurrency=1, wall_s=width, mean_kv_tokens=width**2, flops=-width, model_calls=7)
        for width in (1, 2, 4)
    ]
    found = summarise(lines).correlations
    assert (found["mean_kv_tokens"], found["flops"], found["model_calls"]) == (1.0, -1.0, None)
    assert (found["published_kv_tokens"], summarise(lines).timed_methods) == (None, 3)


def test_costs_are_also_set_against_the_latency_of_single_searches() -> None:
    """Within each method the slower search holds less, over methods the slower method holds more."""
    lines = [
        record(f"p{i}", f"ets@{width}", concurrency=1, wall_s=width + i / 10, mean_kv_tokens=width - i / 10)
        for width in (1, 2, 4)
        for i in (0, 1, 2)
    ]
    lines.append(record("p9", "ets@9", wall_s=9.0, mean_kv_tokens=0.0))  # not alone: its seconds are no latency
    found = summarise(lines)
    assert found.correlations["mean_kv_tokens"] == 1.0 and found.timed_searches == 9
    assert found.search_correlations["mean_kv_tokens"] == pytest.approx(0.8)


def test_kv_of_policy_and_verifier_is_told_apart() -> None:
    both = {"mean_kv_tokens": 10.0, "peak_kv_tokens": 20, "kv_token_bytes": 1000}
    both |= {"mean_prm_kv_tokens": 30.0, "peak_prm_kv_tokens": 60, "prm_kv_token_bytes": 500}
    more = both | {"peak_kv_tokens": 40, "published_kv_tokens": 70, "prompt_tokens": 9, "bytes_moved": 6_000_000}
    more |= {"concurrency": 1, "model_calls": 3}
    (row,) = summarise([record("p1", "ets@4", **both), record("p2", "ets@4", **more)]).rows
    assert (row.mean_kv_tokens, row.peak_kv_tokens, row.max_kv_tokens) == (10.0, 30.0, 40)
    assert (row.mean_policy_kv_mb, row.peak_policy_kv_mb) == (0.01, 0.03)
    assert (row.mean_prm_kv_tokens, row.peak_prm_kv_tokens) == (30.0, 60.0)
    assert (row.mean_prm_kv_mb, row.peak_prm_kv_mb) == (0.015, 0.03)
    assert (row.mean_kv_mb, row.peak_kv_mb) == (0.025, pytest.approx(0.06))
    assert (row.published_kv_tokens, row.mb_per_call) == (70.0, 2.0)
    (bare,) = summarise([record("p1", "ets@4", mean_kv_tokens=10.0, kv_token_bytes=1000)]).rows
    assert (bare.mean_kv_mb, bare.mean_prm_kv_mb, bare.peak_policy_kv_mb) == (0.01, None, None)


def test_of_a_policy_that_runs_elsewhere_kv_is_counted_and_bandwidth_unknown(tmp_path: Path) -> None:
    def propose(request: ProposalRequest) -> list[Step]:
        return [Step("It is 2.", 5, StopReason.FINISHED) for _ in request.partials]

    class Counting(HostedEngine):
        def count_kv(self, tree: SearchTree) -> KVStats:
            return counted_kv(tree)

    seen: list[Record] = []
    results = Results(tmp_path / "results.jsonl", SETTINGS)
    with Counting(propose, lambda problem, steps: 1.0, name="served") as engine:
        asked = [EvalProblem(id="0", problem="What is 1+1?", answer="2")]
        bench = Bench(engine, asked, results, SearchConfig(), on_result=lambda result, record: seen.append(record))
        bench.run([Method("best_of_n", 2)])
    results.close()
    [found] = seen
    assert (found.error, found.any_right) == ("", True)
    assert found.peak_kv_tokens and found.sharing_ratio and found.wall_s > 0
    assert (found.kv_token_bytes, found.flops, found.model_s, found.bytes_moved) == (None, None, 0.0, 0)
    row = summarise(results.lines).rows[0]
    assert row.mean_kv_tokens and (row.gb_s, row.mean_kv_mb, row.flops) == (None, None, None)


def test_the_largest_peak_is_of_every_search_that_was_measured() -> None:
    """A hard budget is a promise about each of them, whether it ran alone or not."""
    lines = [record("p1", "ets@4", peak_kv_tokens=50), record("p1", "ets@4", concurrency=1, peak_kv_tokens=60)]
    assert [row.max_kv_tokens for row in summarise(lines).rows] == [60]


def test_throughput_is_compared_where_equally_many_ran() -> None:
    passes = [Pass(method=f"{name}@4", concurrency=4, searches=8, wall_s=s) for name, s in (("ets", 2), ("rebase", 4))]
    lines = [record("p1", "ets@4", published_kv_tokens=5), record("p1", "rebase@4", published_kv_tokens=10)]
    (row,) = [row for row in summarise([*lines, *passes]).rows if row.name == "ets@4"]
    assert (row.versus[0].throughput, row.versus[0].published_kv) == (2.0, 2.0)
    for change in ({"concurrency": 8}, {"processes": 2}):
        other = passes[1].model_copy(update=change)
        (row,) = [row for row in summarise([*lines, passes[0], other]).rows if row.name == "ets@4"]
        assert row.versus[0].throughput is None
    row = next(row for row in summarise([*lines, *passes, other]).rows if row.name == "rebase@4")
    assert (row.together_per_s, row.concurrency, row.processes) == (2.0, 4, 2), "passes of one kind, the most at once"


def test_changed_settings_are_compared_with_the_same_method_without_them() -> None:
    names = ("rebase@4", "ets@4", "ets@4 lambda_b=2", "ets@8 lambda_b=2")
    rows = {row.name: row for row in summarise([record("p1", name) for name in names]).rows}
    assert [one.other for one in rows["ets@4 lambda_b=2"].versus] == ["rebase@4", "ets@4"]
    assert rows["ets@8 lambda_b=2"].versus == ()
    told = [line.partition(":")[0] for line in comparison_lines(summarise([record("p1", name) for name in names]))]
    assert told == ["ets@4 against rebase@4", "ets@4 lambda_b=2 against ets@4"]


# ---------------------------------------------------------------- summaries of earlier


COMMITTED = sorted((Path(__file__).parents[2] / "cookbook" / "results").glob("bench-*.json"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_summaries_can_be_read_and_shown(path: Path) -> None:
    summary = read_summary(path)
    assert summary.version in (1, 2) and all(row.mean_kv_tokens for row in summary.rows)
    console = Console(file=StringIO(), width=80)
    console.print(summary_view(summary))
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, printed.splitlines())) <= 80
    for row in summary.rows:
        assert f"{row.solved.mean:.1f}" in printed and f"{row.mean_kv_tokens:.0f}" in printed


def test_a_summary_is_read_back_and_one_of_the_future_is_refused(tmp_path: Path) -> None:
    summary = summarise([SETTINGS, record("p1", "ets@4", mean_prm_kv_tokens=3.0)])
    path = tmp_path / "summary.json"
    path.write_text(summary.model_dump_json())
    assert read_summary(path) == summary and summary.version == 2
    path.write_text(summary.model_copy(update={"version": 3}).model_dump_json())
    with pytest.raises(ConfigError, match="version 3, this is 2: update"):
        read_summary(path)
    path.write_text("{}")
    with pytest.raises(ConfigError, match="is no summary"):
        read_summary(path)
    with pytest.raises(ConfigError, match="is no summary"):
        read_summary(tmp_path / "nowhere.json")


def test_the_table_shows_every_row_and_comparison() -> None:
    lines = [SETTINGS, Pass(method="ets@4", concurrency=4, searches=2, wall_s=1.0)]
    names = ("greedy", "best_of_n@4", "ets@4", "best_of_n@5 (same time as ets@4)")
    lines += [
        record(f"p{i}", name, right=i > 0, level="[/x]", mean_kv_tokens=1234.5, peak_kv_tokens=4321, wall_s=0.25)
        for i in range(2)
        for name in names
    ]
    lines.append(record("p2", "ets@4", error="[boom]", outcomes={}))
    lines += [
        record(
            "p0",
            "ets@256 lambda_b=0.25 cluster_cut=0.05 node_cost=nodes",
            concurrency=1,
            **{"mean_kv_tokens": 123456.0, "peak_kv_tokens": 234567, "kv_token_bytes": 10**5, "sharing_ratio": 12.5},
            **{"mean_prm_kv_tokens": 123456.0, "peak_prm_kv_tokens": 234567, "prm_kv_token_bytes": 10**5},
            **{"published_kv_tokens": 1234567, "generated_tokens": 123456, "verifier_tokens": 123456, "wall_s": 1234.5},
            **{"model_calls": 1234, "flops": 12345e9, "model_s": 9.0, "bytes_moved": 10**12},
        )
    ]
    console = Console(file=StringIO(), width=80)
    console.print(summary_view(summarise(lines)))
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    wanted = ("d: 1 to 3 problems, m; shares in %", "majority@4", "weighted@4", "ets@4 against greedy: +0.0 points")
    for text in (*wanted, "10.0 GB/s", "1234", "4321", "[/x]:50", "ets@4: 1 failed of 3, e.g.", "2 x parameters"):
        assert text in printed, printed
    assert max(map(len, printed.splitlines())) <= 80
    words = set(printed.split())
    wanted = {word for block in blocks(summarise(lines)) for column in block.columns for word in column.head.split()}
    wanted |= {"123456", "234567", "12346", "23457", "1234567", "12.50", "1234", "12345", "810.4"}
    assert wanted <= words, f"cut off: {wanted - words}"


# ---------------------------------------------------------------- statistics


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40))
def test_an_interval_holds_its_mean(values: list[float]) -> None:
    found = bootstrap(values)
    assert min(values) - 1e-9 <= found.low <= found.mean + 1e-9 and found.mean - 1e-9 <= found.high
    assert bootstrap(values) == found


def test_an_interval_is_as_wide_as_theory_says() -> None:
    found = bootstrap([0.0, 1.0] * 200)  # standard error 0.025
    assert found.mean == 0.5 and found.low == pytest.approx(0.451, abs=0.006)
    assert found.high == pytest.approx(0.549, abs=0.006)


def test_nothing_to_resample_or_to_correlate() -> None:
    with pytest.raises(ValueError, match="no values"):
        bootstrap([])
    assert rank_correlation([1, 2], [1, 2]) is None and rank_correlation([1, 1, 1], [1, 2, 3]) is None
