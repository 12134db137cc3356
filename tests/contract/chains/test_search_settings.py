"""Settings of `ChatETS` and `ETSRunnable`: each is honoured or refused, and models are found once, off the loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.runnables import ConfigurableField

from ets_engine import ConfigError, HostedEngine, register_service
from ets_integrations.langchain import ChatETS, ETSRunnable, settings

from .scripted import Spy, scripted, spied

BOTH = pytest.mark.parametrize("kind", [ChatETS, ETSRunnable])
Kind = type[ChatETS] | type[ETSRunnable]


# ---------------------------------------------------------------------- names, in the constructor


@BOTH
def test_every_field_of_a_search_may_be_given_by_its_name(kind: Kind) -> None:
    found = kind(model="m", top_k=3, node_cost="nodes", deadline_s=0.5, search={"min_p": 0.1, "top_k": 9}, stop=["END"])
    config = found.resolve_search()
    assert (config.top_k, config.node_cost, config.min_p, config.stop) == (3, "nodes", 0.1, ("END",))
    assert (config.deadline_s, found.timeout) == (0.5, 0.5)


@BOTH
def test_a_timeout_goes_before_a_deadline(kind: Kind) -> None:
    assert kind(model="m", timeout=2.0, deadline_s=1.0).resolve_search().deadline_s == 2.0


@BOTH
@pytest.mark.parametrize(
    ("name", "hint"), [("lamda_b", r"'lamda_b' \(did you mean 'lambda_b'\?\)"), ("depth", "'depth'; choose from")]
)
def test_an_unknown_name_is_refused_in_the_constructor(kind: Kind, name: str, hint: str) -> None:
    with pytest.raises(ValueError, match=f"{kind.__name__} has no setting {hint}"):
        kind(**{"model": "m", name: 7})


def test_a_value_of_a_moved_field_is_checked() -> None:
    with pytest.raises(ValueError, match="top_k"):
        ChatETS(model="m", top_k=-1)


def test_what_langchain_gives_every_chat_model_is_taken() -> None:
    standard = {"max_retries": 2, "api_key": "k", "cache": False, "tags": ["a"], "disable_streaming": True, "name": "n"}
    assert ChatETS(model_name="m", stop_sequences=["END"], **standard).resolve_search().stop == ("END",)


def test_a_subclass_has_fields_of_its_own() -> None:
    class Mine(ChatETS):
        depth: int = 1

    assert Mine(model="m", depth=3, top_k=2).resolve_search().top_k == 2


def test_configurable_fields_keep_what_was_moved() -> None:
    spy, _ = spied()
    solve = ETSRunnable(engine=spy, top_k=3).configurable_fields(width=ConfigurableField(id="w"))
    solve.invoke("?", config={"configurable": {"w": 2}})
    assert (spy.submitted[0][1].width, spy.submitted[0][1].top_k) == (2, 3)


# ---------------------------------------------------------------------- names, per call


@BOTH
def test_a_deadline_of_a_call_goes_before_the_timeout_of_all(kind: Kind) -> None:
    found = kind(model="m", timeout=9.0)
    assert found.resolve_search({"deadline_s": 1.0}).deadline_s == 1.0
    assert found.resolve_search({"deadline_s": 1.0, "timeout": 2.0}).deadline_s == 2.0


@BOTH
@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("widht", "'width'"),
        ("lamda_b", "'lambda_b'"),
        ("deadline", "'deadline_s'"),
        ("verifier", "constructor"),
        ("output", "constructor"),
        ("search", "own names"),
        ("stop_sequences", "say stop"),
    ],
)
def test_a_call_that_would_not_be_honoured_is_refused(kind: Kind, name: str, way: str) -> None:
    spy, _ = spied()
    with pytest.raises(ConfigError, match=f"{name}.*{way}"):
        kind(engine=spy).invoke("?", **{name: "x"})
    assert not spy.submitted


def test_what_langchain_and_agents_say_besides_is_let_through() -> None:
    theirs = (
        "tools tool_choice response_format ls_structured_output_format strict stream stream_usage stream_options "
        "parallel_tool_calls functions function_call reasoning reasoning_effort max_output_tokens min_tokens top_n "
        "models system user metadata output_version service_tier extra_body n logprobs cache_control"
    )
    assert ChatETS(model="m").resolve_search(dict.fromkeys(theirs.split(), "x")) == ChatETS(model="m").resolve_search()


@BOTH
def test_one_stop_text_is_not_its_letters(kind: Kind) -> None:
    spy, _ = spied()
    kind(engine=spy).invoke("?", stop="\nObservation")
    kind(engine=spy).bind(stop=["a", "b"]).invoke("?")
    assert [config.stop for _, config, _ in spy.submitted] == [("\nObservation",), ("a", "b")]


@pytest.mark.parametrize("bind", [True, False])
def test_a_tool_that_only_its_provider_runs_is_refused(bind: bool) -> None:
    chat, search = ChatETS(engine=spied()[0]), {"type": "web_search_preview"}
    with pytest.raises(ConfigError, match="web_search_preview"):
        chat.bind_tools([search]) if bind else chat.invoke("?", tools=[search])


def test_a_batch_of_results_keeps_the_concurrency_that_was_asked_for() -> None:
    service, script = scripted(delay_s=0.01)
    found = ETSRunnable(engine=service, width=1).batch([f"{i}?" for i in range(8)], config={"max_concurrency": 2})
    assert script.most_at_once <= 2 and [one.problem for one in found] == [f"{i}?" for i in range(8)]


# ---------------------------------------------------------------------- finding models


class Loader:
    """Finds a service for every name, and remembers in which thread."""

    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []

    def __call__(self, model: str, verifier: str | None = None) -> Spy:
        self.threads.append(threading.current_thread())
        return spied(name=model)[0]


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loader]:
    loader = Loader()
    monkeypatch.setattr(settings, "find_service", loader)
    monkeypatch.setattr(settings, "_found", {})
    yield loader


@BOTH
@pytest.mark.parametrize("stream", [False, True])
def test_models_are_loaded_beside_the_event_loop(kind: Kind, stream: bool, loader: Loader) -> None:
    async def ask() -> None:
        found: Any = kind(model="m", width=1)
        if stream:
            assert [one async for one in found.astream("?")]
        else:
            await found.ainvoke("?")

    asyncio.run(ask())
    assert loader.threads and threading.main_thread() not in loader.threads


@BOTH
def test_what_is_at_hand_needs_no_thread(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    spy, _ = spied()
    register_service("fake/at-hand", spy)
    monkeypatch.setattr(asyncio, "to_thread", None)
    asyncio.run(kind(engine=spy, width=1).ainvoke("?"))
    asyncio.run(kind(model="fake/at-hand", width=1).ainvoke("?"))
    assert len(spy.submitted) == 2


def test_a_service_that_is_registered_anew_is_the_one_that_answers() -> None:
    old, new = spied()[0], spied()[0]
    chat = ChatETS(model="fake/anew", width=1)
    for spy in (old, new):
        register_service("fake/anew", spy)
        chat.invoke("?")
    assert (len(old.submitted), len(new.submitted)) == (1, 1)


# ---------------------------------------------------------------------- who is who


def test_no_seed_is_another_search_than_seed_0() -> None:
    spy, _ = spied()
    cache = InMemoryCache()
    for seed in (None, 0, None, 0):
        ChatETS(engine=spy, width=2, seed=seed, cache=cache).invoke("?")
    assert len(spy.submitted) == 2 and spy.submitted[1][1].seed == 0


def test_another_verifier_is_another_search_in_a_copy_too() -> None:
    spy, _ = spied()
    first = ChatETS(engine=spy, width=2, verifier=lambda problem, steps: 0.1, cache=InMemoryCache())
    copied = first.model_copy(update={"verifier": lambda problem, steps: 0.9})
    changed = first.model_copy()
    changed.verifier = lambda problem, steps: 0.5
    scores = [chat.invoke("?").response_metadata["ets"]["score"] for chat in (first, copied, changed)]
    assert scores == [0.1, 0.9, 0.5]
    first.model_copy().invoke("?")
    assert len(spy.submitted) == 3, "a copy with the same verifier is the same"


@BOTH
def test_a_copy_with_settings_searches_as_if_each_call_had_them(kind: Kind) -> None:
    found = kind(model="m", width=4, search={"top_k": 9, "width": 5}, timeout=9.0)
    for changes in (
        {"width": 8},
        {"effort": "high"},
        {"effort": "low", "width": 7},
        {"top_k": 3, "deadline_s": 2.0},
        {"deadline_s": 2.0, "timeout": 1.0},
        {"stop": "END", "temperature": None},
    ):
        assert found.with_search(changes).resolve_search() == found.resolve_search(changes)
    assert found.with_search({"model": "other"}).model_id() == "other"
    with pytest.raises(ConfigError, match="width"):
        found.with_search({"widht": 3})


@BOTH
def test_a_loaded_model_needs_no_thread(kind: Kind, loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    kind(model="m", width=1).invoke("?")
    monkeypatch.setattr(asyncio, "to_thread", None)
    asyncio.run(kind(model="m", width=1).ainvoke("?"))
    assert len(loader.threads) == 1


def test_a_model_that_was_closed_is_found_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[HostedEngine] = []

    def find(model: str, verifier: str | None = None) -> HostedEngine:
        made.append(scripted()[0])
        return made[-1]

    monkeypatch.setattr(settings, "find_service", find)
    monkeypatch.setattr(settings, "_found", {})
    for _ in range(2):
        ChatETS(model="m", width=1).invoke("?")
        asyncio.run(ChatETS(model="m", width=1).ainvoke("?"))
        made[-1].close()
    assert len(made) == 2


# ---------------------------------------------------------------------- what a provider alone could do


@pytest.mark.parametrize("bad", [{"type": "json_object"}, {"type": "json_schema", "json_schema": {}}, "json"])
def test_a_format_of_a_provider_is_refused(bad: Any) -> None:
    spy, _ = spied()
    with pytest.raises(ConfigError, match="with_structured_output"):
        ChatETS(engine=spy).bind(response_format=bad).invoke("?")
    assert not spy.submitted
    assert ChatETS(engine=spy, width=2).bind(response_format={"type": "text"}).invoke("?").text


@pytest.mark.parametrize("bad", [{"foo": 1}, {"function": "add"}, {"type": "function", "function": {}}])
def test_a_tool_choice_that_names_nothing_is_refused(bad: Any) -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    with pytest.raises(ConfigError, match="tool_choice"):
        ChatETS(engine=spied()[0]).bind_tools([tool], tool_choice=bad)
