"""Services by name: those that were registered, and models otherwise."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ets_engine import registry, services
from ets_engine.config import EngineConfig, SearchConfig
from ets_engine.errors import ConfigError, ModelLoadError
from ets_engine.hosted import HostedEngine
from ets_engine.models import PrmScorer
from ets_engine.protocols import SearchService
from ets_engine.registry import register_service, registered_service
from ets_engine.remote import RemoteEngine
from ets_engine.service import ETSEngine, _name
from ets_engine.services import find_service, open_engine


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


@pytest.mark.parametrize("find", [find_service, open_engine])
def test_a_file_in_the_place_of_its_folder_is_refused(tmp_path: Path, find: Any) -> None:
    (tmp_path / "config.json").write_text("{}")
    for names, role in (
        ((str(tmp_path / "config.json"),), "model"),
        (("m", str(tmp_path / "config.json")), "verifier"),
    ):
        with pytest.raises(ConfigError, match=f"^{role}='.*config.json' is a file; give the folder that holds it, '"):
            find(*names)
    with pytest.raises(ModelLoadError):
        find(str(tmp_path), "logprob")


@pytest.mark.parametrize("role", ["model", "verifier"])
def test_so_is_it_by_what_loads_models(tmp_path: Path, role: str) -> None:
    file = tmp_path / "config.json"
    file.write_text("{}")
    with pytest.raises(ConfigError, match=f"^{role}='{file}' is a file; give the folder that holds it, '{tmp_path}'$"):
        if role == "model":
            ETSEngine.from_pretrained(str(file), "logprob")
        else:
            PrmScorer.from_pretrained(str(file))


def test_an_engine_of_ones_own_is_nobody_elses() -> None:
    first = open_engine("openai:http://127.0.0.1:9#m", "judge:openai:http://127.0.0.1:9#j")
    second = open_engine("openai:http://127.0.0.1:9#m", "judge:openai:http://127.0.0.1:9#j")
    assert isinstance(first, RemoteEngine) and first is not second and first.name == second.name
    first.close()
    second.close()
    with open_engine("reference", None, EngineConfig(device="cpu")) as engine:
        assert isinstance(engine, ETSEngine) and engine.name == "reference"


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


# ---------------------------------------------------------------------- models behind servers

ADDRESS = "openai:http://127.0.0.1:9#m"  # connecting asks nothing, so nobody need be there


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[Any, RemoteEngine]]:
    """The engines over servers that this test made."""
    made: dict[Any, RemoteEngine] = {}
    monkeypatch.setattr(services, "_connected", made)
    yield made
    for engine in made.values():
        engine.close()


def test_there_is_one_engine_per_address_verifier_and_settings(connected: dict[Any, RemoteEngine]) -> None:
    other = ADDRESS.replace(":9", ":10")
    asked: list[tuple[Any, ...]] = [
        (ADDRESS,),
        (other,),
        (ADDRESS, f"judge:{ADDRESS}"),
        (ADDRESS, f"judge:{other}"),
        (ADDRESS, None, EngineConfig(dtype="float64")),
    ]
    found = [find_service(*one) for one in asked]
    assert all(isinstance(one, RemoteEngine) for one in found) and len({id(one) for one in found}) == len(asked)
    assert [find_service(*one) for one in asked] == found
    assert find_service(ADDRESS, None, EngineConfig()) is found[0], "the usual settings are those of nobody's choice"
    assert len({one.name for one in found}) == len(asked) - 1, "how a PRM would run here decides nothing there"


def test_a_closed_one_is_made_anew_and_the_others_stay(connected: dict[Any, RemoteEngine]) -> None:
    first, judged = find_service(ADDRESS), find_service(ADDRESS, f"judge:{ADDRESS}")
    assert isinstance(first, RemoteEngine)
    first.close()
    again = find_service(ADDRESS)
    assert again is not first and isinstance(again, RemoteEngine) and not again.is_closed
    assert (again.name, find_service(ADDRESS)) == (first.name, again)
    assert find_service(ADDRESS, f"judge:{ADDRESS}") is judged


def test_what_was_registered_comes_before_an_address(connected: dict[Any, RemoteEngine]) -> None:
    mine = hosted("mine")
    register_service(ADDRESS, mine)
    assert find_service(ADDRESS) is mine and not connected


def test_threads_that_ask_at_once_get_the_same_engine(connected: dict[Any, RemoteEngine]) -> None:
    found: list[SearchService] = []
    gate = threading.Barrier(8)

    def work() -> None:
        gate.wait(20)
        found.append(find_service(ADDRESS))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(found) == 8 and len({id(one) for one in found}) == len(connected) == 1


# ---------------------------------------------------------------------- names of engines

# Every setting with another value than the usual one, and whether it decides answers: a new setting must be put here.
CHANGES: dict[str, tuple[Any, bool]] = {
    "device": ("cpu", False),
    "dtype": ("float64", True),
    "page_tokens": (4, False),
    "kv_pool_tokens": (4096, False),
    "kv_memory_fraction": (0.2, False),
    "prefill_chunk_tokens": (64, False),
    "prefix_cache_tokens": (0, False),
    "cuda_graphs": (False, False),
    "compile_layers": (True, False),
    "processes": (2, False),
    "max_queued_searches": (8, False),
    "trust_remote_code": (True, False),
    "preset": ("plain", True),
    "verifier_format": ("trl", True),
    "step_separator": ("\n\n", True),
    "embedder": ("an/embedder", True),
    "load_options": ({"revision": "main"}, True),
    "verifier_load_options": ({"revision": "main"}, True),
}


@pytest.mark.parametrize("setting", sorted(EngineConfig.model_fields))
def test_a_name_says_what_decides_answers_and_nothing_else(setting: str) -> None:
    value, decides = CHANGES[setting]
    usual, changed = _name("m", "v", EngineConfig()), _name("m", "v", EngineConfig(**{setting: value}))
    assert usual == "m+v"
    assert changed == (f"m+v+{setting}={value!r}" if decides else usual)


@pytest.mark.parametrize("setting", sorted(EngineConfig.model_fields))
def test_so_does_the_name_of_one_over_a_server(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy is loaded there, so that only its preset is chosen here; the PRM runs here."""
    monkeypatch.setattr(PrmScorer, "from_pretrained", lambda verifier, config: lambda problem, steps: 0.5)
    value, _ = CHANGES[setting]
    decides = {"preset", "dtype", "verifier_format", "step_separator", "verifier_load_options"}
    with open_engine(ADDRESS, "v", EngineConfig(**{setting: value})) as engine:
        assert (engine.name == "openai:http://127.0.0.1:9/v1#m+v") == (setting not in decides)
        assert setting not in decides or f"+{setting}={value!r}" in engine.name


def test_equal_settings_have_equal_names_and_others_have_not() -> None:
    options = {"a": 1, "b": {"c": [2]}}
    one = EngineConfig(dtype="float64", preset="plain", load_options=options, page_tokens=4)
    two = EngineConfig(preset="plain", load_options={"b": {"c": [2]}, "a": 1}, dtype="float64")
    assert _name("m", None, one) == _name("m", None, two) == f"m+dtype='float64'+preset='plain'+load_options={options}"
    three = two.model_copy(update={"load_options": {"a": 1, "b": {"c": [3]}}})
    names = [_name("m", None, two), _name("m", None, three), _name("m", "v", two), _name("n", None, two)]
    assert len(set(names)) == len(names)


def test_an_engine_bears_that_name() -> None:
    config = EngineConfig(device="cpu", step_separator="\n", prefix_cache_tokens=0)
    with ETSEngine.from_pretrained("reference", "reference", config) as engine:
        assert engine.name == "reference+reference+step_separator='\\n'"
