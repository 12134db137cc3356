"""The recipes that make verifiers run, and what they promise about programs that misbehave holds."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from ets_engine.models import Probe

from .test_recipes import COOKBOOK, run_recipe


@pytest.fixture(scope="module")
def tests_of() -> Any:
    """The recipe's `CodeTests`."""
    return runpy.run_path(str(COOKBOOK / "code_tests_verifier.py"))["CodeTests"]


def test_unit_tests_find_the_program_that_passes_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = run_recipe("code_tests_verifier.py", monkeypatch=monkeypatch, capsys=capsys)
    assert "a, b = b, a + b" in printed and re.search(r"score 1\.00: 4 tests, 4 programs judged", printed)


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("x = 1", 0.5),
        ("x = 2", 0.5),
        ("x = [1, 2][0] + True * 0; y = 3", 1.0),
        ("import sys; sys.exit(0)", 0.0),
        ("import os; os._exit(0)", 0.0),
        ("while True: pass", 0.0),
        ("x = 1; y = bytearray(2**30)", 0.0),
        ("open('large', 'w').write('a' * 2**21); x, y = 1, 3", 0.0),
        ("x = ", 0.0),
    ],
    ids=["one-passes", "other-passes", "both", "exit", "_exit", "endless", "memory", "file", "syntax"],
)
def test_programs_in_their_limits(tests_of: Any, program: str, expected: float) -> None:
    tests = ("assert x == 1", "assert 'y' in globals() or x == 2")
    scorer = tests_of(tests, timeout_s=1 if expected == 0.0 else 20)
    assert scorer("", ["Here:\n", f"```python\n{program}\n```"]) == expected


def test_a_solution_without_a_program_scores_nothing(tests_of: Any) -> None:
    assert tests_of(("pass",))("", ["It is obvious."]) == 0.0


def test_a_probe_is_trained_saved_and_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "probe.safetensors"
    arguments = ("--problems", "2", "--width", "3", "--out", str(path))
    printed = run_recipe("train_probe.py", *arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert [
        name for name, _ in re.findall(r"^(.*\S) +AUC ([01]\.\d+|nan), at one depth (?:[01]\.\d+|nan)$", printed, re.M)
    ] == [*("probe", "log-probability", "self-certainty")]
    assert Probe.load(path).policy == "reference" and f"verifier='probe:{path}'" in printed
