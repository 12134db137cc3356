"""The DSPy recipes of the cookbook run on the shipped models, as a reader would run them."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dspy
import pytest

COOKBOOK = Path(__file__).parents[2] / "cookbook"
Recipe = Callable[..., str]


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Recipe]:
    """Runs a recipe by name and gives what it printed; DSPy's settings and caches are put back afterwards."""
    cache, adapter = dspy.cache, dspy.settings.adapter
    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=True)

    def run(name: str, *arguments: Any) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(COOKBOOK / name), run_name="__main__")
        return capsys.readouterr().out

    yield run
    dspy.configure(adapter=adapter)
    dspy.cache = cache


def test_compare_prints_a_line_per_program(recipe: Recipe) -> None:
    printed = recipe("dspy_compare.py", "--count", 3, "--width", 4)
    lines = dict(
        re.findall(r"^(dspy\.Predict|dspy\.BestOfN|ETSReasoner|  with the checker).* ([0-3])/3 solved", printed, re.M)
    )
    assert len(lines) == 4 and int(lines["dspy.BestOfN"]) >= int(lines["dspy.Predict"])
    shared = [float(figure) for figure in re.findall(r"KV shared ([0-9.]+) x", printed)]
    assert len(shared) == 2 and min(shared) > 1


def test_a_search_bootstraps_at_least_the_demos_of_a_sample(recipe: Recipe, tmp_path: Path) -> None:
    printed = recipe("dspy_optimize.py", "--count", 4, "--save", tmp_path / "compiled.json")
    sample, search = (int(count) for count in re.findall(r"^teacher one \w+: (\d+) demos from 4", printed, re.M))
    assert search > sample and (tmp_path / "compiled.json").read_text().count("Use ") == search


def test_the_metric_after_the_search_is_never_worse_than_the_prm_alone(recipe: Recipe) -> None:
    printed = recipe("dspy_verifier.py", "--count", 2)
    alone, after, inside, steps = (int(count) for count in re.findall(r"solved (\d) of 2", printed))
    assert after >= alone and steps >= inside and steps > 0
