"""Many questions at once, each its own run, and searches that stop when nobody waits for them any more."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any
from uuid import UUID, uuid4

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda

from ets_engine import ConfigError, HostedEngine
from ets_engine.errors import ModelLoadError
from ets_engine.hosted import ProposalRequest
from ets_engine.types import Step
from ets_integrations.langchain import ChatETS, ETSRunnable, settings

from .scripted import Script, Spy, scripted, spied

BOTH = pytest.mark.parametrize("kind", [ChatETS, ETSRunnable])
Kind = type[ChatETS] | type[ETSRunnable]


def most_in_flight(script: Script) -> int:
    """Opens the gate once nobody comes any more, and tells how many came."""
    until_s = time.monotonic() + 20
    while script.most_at_once < 32 and time.monotonic() < until_s:
        time.sleep(0.005)
    script.gate.set()
    return script.most_at_once


@pytest.mark.parametrize("in_chain", [False, True])
def test_a_batch_of_32_is_32_searches_in_flight(in_chain: bool) -> None:
    spy, script = spied()
    script.gate.clear()
    chat = ChatETS(engine=spy, width=1)
    chain = ChatPromptTemplate.from_template("{x}") | chat | StrOutputParser() if in_chain else chat
    found: list[int] = []
    opener = threading.Thread(target=lambda: found.append(most_in_flight(script)))
    opener.start()
    answers = chain.batch([{"x": str(i)} if in_chain else str(i) for i in range(32)])
    opener.join()
    assert found == [32]
    texts = [one if isinstance(one, str) else one.text for one in answers]
    assert [text.split("\n")[0] for text in texts] == [f"Hello, you said: {i}" for i in range(32)]


def test_a_batch_keeps_the_concurrency_that_was_asked_for() -> None:
    service, script = scripted(delay_s=0.01)
    ChatETS(engine=service, width=1).batch([str(i) for i in range(8)], config={"max_concurrency": 2})
    assert script.most_at_once <= 2


async def test_an_abatch_of_32_is_32_searches_in_flight() -> None:
    spy, script = spied()
    script.gate.clear()
    waiting = asyncio.create_task(ChatETS(engine=spy, width=1).abatch([str(i) for i in range(32)]))
    assert await asyncio.to_thread(most_in_flight, script) == 32
    assert len(await waiting) == 32


def test_one_question_that_fails_fails_alone() -> None:
    def fail_for_2(request: ProposalRequest) -> str:
        if request.messages[-1]["content"] == "2":
            raise ValueError("not this one")
        return "The answer is 1."

    found = ChatETS(engine=spied(fail_for_2)[0], width=3).batch(["1", "2", "3"], return_exceptions=True)
    assert [type(one).__name__ for one in found] == ["AIMessage", "EngineError", "AIMessage"]


def narrow(most: int) -> tuple[HostedEngine, Script]:
    """A service that takes few searches at a time."""
    service, script = scripted(delay_s=0.01)
    service.max_concurrent_searches = most
    return service, script


@BOTH
async def test_no_batch_asks_more_at_a_time_than_the_service_takes(kind: Kind) -> None:
    questions = [f"{i}?" for i in range(12)]
    for way in ("batch", "abatch", "batch_as_completed", "abatch_as_completed"):
        service, script = narrow(3)
        found: Any = getattr(kind(engine=service, width=1), way)(questions)
        match way:
            case "abatch":
                assert len(await found) == 12
            case "abatch_as_completed":
                assert sorted([place async for place, _ in found]) == list(range(12))
            case "batch_as_completed":
                assert sorted(place for place, _ in found) == list(range(12))
        assert script.most_at_once == 3, way


@BOTH
async def test_a_limit_of_the_run_around_a_batch_holds(kind: Kind) -> None:
    for way in ("batch", "abatch", "batch_as_completed"):
        service, script = narrow(64)

        async def ask(_: object, way: str = way, service: HostedEngine = service) -> int:
            found: Any = getattr(kind(engine=service, width=1), way)([f"{i}?" for i in range(8)])
            return len(await found if way == "abatch" else list(found))

        assert await RunnableLambda(ask).ainvoke(0, config={"max_concurrency": 2}) == 8
        assert script.most_at_once <= 2, way


@BOTH
def test_a_config_for_each_question_may_be_none(kind: Kind) -> None:
    service, _ = narrow(3)
    assert len(kind(engine=service, width=1).batch(["1", "2"], [None, None])) == 2  # type: ignore[list-item]


@BOTH
async def test_something_else_than_a_service_fails_each_question(kind: Kind) -> None:
    chat: Any = kind(engine=object())
    for found in (chat.batch(["1", "2"], return_exceptions=True), await chat.abatch(["1"] * 2, return_exceptions=True)):
        assert [type(one) for one in found] == [ConfigError] * 2


@BOTH
def test_batch_as_completed_asks_all_at_once(kind: Kind) -> None:
    spy, script = spied()
    script.gate.clear()
    found: list[int] = []
    opener = threading.Thread(target=lambda: found.append(most_in_flight(script)))
    opener.start()
    assert len(list(kind(engine=spy, width=1).batch_as_completed([f"{i}?" for i in range(32)]))) == 32
    opener.join()
    assert found == [32]


class Runs(BaseCallbackHandler):
    """Remembers the runs that it hears of."""

    def __init__(self) -> None:
        self.ids: list[UUID] = []

    def on_chat_model_start(self, *args: Any, run_id: UUID, **kwargs: Any) -> None:
        self.ids.append(run_id)


@pytest.mark.filterwarnings("ignore:Provided run_id")
def test_the_questions_of_a_batch_are_runs_of_their_own() -> None:
    runs = Runs()
    ChatETS(engine=spied()[0], width=1).batch(["1", "2", "3"], config={"run_id": uuid4(), "callbacks": [runs]})
    assert len(set(runs.ids)) == 3


@BOTH
async def test_a_model_that_cannot_be_loaded_fails_each_question(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: str, verifier: str | None = None) -> Spy:
        raise ModelLoadError("no such model")

    monkeypatch.setattr(settings, "find_service", refuse)
    chat: Any = kind(model="none/such")
    for found in (
        chat.batch(["1", "2"], return_exceptions=True),
        await chat.abatch(["1", "2"], return_exceptions=True),
    ):
        assert [type(one) for one in found] == [ModelLoadError] * 2


# ---------------------------------------------------------------------- cancellation


def endless(request: ProposalRequest) -> list[Step]:
    time.sleep(0.01)
    return [Step("on and on\n\n", 3) for _ in request.partials]


def endless_chat() -> tuple[ChatETS, Any]:
    spy = Spy(HostedEngine(endless, lambda problem, steps: 0.5, name="endless"))
    return ChatETS(engine=spy, width=2, search={"max_steps": 1000, "max_tokens": 100_000}), spy


async def test_a_timeout_stops_the_search() -> None:
    chat, spy = endless_chat()
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(chat.ainvoke("Hi"), timeout=0.1)
    assert await asyncio.to_thread(spy.reasons) == ["cancelled"]


def test_leaving_a_stream_stops_the_search() -> None:
    chat, spy = endless_chat()
    for _ in chat.stream("Hi"):
        break
    assert spy.reasons() == ["cancelled"]


async def test_leaving_an_async_stream_stops_the_search() -> None:
    chat, spy = endless_chat()
    stream = chat.astream("Hi")
    async for _ in stream:
        break
    await stream.aclose()
    assert await asyncio.to_thread(spy.reasons) == ["cancelled"]


def test_a_deadline_is_no_error() -> None:
    chat, _ = endless_chat()
    message = chat.bind(timeout=1.0).invoke("Hi")
    assert message.response_metadata["finish_reason"] == "deadline" and message.text.startswith("on and on")


def test_a_closed_loop_harms_nobody() -> None:
    chat, spy = endless_chat()

    async def leave() -> None:
        task = asyncio.create_task(chat.ainvoke("Hi"))
        await asyncio.sleep(0.05)
        task.cancel()

    asyncio.run(leave())
    assert spy.reasons() == ["cancelled"]
    assert ChatETS(engine=spied()[0], width=3).invoke("Hi").text
