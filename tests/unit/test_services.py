"""Services by name: those that were registered, and models otherwise."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from ets_engine import registry
from ets_engine.config import EngineConfig, SearchConfig
from ets_engine.errors import ConfigError, ModelLoadError
from ets_engine.hosted import HostedEngine
from ets_engine.protocols import SearchService
from ets_engine.registry import register_service, registered_service
from ets_engine.services import find_service


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})


def hosted(name: str) -> HostedEngine:
    return HostedEngine(lambda request: [], name=name)


def test_what_was_registered_is_found_whatever_else_is_asked_for() -> None:
    mine, other = hosted("mine"), hosted("other")
    register_service("mine", mine)
    register_service("by another name", other)
    assert find_service("mine") is registered_service("mine") is mine
    assert find_service("mine", "a verifier", EngineConfig(dtype="float64")) is mine
    assert find_service("by another name") is other
    with pytest.raises(ConfigError, match="'other' is not registered"):
        registered_service("other")


def test_a_name_can_be_given_anew() -> None:
    first, second = hosted("mine"), hosted("mine")
    register_service("mine", first)
    register_service("mine", second)
    assert find_service("mine") is second


def test_anything_that_searches_is_a_service() -> None:
    class Mine:
        name = "mine"
        max_concurrent_searches = 1

        def submit(self, problem: Any, config: SearchConfig | None = None, **options: Any) -> Any: ...

        def count_tokens(self, text: str) -> int:
            return len(text)

    register_service("mine", Mine())
    assert isinstance(find_service("mine"), SearchService) and find_service("mine").count_tokens("ab") == 2
    with pytest.raises(ConfigError, match="give an ETSEngine"):
        register_service("a class", Mine)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("wrong", [None, "reference", print, object(), HostedEngine])
def test_what_is_no_service_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="give an ETSEngine, or anything else with submit"):
        register_service("wrong", wrong)
    with pytest.raises(ConfigError, match="'wrong' is not registered"):
        registered_service("wrong")


def test_a_name_that_nobody_registered_is_a_model() -> None:
    with pytest.raises(ModelLoadError, match="no-such/model"):
        find_service("no-such/model")
    with pytest.raises(ConfigError, match="only knows the problems of model='reference'"):
        find_service("no-such/model", "reference")


def test_a_model_is_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def get_engine(*key: Any) -> str:
        asked.append(key)
        return "the engine"

    monkeypatch.setattr("ets_engine.service.get_engine", get_engine)
    config = EngineConfig(dtype="float64")
    assert (find_service("a/model", "a/prm", config), find_service("a/model")) == ("the engine", "the engine")
    assert asked == [("a/model", "a/prm", config), ("a/model", None, None)]


@pytest.fixture
def names() -> Iterator[list[str]]:
    yield [f"service-{i}" for i in range(50)]


def test_from_many_threads(names: list[str]) -> None:
    found: list[bool] = []

    def work() -> None:
        for name in names:
            register_service(name, hosted(name))
            found.append(find_service(name).name == name)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found == [True] * 400
