"""The LangChain recipes run on the shipped models, as a reader would run them."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

COOKBOOK = Path(__file__).parents[2] / "cookbook"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def run_recipe(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(COOKBOOK / name), run_name="__main__")
        return capsys.readouterr().out

    return run_recipe


def test_the_changed_line_solves_more(run) -> None:
    printed = run("langchain_chain.py", "--count", "12")
    plain, searched = (int(re.search(rf"{name} +(\d+)/12", printed)[1]) for name in ("one plain call", "tree search"))
    assert searched > plain


def test_the_agent_s_searched_step_is_right(run) -> None:
    printed = run("langchain_agent.py")
    assert re.search(r"plain agent .* wrong", printed) and re.search(r"last call searched .* right", printed)
    assert re.search(r"search as a tool +Answer: \S", printed)


def test_the_graph_shows_live_progress_and_keeps_a_checkpoint(run) -> None:
    lines = run("langgraph_progress.py", "--width", "16").splitlines()
    assert lines[0].startswith("ets.start") and any(line.startswith("ets.end") for line in lines)
    assert any(line.startswith("text") for line in lines) and re.match(r"checkpoint \S+, score \d", lines[-1])


def test_the_plain_model_answers_what_the_search_refuses(run) -> None:
    first, second = run("langchain_fallbacks.py").splitlines()
    assert first.endswith("tree search") and second.endswith("plain model")
