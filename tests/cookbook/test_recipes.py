"""Every recipe of the cookbook runs on the shipped models, as a reader would run it."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

COOKBOOK = Path(__file__).parents[2] / "cookbook"


def run_recipe(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.syspath_prepend(str(COOKBOOK))  # as for a script that is run by its path
    runpy.run_path(str(COOKBOOK / name), run_name="__main__")
    return capsys.readouterr().out


def test_compare_methods_prints_a_line_per_method(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = run_recipe("compare_methods.py", "--count", "3", monkeypatch=monkeypatch, capsys=capsys)
    solved = re.findall(r"^(greedy|majority vote of 16|REBASE, width 16|ETS, width 16) +([0-3])/3", printed, re.M)
    assert len(solved) == 4


def test_own_selector_is_the_one_that_searched(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = run_recipe("own_selector.py", monkeypatch=monkeypatch, capsys=capsys)
    assert re.search(r"answer \S+, score 0\.\d\d|answer \S+, score 1\.00", printed)
    assert "found by ScoreFloor" in printed


def test_the_exact_checker_as_verifier_is_not_beaten_by_the_prm(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = run_recipe("own_verifier.py", monkeypatch=monkeypatch, capsys=capsys)
    counts = [int(count) for count in re.findall(r"solved (\d+) of 10", printed)]
    assert len(counts) == 2
    assert counts[1] >= counts[0]
    assert counts[1] > 0


def test_the_soak_loses_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--searches", "60", "--inputs", "300")
    printed = run_recipe("soak.py", *arguments, monkeypatch=monkeypatch, capsys=capsys)
    figures = dict(line.split(": ", 1) for line in printed.splitlines())
    assert (figures["lost_futures"], figures["kv_tokens_owned_at_the_end"]) == ("0", "0")
    assert figures["untyped_errors"] == "{}" and int(figures["preemptions"]) > 0


def test_the_serving_bench_prints_its_ratios(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--searches", "3", "--widths", "4", "--peer-searches", "1", "--repeats", "1")
    printed = run_recipe("bench_serving.py", *arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert re.search(r"width 4: [0-9.]+ x the searches per second of generate; 3 together [0-9.]+ x one", printed)


def test_the_bookkeeping_bench_tells_passes_from_the_rest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--width", "4", "--hidden", "64", "--dtype", "float32")
    printed = run_recipe("bench_bookkeeping.py", *arguments, monkeypatch=monkeypatch, capsys=capsys)
    row = json.loads(printed.splitlines()[-1])
    assert 0 < row["model_s"] < row["wall_s"] and 0 < row["outside_models"] < 1


def test_the_bench_of_passes_sets_lists_that_go_on_beside_lists_made_anew(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")
    printed = run_recipe("bench_passes.py", "--width", "4", "--rounds", "1", monkeypatch=monkeypatch, capsys=capsys)
    for sides in json.loads(printed.splitlines()[-1])["trees"].values():
        assert sides["anew"]["laid_out"] == sides["anew"]["passes"] == sides["goes on"]["passes"]
        assert 0 < sides["goes on"]["laid_out"] < sides["goes on"]["passes"] / 10


def test_the_bench_of_the_scorer_sets_what_is_kept_beside_reading_anew(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--searches", "1", "--width", "4")
    printed = run_recipe("bench_prm_scorer.py", *arguments, monkeypatch=monkeypatch, capsys=capsys)
    for row in json.loads(printed.splitlines()[-1])["rows"]:
        assert row["calls"] > 1 and row["tokens"]["kept"] < row["tokens"]["anew"]
        assert row["largest_gap"] < 1e-4, "the same scores"


def test_readme_of_the_cookbook_names_every_script() -> None:
    text = (COOKBOOK / "README.md").read_text()
    scripts = [path.relative_to(COOKBOOK).as_posix() for path in COOKBOOK.rglob("*.py")]
    helpers = {"training/data.py", "training/optim.py"}
    assert [name for name in scripts if name not in helpers and f"`{name}`" not in text] == []
