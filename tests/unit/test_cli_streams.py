"""Where the commands cannot read or write is said in one line, before anything is loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ets_engine import cli


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
