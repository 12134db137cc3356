"""The process that compares symbolically starts wherever the user stands, and says so where it cannot."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ets_engine.symbolic import SymbolicProcess


@pytest.fixture
def process() -> Iterator[SymbolicProcess]:
    started = SymbolicProcess(limit_s=1)
    yield started
    started.close()


def test_modules_where_the_user_stands_are_not_pythons(
    process: SymbolicProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("random", "signal"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not me')\n")
    monkeypatch.chdir(tmp_path)
    assert process.same("x+1", "1+x")


def test_a_checkout_that_only_the_working_directory_leads_to_is_found(
    process: SymbolicProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(Path(__file__).parents[2])
    monkeypatch.setattr(sys, "path", ["", *(path for path in sys.path if path and Path(path) != Path(root))])
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.chdir(root)
    assert process.same("x+1", "1+x")


def test_a_process_that_cannot_start_is_reported_once_and_tried_again(
    process: SymbolicProcess, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING):
        patched.setattr(sys, "executable", "/bin/false")
        assert not process.same("x+1", "1+x") and not process.same("x+2", "2+x")
        patched.setattr(sys, "executable", "/nowhere/python")
        assert not process.same("x+1", "1+x")
    assert [record.message for record in caplog.records] == [
        "answers are compared without math-verify, and some that are equal differ: its process ended with 1 before it "
        "was ready"
    ]
    assert process.same("x+1", "1+x") and process.same("x+2", "2+x"), "what was not compared is not remembered"
