"""`ets bench` on the shipped models: it measures, goes on where it stopped, and leaves files that can be looked at."""

from __future__ import annotations

import json
import runpy
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ets_engine import cli
from ets_engine.evaluation import Pass, Record, read_results, read_summary
from ets_engine.evaluation.session import Plan, compare
from ets_engine.evaluation.sweep import Sweep
from ets_engine.evaluation.tree_page import read_trace

COOKBOOK = Path(__file__).parents[2] / "cookbook"
OPTIONS = ("--limit", "2", "--widths", "2", "--strategies", "greedy,best_of_n,ets", "--concurrency", "2")


def invoke(*arguments: str) -> str:
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    return done.stdout


def counts(out: Path) -> Counter[tuple[str, int]]:
    lines = read_results(out / "results.jsonl")
    return Counter((line.method, line.concurrency) for line in lines if isinstance(line, Record))


def test_a_comparison_and_its_second_run(tmp_path: Path) -> None:
    options = ("bench", "--out", str(tmp_path), *OPTIONS, "--latency-problems", "1", "--trace")
    printed = invoke(*options, "--report")
    assert (tmp_path / "report.html").read_text().count("<svg") == 2
    for name in ("greedy", "majority@2", "weighted@2", "best_of_n@2", "ets@2", "ets@2 against greedy"):
        assert name in printed
    expected = {(name, n): count for name in ("greedy", "best_of_n@2", "ets@2") for n, count in ((2, 2), (1, 1))}
    assert counts(tmp_path) == expected
    passes = [line for line in read_results(tmp_path / "results.jsonl") if isinstance(line, Pass)]
    assert {one.processes for one in passes} == {1}
    assert [(one.method, one.searches) for one in passes] == [(name, 2) for name in ("greedy", "best_of_n@2", "ets@2")]

    size = (tmp_path / "results.jsonl").stat().st_size
    invoke(*options)
    assert (tmp_path / "results.jsonl").stat().st_size == size, "all was measured already"
    summary = read_summary(tmp_path / "summary.json")
    ets = next(row for row in summary.rows if row.name == "ets@2")
    assert ets.mean_kv_tokens and ets.flops and ets.gb_s and ets.p50_s and ets.together_per_s and not ets.failed
    assert ets.mean_prm_kv_tokens and ets.mean_prm_kv_mb and ets.peak_policy_kv_mb and ets.published_kv_tokens
    assert ets.model_calls and ets.mb_per_call and ets.max_kv_tokens and ets.verifier_tokens

    traces = sorted((tmp_path / "traces" / "ets@2").iterdir())
    assert len(traces) == 2
    _, nodes = read_trace(traces[0])
    decided = [node.verdict for node in nodes if node.verdict]
    assert decided and all(one.path_cost is not None and one.coverage is not None for one in decided)
    page = Path(invoke("tree", str(traces[0])).strip())
    assert page.parent == traces[0].parent and '"best": [0, ' in page.read_text()


@pytest.mark.parametrize("concurrency", [1, 2])
def test_an_interrupted_comparison_loses_only_what_was_running(tmp_path: Path, concurrency: int) -> None:
    plan = Plan(out=tmp_path, limit=4, widths=(2,), strategies=("ets",), concurrency=concurrency, latency_problems=0)
    seen: list[str] = []

    def interrupt(_: object, record: Record) -> None:
        seen.append(record.problem)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(plan, on_result=interrupt)
    assert len(seen) == 2 and counts(tmp_path) == {("ets@2", concurrency): 2}
    assert json.loads((tmp_path / "summary.json").read_text())["rows"][0]["searches"] == 2
    totals: list[int] = []
    compare(plan, totals.append, lambda _, record: seen.append(record.problem))
    assert totals == [2] and len(set(seen)) == 4


def test_a_failing_search_is_a_row_and_not_the_end(tmp_path: Path) -> None:
    data = tmp_path / "mixed.jsonl"
    problems = ("Use 1, 2, 3 and 4 to make 10.", "What is love?")
    data.write_text("".join(json.dumps({"problem": one, "answer": "10"}) + "\n" for one in problems))
    summary = compare(
        Plan(out=tmp_path / "out", data=str(data), strategies=("greedy",), concurrency=2, latency_problems=0)
    )
    (row,) = summary.rows
    assert (row.searches, row.failed) == (2, 1)
    errors = [line.error for line in read_results(tmp_path / "out" / "results.jsonl") if isinstance(line, Record)]
    assert sum("ReferenceDomainError" in error for error in errors) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--strategies", "mcts"), "strategy='mcts'"),
        (("--widths", "many"), "'many' is no whole number"),
        (("--data", "nowhere.jsonl"), "neither a file nor one of"),
        (("--setting", "width=3"), "give NAME=VALUE, NAME not one of"),
        (("--strategies", "ets:width=3"), "give NAME=VALUE, NAME not one of"),
        (("--strategies", "ets:lambda_b=-1"), "lambda_b=-1"),
        (("--strategies", "ets,rebase:lambda_b=2"), "lambda_b=2.0 has no effect with rebase"),
        (("--setting", "lambda_b=-1"), "lambda_b=-1"),
        (("--seeds", "0"), "seeds=0"),
        (("--concurrency", "0"), "concurrency=0"),
        (("--mode", "fuzzy"), "mode='fuzzy'"),
        (("--strategies", ","), "name at least one of each"),
        (("--model", "some/model"), "name a verifier"),
        (("--setting", "kv_budget_tokens=500"), "kv_budget_tokens"),
        (("--setting", "lambda_b=2", "--strategies", "rebase"), "lambda_b=2.0 has no effect with rebase"),
        (("--setting", "cluster_cut=0.5", "--strategies", "greedy,rebase"), "cluster_cut=0.5 has no effect"),
        (("--setting", "keep=2", "--strategies", "ets"), "keep=2 has no effect with ets"),
        (("--setting", "lambda_b=2", "--setting", "lambda_b=3"), "lambda_b is given twice"),
        (("--same-cost",), "at least two widths"),
    ],
)
def test_bad_settings_are_usage_errors(tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    done = CliRunner().invoke(cli.app, ["bench", "--out", str(tmp_path), *options])
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert not (tmp_path / "results.jsonl").exists()


def test_settings_of_its_own_make_a_row_and_a_budget_is_kept(tmp_path: Path) -> None:
    """The second run goes on where the first stopped, although its methods are others."""
    shared = ("bench", "--out", str(tmp_path), "--limit", "2", "--widths", "8", "--latency-problems", "0", "--trace")
    shared += ("--setting", "max_step_tokens=24")
    invoke(*shared, "--strategies", "ets,ets:kv_budget_tokens=150")
    printed = invoke(*shared, "--strategies", "ets,ets:allocation=ceil:node_cost=nodes")
    rows = {row.name: row for row in read_summary(tmp_path / "summary.json").rows}
    assert list(rows) == ["ets@8", "ets@8 kv_budget_tokens=150", "ets@8 node_cost=nodes allocation=ceil"]
    budgeted = rows["ets@8 kv_budget_tokens=150"]
    assert not budgeted.failed and 0 < (budgeted.max_kv_tokens or 0) <= 150 < (rows["ets@8"].max_kv_tokens or 0)
    assert "ets@8 node_cost=nodes allocation=ceil against ets@8: " in " ".join(printed.split())
    assert len(list((tmp_path / "traces" / budgeted.method).glob("*.jsonl"))) == 2


def run_script(name: str, *arguments: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
    runpy.run_path(str(COOKBOOK / name), run_name="__main__")


def test_a_sweep_leaves_its_tables_its_figure_and_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="the bench extra is not installed")
    sizes = ("--limit", 1, "--width", 4, "--lambda-b", "2", "--cluster-cut", "0.4", "--budgets", "90,200")
    run_script("bench_sweep.py", "--out", tmp_path, *sizes, "--peer-widths", "2,4", monkeypatch=monkeypatch)
    printed = capsys.readouterr().out
    kept = Sweep.model_validate_json((tmp_path / "sweep.json").read_text())
    assert kept.settings and kept.budgets and kept.command.endswith("--peer-widths 2,4")
    assert [row.name for row in kept.settings.rows] == [
        *("rebase@4", "ets_published@4", "ets@4", "ets@4 lambda_b=2", "ets@4 cluster_cut=0.4")
    ]
    assert [row.name for row in kept.budgets.rows] == [
        *("ets@4 kv_budget_tokens=90", "ets@4 kv_budget_tokens=200", "rebase@2", "beam@2", "rebase@4", "beam@4")
    ]
    assert (tmp_path / "sweep.svg").read_text().startswith("<svg")
    for head in ("lambda_b   ", "cluster_cut   ", "kv_budget_tokens   ", "KV budget   "):
        assert head in printed


def test_settings_are_never_chosen_on_the_reported_problems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_script(
            "bench_sweep.py", "--out", tmp_path, "--data-seed", Plan(tmp_path).data_seed, monkeypatch=monkeypatch
        )
    assert "what results are reported on" in capsys.readouterr().err


def test_the_figure_of_the_readme_is_made_from_the_committed_summaries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="the bench extra is not installed")
    run_script("plot_results.py", "--out", tmp_path / "made.svg", monkeypatch=monkeypatch)
    made = (tmp_path / "made.svg").read_text()
    assert made.startswith("<svg") and "axes_2" in made, "one panel per family of problems"


def test_samples_of_the_same_cost_are_measured_after_the_others(tmp_path: Path) -> None:
    totals: list[int] = []
    plan = Plan(out=tmp_path, limit=2, widths=(2, 8), strategies=("best_of_n", "ets"), concurrency=2, same_cost=True)
    summary = compare(plan, totals.append)
    extra = {row.method for row in summary.rows if "(same " in row.method}
    assert any("(same KV as ets@8)" in method for method in extra)
    assert totals[0] == 4 * 4 and totals[1] == 4 * len(extra)

    lines = read_results(tmp_path / "results.jsonl")
    stale = next(line for line in lines if isinstance(line, Record) and "(same KV as ets@8)" in line.method)
    stale = stale.model_copy(update={"method": "best_of_n@999 (same KV as ets@8)"})  # as from fewer problems
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write(stale.model_dump_json() + "\n")
    assert {row.method for row in compare(plan).rows if "(same " in row.method} == extra
    kept = read_summary(tmp_path / "summary.json")
    assert "best_of_n@999" not in kept.model_dump_json() and kept.timed_methods == summary.timed_methods


def test_the_tree_of_a_problem_with_any_id_is_written(tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    sign = "\U00020000"  # four bytes
    row = {"id": 90 * sign, "problem": "Use 2, 3, 9 and 9 to make 81.", "answer": "(3-2)*9*9"}
    data.write_text(json.dumps(row) + "\n")
    compare(Plan(tmp_path, data=str(data), strategies=("greedy",), concurrency=1, latency_problems=0, trace=True))
    (tree,) = (tmp_path / "traces" / "greedy").iterdir()
    assert tree.name == f"0-{20 * sign}-seed0.jsonl"


def test_when_nothing_works_the_command_fails(tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text(json.dumps({"problem": "What is love?", "answer": "10"}) + "\n")
    arguments = ["bench", "--out", str(tmp_path / "out"), "--data", str(data), "--strategies", "greedy"]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 1
    assert "no search worked: ReferenceDomainError" in done.stderr


def test_grading_a_file_says_what_it_gets_wrong(tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    rows = [{"question": "?", "answer": f"so #### {i}"} for i in range(10)] + [{"question": "?", "answer": "1/2"}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert invoke("grade", str(data)).splitlines() == [
        "10 of 10 worked solutions: the answer is found and right",
        "11 of 11 other problems' answers are refused",
    ]
    rows[0] = {"question": "?", "answer": "He has 3 apples.\n#### five"}
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = CliRunner().invoke(cli.app, ["grade", str(data)])
    assert done.exit_code == 1
    assert "wrong: 1" in done.stdout and "less than 99%" in done.stderr
    assert CliRunner().invoke(cli.app, ["grade", str(data), "--least", "99"]).exit_code == 2


def test_grading_a_file_claims_no_check_that_it_did_not_make(tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    rows = [{"problem": "?", "answer": f"A. {city}"} for city in ("Paris", "Rome", "Oslo", "Bern")]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    nothing = ["no worked solutions to find answers in", "no two different answers to tell apart"]
    assert invoke("grade", str(data), "--mode", "choice").splitlines() == nothing
    assert invoke("grade", str(data), "--limit", "1").splitlines() == nothing
    done = CliRunner().invoke(cli.app, ["grade", str(data), "--limit", "1", "--mode", "bogus"])
    assert done.exit_code == 2 and "mode='bogus'" in done.stderr
