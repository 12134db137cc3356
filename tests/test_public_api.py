"""What `import ets_engine` promises: sorted public names, quick, and no model library until one is needed."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import json
import statistics
import subprocess
import sys

import pytest

import ets_engine

HEAVY = ("torch", "triton", "transformers", "langchain_core", "dspy")
MAX_IMPORT_S = 0.3


def loaded_by(statement: str) -> set[str]:
    """Heavy top-level modules that a statement loads in a fresh process."""
    program = f"import json, sys\n{statement}\nprint(json.dumps(sorted(set(sys.modules) & {set(HEAVY)!r})))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    return set(json.loads(done.stdout))


def import_seconds(statement: str) -> float:
    """Seconds a statement takes in a fresh process, the interpreter's own start excluded."""
    program = f"import time\nstart = time.perf_counter()\n{statement}\nprint(time.perf_counter() - start)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    return float(done.stdout)


@pytest.mark.parametrize(
    "statement",
    [
        "import ets_engine",
        "import ets_integrations",
        "from ets_engine import EngineConfig, ETSError, SearchConfig, SearchEvent, SearchResult",
        "import ets_engine.search, ets_engine.testing, ets_engine.reference",
    ],
)
def test_import_loads_no_model_library(statement: str) -> None:
    assert loaded_by(statement) == set()


def test_a_heavy_import_is_seen() -> None:
    assert loaded_by("import types; sys.modules['torch'] = types.ModuleType('torch')") == {"torch"}


@pytest.mark.parametrize("name", ["ets_engine", "ets_integrations"])
def test_import_is_quick(name: str) -> None:
    assert statistics.median(import_seconds(f"import {name}") for _ in range(3)) < MAX_IMPORT_S


def test_a_slow_import_is_seen() -> None:
    assert import_seconds(f"time.sleep({MAX_IMPORT_S})") >= MAX_IMPORT_S


def test_public_names_are_sorted_and_unique() -> None:
    assert ets_engine.__all__ == sorted(set(ets_engine.__all__))


@pytest.mark.parametrize("name", ets_engine.__all__)
def test_public_name_exists(name: str) -> None:
    assert getattr(ets_engine, name) is not None
    assert name in dir(ets_engine)


def test_every_public_error_is_an_ets_error() -> None:
    errors = [name for name in ets_engine.__all__ if name.endswith("Error")]
    assert errors
    assert all(issubclass(getattr(ets_engine, name), ets_engine.ETSError) for name in errors)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = ets_engine.Nonsense


def test_version_is_the_distribution_s() -> None:
    assert ets_engine.__version__ == importlib.metadata.version("ets-integrations")


@pytest.mark.parametrize("package", ["ets_engine", "ets_integrations"])
def test_types_are_shipped(package: str) -> None:
    assert importlib.resources.files(package).joinpath("py.typed").is_file()
