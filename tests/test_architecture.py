"""Who may import whom, read from the sources without running them.

    errors, types, config, messages, marks, catalog; errors <- scorers <- protocols <- search <- results
    kv, attention (which do not know each other) <- runtime <- models
    models, reference <- loading; results, models <- serving; loading, serving <- helper_process
    loading, serving, answers <- service <- services <- evaluation, ets_integrations
    results, answers <- hosted <- remote <- services
    terminal <- evaluation <- commands <- cli

The checker takes any folder that holds the two packages, so each rule is also tried on a planted violation.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import ets_engine

PACKAGES = ("ets_engine", "ets_integrations")
ROOT = Path(ets_engine.__file__).parent.parent

# What each part of ets_engine may know of the others, besides itself. Every part is listed, so a new one is a decision.
BASE = {"errors", "types", "config"}
ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "types": set(),
    "config": {"errors"},
    "messages": {"errors"},
    "scorers": {"errors"},
    "marks": set(),
    "catalog": set(),
    "lexical": set(),
    "protocols": BASE | {"messages", "scorers"},
    "testing": BASE | {"protocols", "lexical"},
    "search": BASE | {"protocols"},
    "results": BASE | {"protocols", "search"},
    "kv": BASE,
    "attention": BASE,
    "runtime": BASE | {"kv", "attention"},
    "reference": BASE | {"protocols"},
    "symbolic": set(),
    "extraction": set(),
    "answers": BASE | {"protocols", "reference", "symbolic", "extraction"},
    "tool_calls": {"errors", "messages"},
    "models": BASE | {"messages", "protocols", "scorers", "kv", "attention", "runtime", "reference", "answers"},
    "serving": BASE | {"messages", "protocols", "scorers", "search", "results", "runtime", "models"},
    "loading": BASE | {"protocols", "scorers", "runtime", "reference", "models"},
    "service": BASE
    | {"messages", "protocols", "scorers", "search", "runtime", "reference", "answers", "models", "loading", "serving"},
    "helper_process": BASE | {"scorers", "search", "runtime", "models", "loading", "serving"},
    "deadline": set(),
    "hosted": BASE
    | {"deadline", "messages", "protocols", "scorers", "lexical", "registry", "search", "results", "answers"},
    "remote": BASE | {"marks", "messages", "protocols", "scorers", "search", "results", "models", "hosted", "deadline"},
    "registry": BASE | {"protocols"},
    "services": BASE | {"protocols", "registry", "service", "remote"},
    "evaluation": BASE
    | {"protocols", "search", "runtime", "reference", "answers", "models", "service", "services", "terminal"},
    "terminal": BASE | {"protocols", "reference"},
    "commands": BASE | {"catalog", "reference", "models", "service", "services", "evaluation", "terminal"},
    "cli": BASE
    | {"protocols", "search", "reference", "answers", "models", "service", "services", "remote"}
    | {"evaluation", "terminal", "commands"},
}
PACKAGE_ROOT = ""  # `ets_engine/__init__.py` re-exports lazily; only the integrations and the CLI may import from it

ENGINES = {"torch", "triton", "transformers", "tokenizers", "safetensors"}
FRAMEWORKS = {"langchain", "langchain_core", "langgraph", "dspy"}
OUTSIDE_WORLD = {  # modules through which the search core could reach a clock, a file, a thread or a socket
    *("time", "datetime", "threading", "multiprocessing", "concurrent", "asyncio", "queue", "signal"),
    *("os", "io", "pathlib", "shutil", "tempfile", "subprocess", "socket", "ssl", "urllib", "http", "logging"),
}
PURE = (
    *("errors", "types", "config", "messages", "scorers", "lexical", "protocols", "search", "results", "testing"),
    *("tool_calls", "hosted", "deadline"),
)  # importable without any engine


@dataclass(frozen=True, slots=True)
class Import:
    """One import statement: where it stands and the dotted name it asks for."""

    path: Path  # relative to the folder that holds the packages
    line: int
    name: str

    @property
    def part(self) -> str:
        """The part of its package that the statement stands in, e.g. "search"."""
        return PACKAGE_ROOT if self.path.name == "__init__.py" and len(self.path.parts) == 2 else _stem(self.path)

    def __str__(self) -> str:
        """As an editor can open it."""
        return f"{self.path}:{self.line} imports {self.name}"


def _stem(path: Path) -> str:
    return path.parts[1].removesuffix(".py")


def imports(root: Path, package: str) -> Iterator[Import]:
    """Every import under one package, at any depth of nesting, `import_module("...")` included.

    Each name of `from a import b` counts as `a.b`, so that a submodule and a name are told apart by the arrows alone.
    """
    for file in sorted((root / package).rglob("*.py")):
        path = file.relative_to(root)
        parents = path.parent.parts
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
            match node:
                case ast.Import():
                    names = [alias.name for alias in node.names]
                case ast.ImportFrom(level=0):
                    names = [f"{node.module}.{alias.name}" for alias in node.names]
                case ast.ImportFrom():
                    above = ".".join(parents[: len(parents) - node.level + 1])
                    start = f"{above}.{node.module}" if node.module else above
                    names = [f"{start}.{alias.name}" for alias in node.names]
                case ast.Call(
                    func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                    args=[ast.Constant(value=str(name)), *_],
                ):
                    names = [name]
                case _:
                    continue
            for name in names:
                yield Import(path, node.lineno, name)


def wrong_arrows(root: Path, part: str) -> list[str]:
    """Imports of one part of ets_engine that turn an arrow round, and imports of packages above it."""
    wrong = []
    for found in imports(root, "ets_engine"):
        package, _, rest = found.name.partition(".")
        if found.part != part:
            continue
        if package in {"ets_integrations", "tests", "cookbook"}:
            wrong.append(str(found))
        elif package == "ets_engine":
            target = rest.split(".")[0]
            allowed = ARROWS[part] | {part} | ({"__version__"} if part in {"cli", "service"} else set())
            if target not in allowed:
                wrong.append(str(found))
    return wrong


def wrong_roots(root: Path, package: str, forbidden: set[str], parts: tuple[str, ...] | None = None) -> list[str]:
    """Imports of forbidden top-level modules, in the given parts of a package or in all of it."""
    return [
        str(found)
        for found in imports(root, package)
        if found.name.split(".")[0] in forbidden and (parts is None or found.part in parts)
    ]


def frameworks_out_of_place(root: Path) -> list[str]:
    """Imports of one integration's framework in another integration."""
    wrong = []
    for found in imports(root, "ets_integrations"):
        framework = found.name.split(".")[0]
        if framework in FRAMEWORKS:
            homes = {"dspy"} if framework == "dspy" else {"langchain", "agents", "serve"}
            if found.part not in homes:
                wrong.append(str(found))
    return wrong


def parts_of(root: Path) -> set[str]:
    """The parts that ets_engine has on disk."""
    return {
        child.name.removesuffix(".py")
        for child in (root / "ets_engine").iterdir()
        if child.name != "__init__.py" and (child.suffix == ".py" or any(child.glob("*.py")))
    }


def test_every_part_has_its_place() -> None:
    assert parts_of(ROOT) <= set(ARROWS)
    assert {"search", "kv", "attention", "runtime", "errors", "types", "config", "protocols"} <= parts_of(ROOT)


@pytest.mark.parametrize("part", sorted(ARROWS))
def test_arrows_never_turn_back(part: str) -> None:
    assert wrong_arrows(ROOT, part) == []


def test_the_table_of_arrows_has_no_cycle() -> None:
    known: set[str] = set()
    while ready := {part for part, allowed in ARROWS.items() if part not in known and allowed <= known}:
        known |= ready
    assert known == set(ARROWS)


def test_pure_parts_know_no_engine() -> None:
    assert wrong_roots(ROOT, "ets_engine", ENGINES, PURE) == []


def test_search_knows_no_outside_world() -> None:
    assert wrong_roots(ROOT, "ets_engine", OUTSIDE_WORLD, ("search",)) == []


def test_frameworks_stay_in_the_integrations() -> None:
    assert wrong_roots(ROOT, "ets_engine", FRAMEWORKS) == []
    assert frameworks_out_of_place(ROOT) == []


def test_integrations_know_neither_tests_nor_cookbook() -> None:
    assert wrong_roots(ROOT, "ets_integrations", {"tests", "cookbook"}) == []
    assert [str(one) for one in imports(ROOT, "ets_integrations") if one.name.startswith("ets_engine.testing")] == []


def plant(root: Path, path: str, source: str) -> None:
    """Write one module, and the packages around it, below `root`."""
    for package in PACKAGES:
        (root / package).mkdir()
        (root / package / "__init__.py").write_text("")
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("ets_engine/errors.py", "from ets_engine.types import Step"),
        ("ets_engine/config.py", "from ets_engine import types"),
        ("ets_engine/protocols.py", "from ets_engine.search.tree import SearchTree"),
        ("ets_engine/search/loop.py", "def late():\n    from ets_engine.runtime import Runner"),
        ("ets_engine/search/loop.py", "from ..models import policy"),
        ("ets_engine/search/__init__.py", "from ..models.policy import Policy"),
        ("ets_engine/search/loop.py", "from ets_engine import SearchConfig"),
        ("ets_engine/search/loop.py", "import ets_engine.testing"),
        ("ets_engine/search/loop.py", "import importlib\nimportlib.import_module('ets_engine.service')"),
        ("ets_engine/kv/pool.py", "from ets_engine.attention import tree_attention"),
        ("ets_engine/attention/api.py", "if TYPE_CHECKING:\n    import ets_engine.kv"),
        ("ets_engine/runtime/runner.py", "from ets_engine.models.policy import Policy"),
        ("ets_engine/models/policy.py", "from ets_engine.search import search"),
        ("ets_engine/reference/story.py", "from ets_engine.models import policy"),
        ("ets_engine/service.py", "from ets_engine.cli import main"),
        ("ets_engine/service.py", "import ets_integrations.langchain"),
        ("ets_engine/cli.py", "from cookbook import recipe"),
    ],
)
def test_a_planted_arrow_is_found(tmp_path: Path, path: str, source: str) -> None:
    plant(tmp_path, path, source)
    part = path.split("/")[1].removesuffix(".py")
    assert len(wrong_arrows(tmp_path, part)) == 1


def test_allowed_imports_pass(tmp_path: Path) -> None:
    plant(
        tmp_path,
        "ets_engine/search/loop.py",
        "import math\nimport numpy as np\nfrom . import tree\nfrom .tree import SearchTree\nfrom ..types import Step\n"
        "from ets_engine.protocols import Policy\n",
    )
    assert wrong_arrows(tmp_path, "search") == []
    assert wrong_roots(tmp_path, "ets_engine", ENGINES | OUTSIDE_WORLD | FRAMEWORKS) == []


@pytest.mark.parametrize("source", ["import torch.nn", "from transformers import AutoModel", "__import__('triton')"])
def test_a_planted_engine_is_found(tmp_path: Path, source: str) -> None:
    plant(tmp_path, "ets_engine/search/deep/inside.py", source)
    assert len(wrong_roots(tmp_path, "ets_engine", ENGINES, PURE)) == 1
    assert wrong_roots(tmp_path, "ets_engine", ENGINES, ("kv",)) == []


@pytest.mark.parametrize("source", ["import time", "from pathlib import Path", "import os.path", "import asyncio"])
def test_a_planted_clock_or_file_is_found(tmp_path: Path, source: str) -> None:
    plant(tmp_path, "ets_engine/search/loop.py", source)
    assert len(wrong_roots(tmp_path, "ets_engine", OUTSIDE_WORLD, ("search",))) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("ets_integrations/dspy/lm.py", "from langchain_core.messages import AIMessage"),
        ("ets_integrations/langchain/chat.py", "import dspy"),
        ("ets_integrations/__init__.py", "import dspy"),
        ("ets_integrations/agents.py", "def late():\n    import dspy"),
    ],
)
def test_a_planted_framework_is_found(tmp_path: Path, path: str, source: str) -> None:
    plant(tmp_path, path, source)
    assert len(frameworks_out_of_place(tmp_path)) == 1


def test_a_new_part_without_a_place_is_found(tmp_path: Path) -> None:
    plant(tmp_path, "ets_engine/shortcuts/tricks.py", "")
    assert parts_of(tmp_path) - set(ARROWS) == {"shortcuts"}
