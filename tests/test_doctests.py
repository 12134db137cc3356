"""Every module of the installed packages imports, and the examples in its docstrings run."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import ets_engine
import ets_integrations

OPTIONAL = {"dspy", "fastapi", "httpx", "langchain", "langchain_core", "langgraph", "matplotlib", "openai", "plotly"}
OPTIONAL |= {"triton", "uvicorn"}


def modules() -> list[str]:
    """Dotted names of all modules, found as files so that listing them imports nothing."""
    names = []
    for package in (ets_engine, ets_integrations):
        root = Path(package.__file__).parent
        for file in root.rglob("*.py"):
            parts = file.relative_to(root.parent).with_suffix("").parts
            names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return sorted(name for name in names if not name.endswith(".__main__"))


@pytest.mark.parametrize("name", modules())
def test_examples_run(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in OPTIONAL:
            raise
        pytest.skip(f"{error.name} is not installed")
    assert doctest.testmod(module).failed == 0


def test_modules_are_found() -> None:
    assert {"ets_engine", "ets_engine.search.tree", "ets_integrations"} <= set(modules())


def test_a_wrong_example_is_seen() -> None:
    def example() -> None:
        """Say a number.

        >>> 1 + 1
        3
        """

    runner = doctest.DocTestRunner(verbose=False)
    for case in doctest.DocTestFinder().find(example, "example"):
        runner.run(case, out=lambda text: None)
    assert runner.summarize(verbose=False).failed == 1
