"""`ets bench` on the shipped models: it measures, goes on where it stopped, and leaves files that can be looked at."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ets_engine import cli
from ets_engine.evaluation import Pass, Record, Summary, read_results
from ets_engine.evaluation.session import Plan, compare

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
    assert [(one.method, one.searches) for one in passes] == [(name, 2) for name in ("greedy", "best_of_n@2", "ets@2")]

    size = (tmp_path / "results.jsonl").stat().st_size
    invoke(*options)
    assert (tmp_path / "results.jsonl").stat().st_size == size, "all was measured already"
    summary = Summary.model_validate_json((tmp_path / "summary.json").read_text())
    ets = next(row for row in summary.rows if row.name == "ets@2")
    assert ets.mean_kv_tokens and ets.flops and ets.gb_s and ets.p50_s and ets.together_per_s and not ets.failed

    traces = sorted((tmp_path / "traces" / "ets@2").iterdir())
    assert len(traces) == 2
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
        (("--setting", "width=3"), "not one of the options"),
        (("--setting", "lambda_b=-1"), "lambda_b=-1"),
        (("--seeds", "0"), "seeds=0"),
        (("--concurrency", "0"), "concurrency=0"),
        (("--mode", "fuzzy"), "mode='fuzzy'"),
        (("--strategies", ","), "name at least one of each"),
        (("--model", "some/model"), "name a verifier"),
        (("--setting", "kv_budget_tokens=500"), "kv_budget_tokens"),
        (("--setting", "lambda_b=2", "--strategies", "rebase"), "lambda_b has no effect"),
        (("--same-cost",), "at least two widths"),
    ],
)
def test_bad_settings_are_usage_errors(tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    done = CliRunner().invoke(cli.app, ["bench", "--out", str(tmp_path), *options])
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert not (tmp_path / "results.jsonl").exists()


def test_samples_of_the_same_cost_are_measured_after_the_others(tmp_path: Path) -> None:
    totals: list[int] = []
    plan = Plan(out=tmp_path, limit=2, widths=(2, 8), strategies=("best_of_n", "ets"), concurrency=2, same_cost=True)
    summary = compare(plan, totals.append)
    extra = {row.method for row in summary.rows if "(same " in row.method}
    assert any("(same KV as ets@8)" in method for method in extra)
    assert totals[0] == 4 * 4 and totals[1] == 4 * len(extra)


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
