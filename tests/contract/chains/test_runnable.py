"""`ETSRunnable`, the tool, and progress events through every path on which LangChain listens."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.messages import HumanMessage
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate
from langchain_core.runnables import ConfigurableField, RunnableLambda

from ets_engine import ConfigError, EngineError, HostedEngine, QueueFullError
from ets_engine.errors import ModelLoadError
from ets_engine.hosted import ProposalRequest
from ets_engine.types import SearchEvent, SearchResult
from ets_integrations.langchain import ChatETS, ETSRunnable, ets_tool
from ets_integrations.langchain.events import Progress

from .scripted import Spy, scripted, spied
from .test_batches import endless, most_in_flight

QUESTION = "What is it?"


def solver(reply: Any = None, **fields: Any) -> ETSRunnable:
    return ETSRunnable(engine=spied(reply)[0], **{"width": 3, **fields})


@pytest.mark.parametrize(
    "question",
    [
        QUESTION,
        {"question": QUESTION},
        {"problem": QUESTION},
        {"messages": [HumanMessage(QUESTION)]},
        [HumanMessage(QUESTION)],
        [("human", QUESTION)],
        [{"role": "user", "content": QUESTION}],
        HumanMessage(QUESTION),
        PromptTemplate.from_template("{x}").invoke({"x": QUESTION}),
        ChatPromptTemplate.from_template("{x}").invoke({"x": QUESTION}),
    ],
)
def test_whatever_a_chain_hands_over_is_a_question(question: Any) -> None:
    result = solver().invoke(question)
    assert (result.problem, result.answer) == (QUESTION, "42")


@pytest.mark.parametrize("question", [3, {"topic": "x"}, [], None])
def test_what_holds_no_question_is_refused(question: Any) -> None:
    with pytest.raises(ConfigError):
        solver().invoke(question)


def test_settings_per_call_per_binding_and_configurable() -> None:
    spy, _ = spied()
    solve = ETSRunnable(engine=spy, width=8)
    solve.invoke(QUESTION, width=2)
    solve.bind(width=3).invoke(QUESTION)
    solve.configurable_fields(width=ConfigurableField(id="w")).invoke(QUESTION, config={"configurable": {"w": 4}})
    assert [config.width for _, config, _ in spy.submitted] == [2, 3, 4]


def test_a_batch_is_submitted_whole_before_anything_is_waited_for() -> None:
    spy, script = spied()
    script.gate.clear()
    found: list[int] = []
    opener = threading.Thread(target=lambda: found.append(most_in_flight(script)))
    opener.start()
    results = ETSRunnable(engine=spy, width=1).batch([f"{i}?" for i in range(32)])
    opener.join()
    assert found == [32] and [result.problem for result in results] == [f"{i}?" for i in range(32)]


def test_what_fails_in_a_batch_stands_in_its_place() -> None:
    def fail_for_2(request: ProposalRequest) -> str:
        if request.messages[-1]["content"] == "2":
            raise ValueError("not this one")
        return "The answer is 1."

    solve = solver(fail_for_2)
    found = solve.batch(["1", "2", {"topic": 3}], return_exceptions=True)
    assert [type(one) for one in found] == [SearchResult, EngineError, ConfigError]
    with pytest.raises(EngineError, match="not this one"):
        solve.batch(["1", "2", "3"])


async def test_async_and_abatch() -> None:
    solve = solver()
    assert (await solve.ainvoke(QUESTION)).answer == "42"
    assert [one.answer for one in await solve.abatch([QUESTION] * 5)] == ["42"] * 5


def test_a_stream_is_the_events_and_then_the_result() -> None:
    *events, result = solver().stream(QUESTION)
    assert [event.kind for event in events if isinstance(event, SearchEvent)] == ["start", "step", "step", "end"]
    assert isinstance(result, SearchResult) and result.answer == "42"


async def test_an_async_stream_too() -> None:
    *events, result = [one async for one in solver().astream(QUESTION)]
    assert {event.kind for event in events} == {"start", "step", "end"} and result.answer == "42"


async def test_leaving_a_stream_or_a_timeout_stops_the_search() -> None:
    spy = Spy(HostedEngine(endless, lambda problem, steps: 0.5, name="endless"))
    solve = ETSRunnable(engine=spy, width=2, search={"max_steps": 1000, "max_tokens": 100_000})
    for _ in solve.stream(QUESTION):
        break
    stream = solve.astream(QUESTION)
    async for _ in stream:
        break
    await stream.aclose()
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(solve.ainvoke(QUESTION), timeout=0.1)
    assert await asyncio.to_thread(spy.reasons) == ["cancelled"] * 3


def test_retries_and_fallbacks() -> None:
    calls: list[int] = []

    def full_at_first(request: ProposalRequest) -> str:
        calls.append(1)
        if len(calls) == 1:
            raise QueueFullError("try later")
        return "The answer is 1."

    solve = solver(full_at_first, width=1)
    assert (
        solve.with_retry(retry_if_exception_type=(EngineError,), wait_exponential_jitter=False).invoke("?").answer
        == "1"
    )

    def never(request: ProposalRequest) -> str:
        raise ConnectionError("down")

    fallen = solver(never).with_fallbacks([RunnableLambda(lambda question: f"plain {question}")])
    assert fallen.invoke("x") == "plain x"


def test_a_tool_for_agents() -> None:
    tool = ets_tool(solver())
    assert tool.name == "solve_hard_problem" and list(tool.args) == ["question"]
    assert tool.invoke({"question": QUESTION}).startswith("Answer: 42\nReasoning:\nHello")
    nothing = ets_tool(solver(lambda request: "nothing at all"))
    assert nothing.invoke({"question": QUESTION}).startswith("No answer was found (no_answer)")


async def test_a_failed_search_is_an_error_message_to_the_agent() -> None:
    def fail(request: ProposalRequest) -> str:
        raise ConnectionError("the server is gone")

    call: Any = {"name": "solve_hard_problem", "args": {"question": QUESTION}, "id": "1", "type": "tool_call"}
    tool = ets_tool(solver(fail))
    for message in (tool.invoke(call), await tool.ainvoke(call)):
        assert message.status == "error" and "the server is gone" in message.content
    with pytest.raises(ModelLoadError):
        ets_tool(ETSRunnable(model="./none/such")).invoke(call)


async def test_a_tool_for_async_agents() -> None:
    assert (await ets_tool(solver()).ainvoke({"question": QUESTION})).startswith("Answer: 42")


@pytest.mark.filterwarnings("ignore:This API is in beta")  # LangChain's `as_tool`
def test_as_tool_and_in_a_chain() -> None:
    tool = solver().as_tool(name="solve", description="solves", arg_types={"question": str})
    assert tool.invoke({"question": QUESTION}).answer == "42"
    assert (PromptTemplate.from_template("{x}") | solver() | (lambda result: result.answer)).invoke("y") == "42"


# ---------------------------------------------------------------------- progress


class Ears(BaseCallbackHandler):
    def __init__(self) -> None:
        self.heard: list[tuple[str, Any]] = []

    def on_custom_event(self, name: str, data: Any, **kwargs: Any) -> None:
        self.heard.append((name, data))

    @property
    def names(self) -> set[str]:
        return {name for name, _ in self.heard}


class AsyncEars(AsyncCallbackHandler, Ears):
    async def on_custom_event(self, name: str, data: Any, **kwargs: Any) -> None:  # type: ignore[override]
        self.heard.append((name, data))


ALL = {"ets.start", "ets.step", "ets.leaf", "ets.end"}


@pytest.mark.parametrize("what", [ChatETS, ETSRunnable])
def test_callbacks_hear_the_progress_of_invoke(what: Any) -> None:
    ears = Ears()
    what(engine=scripted(delay_s=0.12)[0], width=2).invoke(QUESTION, config={"callbacks": [ears]})
    assert ears.names == ALL
    end = dict(ears.heard)["ets.end"]
    assert end["finished"] == 2 and end["generated_tokens"] > 0 and "kv_unique_tokens" in end


@pytest.mark.parametrize("what", [ChatETS, ETSRunnable])
async def test_callbacks_hear_the_progress_of_ainvoke(what: Any) -> None:
    ears = AsyncEars()
    await what(engine=scripted(delay_s=0.12)[0], width=2).ainvoke(QUESTION, config={"callbacks": [ears]})
    assert ears.names == ALL


def test_callbacks_hear_the_progress_of_each_question_of_a_batch() -> None:
    ears = [Ears(), Ears()]
    solve = ETSRunnable(engine=scripted(delay_s=0.12)[0], width=2)
    solve.batch(
        ["1?", "2?", {"topic": 3}], config=[{"callbacks": [one]} for one in (*ears, Ears())], return_exceptions=True
    )
    for one in ears:
        assert one.names == ALL
        assert [name for name, _ in one.heard if name in ("ets.start", "ets.end")] == ["ets.start", "ets.end"]


def test_a_callback_that_raises_ends_its_own_question_of_a_batch() -> None:
    class Loud(Ears):
        raise_error = True

        def on_custom_event(self, name: str, data: Any, **kwargs: Any) -> None:
            raise ValueError("too loud")

    solve = ETSRunnable(engine=scripted(delay_s=0.05)[0], width=2)
    found = solve.batch(["1?", "2?"], config=[{"callbacks": [Loud()]}, {"callbacks": []}], return_exceptions=True)
    assert isinstance(found[0], ValueError) and isinstance(found[1], SearchResult)


@pytest.mark.parametrize("most", [-1, 0, 1])
def test_a_batch_ends_whatever_concurrency_it_is_allowed(most: int) -> None:
    found = solver().batch([QUESTION] * 3, config={"max_concurrency": most})
    assert [one.answer for one in found] == ["42"] * 3


def test_callbacks_hear_the_progress_of_a_stream_of_events() -> None:
    ears = Ears()
    list(ETSRunnable(engine=scripted(delay_s=0.12)[0], width=2).stream(QUESTION, config={"callbacks": [ears]}))
    assert ears.names == ALL


async def test_callbacks_hear_the_progress_of_an_astream_of_events() -> None:
    ears = AsyncEars()
    solve = ETSRunnable(engine=scripted(delay_s=0.12)[0], width=2)
    assert [item async for item in solve.astream(QUESTION, config={"callbacks": [ears]})]
    assert ears.names == ALL


@pytest.mark.parametrize("streams", [False, True])
async def test_astream_events_shows_progress_in_a_chain(streams: bool) -> None:
    chat = ChatETS(engine=scripted(delay_s=0.12)[0], width=2, disable_streaming=not streams)
    chain = PromptTemplate.from_template("{x}") | chat
    names = {
        event["name"]
        async for event in chain.astream_events({"x": QUESTION}, version="v2")
        if event["event"] == "on_custom_event"
    }
    assert names == ALL


async def test_astream_events_shows_progress_of_a_bare_model_that_does_not_stream() -> None:
    chat = ChatETS(engine=scripted(delay_s=0.12)[0], width=2, disable_streaming=True)
    names = {e["name"] async for e in chat.astream_events(QUESTION, version="v2") if e["event"] == "on_custom_event"}
    assert names == ALL


def test_a_bare_stream_has_nobody_to_tell_and_no_error() -> None:
    assert "".join(chunk.text for chunk in ChatETS(engine=scripted()[0], width=2).stream(QUESTION)).endswith("42.")


def test_steps_that_come_fast_are_left_out() -> None:
    progress = Progress()
    event = SearchEvent(
        kind="step", depth=1, frontier=1, kept=1, pruned=0, finished=0, best_score=0.5, kv_unique_tokens=1,
        kv_path_tokens=1, generated_tokens=1,
    )  # fmt: skip
    told = [name for _ in range(50) for name, _ in progress.pick(event)]
    assert 1 <= len(told) < 5
    assert [name for name, _ in progress.pick(event.model_copy(update={"kind": "end", "finished": 1}))] == [
        "ets.leaf",
        "ets.end",
    ]
