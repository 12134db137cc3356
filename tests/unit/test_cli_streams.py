"""Where the commands cannot read or write is said in one line, before anything is loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ets_engine import cli
from ets_engine.config import SearchConfig
from ets_engine.evaluation.tree_page import write_trace
from ets_engine.hosted import HostedEngine
from ets_engine.types import Step, StopReason


def test_a_closed_standard_input_holds_no_problem() -> None:
    command = ["sh", "-c", 'exec "$@" <&-', "sh", sys.executable, "-m", "ets_engine.cli", "solve", "-"]
    done = subprocess.run(command, capture_output=True, text=True)
    said = "ets: PROBLEM is -, and standard input is closed: say what to solve\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


@pytest.mark.parametrize("below", ["", "deep/below"])
def test_results_go_into_a_folder(tmp_path: Path, below: str) -> None:
    file = tmp_path / "mine"
    file.write_text("mine")
    done = CliRunner().invoke(
        cli.app, ["bench", "--model", "no/such", "--verifier", "none", "--out", str(file / below)]
    )
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == f"ets: out={str(file / below)!r}: {str(file)!r} is a file; name a folder\n"
    assert file.read_text() == "mine"


def test_results_that_cannot_be_written_are_refused_before_models_load() -> None:
    done = CliRunner().invoke(cli.app, ["bench", "--model", "no/such", "--verifier", "none", "--out", "/proc/none"])
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("ets: no folder /proc/none can be made for results: ")


def test_a_page_goes_where_it_can_be_written_and_not_over_its_tree(tmp_path: Path) -> None:
    tree, nodes = tmp_path / "tree.jsonl", [Step("The answer is 2.", 5, StopReason.FINISHED)]
    with HostedEngine(lambda request: nodes * len(request.children), lambda problem, steps: 0.5, name="t") as engine:
        config = SearchConfig(strategy="best_of_n", width=1, trace=True)
        write_trace(engine.search("1+1?", config), tree)
    before = tree.read_text()
    for out, said in ((tree, "is the tree itself"), (tmp_path, "Is a directory"), (tmp_path / "no" / "a", "No such")):
        done = CliRunner().invoke(cli.app, ["tree", str(tree), "--out", str(out)])
        assert (done.exit_code, done.stdout) == (2, "") and said in done.stderr, done.stderr
    assert tree.read_text() == before
    assert CliRunner().invoke(cli.app, ["tree", str(tree)]).exit_code == 0


def test_problems_go_to_whoever_reads_only_the_first() -> None:
    command = f"{sys.executable} -m ets_engine.reference --count 20000 | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stdout.count("\n") == 1 and not done.stderr
