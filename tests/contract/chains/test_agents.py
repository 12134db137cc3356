"""Agents and graphs: `create_agent` on `ChatETS`, the middleware, checkpoints, streamed progress."""

from __future__ import annotations

import json
from typing import Any, ClassVar

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import ModelFallbackMiddleware, wrap_model_call
from langchain.agents.structured_output import ToolStrategy
from langchain_core.language_models import FakeMessagesListChatModel
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langgraph.checkpoint.memory import InMemorySaver
from pydantic import BaseModel

from ets_engine import ConfigError, HostedEngine, SearchConfig
from ets_engine.hosted import ProposalRequest
from ets_engine.types import Step, StopReason
from ets_integrations.agents import (
    ETSMiddleware,
    VerifierMiddleware,
    always,
    budget_left,
    first_turn,
    no_pending_tools,
)
from ets_integrations.langchain import ChatETS

from .graphs import graph
from .scripted import Script, scripted, spied


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


class Plain(FakeMessagesListChatModel):
    """A model that says what it was told to, in turn, and takes any tools."""

    asked: ClassVar[list[Any]] = []

    def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
        return self

    def _generate(self, messages: Any, *args: Any, **kwargs: Any) -> Any:
        self.asked.append(messages)
        return super()._generate(messages, *args, **kwargs)


def calls_then_says(request: ProposalRequest) -> str:
    if request.messages[-1]["role"] == "tool":
        return f"Let me see.\n\nThe answer is {request.messages[-1]['content']}."
    call = {"name": "add", "arguments": {"a": 1, "b": 2}}
    return f"I add.\n\n<tool_call>{json.dumps(call)}</tool_call>"


def chat(reply: Any = calls_then_says, **fields: Any) -> ChatETS:
    return ChatETS(engine=spied(reply)[0], **{"width": 3, **fields})


def test_an_agent_runs_its_tool_loop_on_searched_turns() -> None:
    agent = create_agent(chat(), tools=[add])
    state = agent.invoke({"messages": [HumanMessage("1+2?")]})
    kinds = [type(message).__name__ for message in state["messages"]]
    assert kinds == ["HumanMessage", "AIMessage", "ToolMessage", "AIMessage"]
    assert state["messages"][-1].text.endswith("The answer is 3.")


class Answer(BaseModel):
    """The answer."""

    value: int


@pytest.mark.parametrize("response_format", [Answer, ToolStrategy(Answer)])
def test_an_agent_s_structured_response_is_there(response_format: Any) -> None:
    def reply(request: ProposalRequest) -> str:
        return '<tool_call>{"name": "Answer", "arguments": {"value": 3}}</tool_call>'

    agent = create_agent(chat(reply), tools=[add], response_format=response_format)
    assert agent.invoke({"messages": [HumanMessage("1+2?")]})["structured_response"] == Answer(value=3)


def test_checkpoints_hold_plain_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANGGRAPH_STRICT_MSGPACK", "true")
    saver = InMemorySaver()
    agent = create_agent(chat(), tools=[add], checkpointer=saver)
    thread = {"configurable": {"thread_id": "1"}}
    agent.invoke({"messages": [HumanMessage("1+2?")]}, thread)
    again = create_agent(chat(), tools=[add], checkpointer=saver).get_state(thread).values["messages"]
    assert again[-1].response_metadata["ets"]["answer"] == "3"
    assert again[-1].usage_metadata["output_tokens"] > 0


# ---------------------------------------------------------------------- middleware


def plain_turns() -> list[AIMessage]:
    call = {"name": "add", "args": {"a": 1, "b": 2}, "id": "c1"}
    return [AIMessage("", tool_calls=[call]), AIMessage("plainly 3")]


def test_only_the_call_that_answers_is_searched() -> None:
    plain, (spy, _) = Plain(responses=plain_turns()), spied(calls_then_says)
    searched = ETSMiddleware(ChatETS(engine=spy), when=no_pending_tools, width=2)
    state = create_agent(plain, tools=[add], middleware=[searched]).invoke({"messages": [HumanMessage("1+2?")]})
    assert [message.text for message in state["messages"]][1:] == ["", "3", "Let me see.\n\nThe answer is 3."]
    ((_, config, options),) = spy.submitted
    assert config.width == 2 and [tool["function"]["name"] for tool in options["tools"]] == ["add"]


async def test_the_same_in_an_event_loop_and_streamed() -> None:
    plain, (spy, _) = Plain(responses=plain_turns()), spied(calls_then_says)
    agent = create_agent(plain, tools=[add], middleware=[ETSMiddleware(ChatETS(engine=spy, width=2), no_pending_tools)])
    texts = [
        chunk.text
        async for chunk, _ in agent.astream({"messages": [HumanMessage("1+2?")]}, stream_mode="messages")
        if isinstance(chunk, AIMessage) and chunk.text
    ]
    assert "".join(texts).endswith("The answer is 3.") and len(spy.submitted) == 1


def test_a_searched_call_without_tools() -> None:
    spy, _ = spied(lambda request: "The answer is 3.")
    middleware = ETSMiddleware(ChatETS(engine=spy, width=2), tools=False)
    state = create_agent(Plain(responses=plain_turns()), tools=[add], middleware=[middleware]).invoke(
        {"messages": [HumanMessage("1+2?")]}
    )
    assert state["messages"][-1].text == "The answer is 3."
    assert "tools" not in spy.submitted[0][2]


def test_a_bad_setting_is_refused_when_the_middleware_is_made() -> None:
    with pytest.raises(ConfigError, match="width"):
        ETSMiddleware(chat(), width=0)
    with pytest.raises(ConfigError, match="no setting rounds; choose from"):
        ETSMiddleware(chat(), rounds=3)
    with pytest.raises(ConfigError, match="samples=0"):
        VerifierMiddleware(lambda problem, steps: 1.0, samples=0)


class Request:
    def __init__(self, *messages: Any, tools: Any = (add,)) -> None:
        self.messages, self.tools = list(messages), list(tools)


def test_when_a_call_is_searched() -> None:
    user, asks, says = HumanMessage("1+2?"), plain_turns()[0], AIMessage("3", response_metadata={"ets": {}})
    told = ToolMessage("3", tool_call_id="c1")
    turns = [Request(user), Request(user, asks), Request(user, asks, told), Request(user, says, user)]
    assert [always(turn) for turn in turns] == [True] * 4
    assert [first_turn(turn) for turn in turns] == [True, False, False, True]
    assert [no_pending_tools(turn) for turn in turns] == [False, False, True, False]
    assert no_pending_tools(Request(user, tools=()))
    assert [budget_left(1)(Request(user, *turn)) for turn in ([], [asks], [says], [asks, told, says])] == [
        True,
        True,
        False,
        False,
    ]


def test_the_verifier_picks_among_the_model_s_own_turns() -> None:
    plain = Plain(responses=[AIMessage("bad"), AIMessage("good"), AIMessage("bad")])
    plain.asked.clear()

    def judge(problem: str, steps: Any) -> float:
        assert problem == "1+2?"
        return 1.0 if steps == ("good",) else 0.1

    agent = create_agent(plain, middleware=[VerifierMiddleware(judge, samples=3)])
    assert agent.invoke({"messages": [HumanMessage("1+2?")]})["messages"][-1].text == "good"
    assert len(plain.asked) == 3


async def test_the_verifier_picks_in_an_event_loop() -> None:
    plain = Plain(responses=[AIMessage("bad"), AIMessage("good")])
    agent = create_agent(plain, middleware=[VerifierMiddleware(lambda problem, steps: float("good" in steps[0]), 2)])
    assert (await agent.ainvoke({"messages": [HumanMessage("1+2?")]}))["messages"][-1].text == "good"


def test_samples_that_fail_do_not_count_unless_all_do() -> None:
    class Shaky(Plain):
        fails: int = 1

        def _generate(self, messages: Any, *args: Any, **kwargs: Any) -> Any:
            self.fails -= 1
            if self.fails >= 0:
                raise ConnectionError("down")
            return super()._generate(messages, *args, **kwargs)

    def run(fails: int) -> str:
        shaky = Shaky(responses=[AIMessage("fine")], fails=fails)
        agent = create_agent(shaky, middleware=[VerifierMiddleware(lambda problem, steps: 0.5, samples=2)])
        return agent.invoke({"messages": [HumanMessage("?")]})["messages"][-1].text

    assert run(fails=1) == "fine"
    with pytest.raises(ConnectionError, match="down"):
        run(fails=2)


# ---------------------------------------------------------------------- graphs


def slow() -> ChatETS:
    service, _ = scripted(delay_s=0.12)
    return ChatETS(engine=service, width=2)


MODES = ["custom", "messages"]
QUESTION = {"messages": [HumanMessage("What is it?")]}


def test_a_graph_streams_progress_and_text() -> None:
    found = list(graph(slow()).stream(QUESTION, stream_mode=MODES))
    assert {data["type"] for mode, data in found if mode == "custom"} == {
        "ets.start",
        "ets.step",
        "ets.leaf",
        "ets.end",
    }
    assert "".join(data[0].text for mode, data in found if mode == "messages").endswith("The answer is 42.")


async def test_a_graph_streams_to_an_event_loop() -> None:
    found = [one async for one in graph(slow()).astream(QUESTION, stream_mode=MODES)]
    assert {data["type"] for mode, data in found if mode == "custom"} == {
        "ets.start",
        "ets.step",
        "ets.leaf",
        "ets.end",
    }
    assert "".join(data[0].text for mode, data in found if mode == "messages").endswith("The answer is 42.")


def test_agents_on_failed_searches_fall_back_to_the_model() -> None:
    def down(request: ProposalRequest) -> list[Step]:
        return [Step("", 0, StopReason.ERROR, "down") for _ in request.partials]

    broken = ChatETS(engine=HostedEngine(down, lambda problem, steps: 0.5, name="down"), width=2)
    agent = create_agent(broken.with_fallbacks([Plain(responses=[AIMessage("plain")])]))
    assert agent.invoke({"messages": [HumanMessage("?")]})["messages"][-1].text == "plain"


def test_scripts_are_what_they_say() -> None:
    assert Script(lambda request: "a\n\nb")(ProposalRequest([], ["", "a\n\n"], None)) == [  # type: ignore[arg-type]
        Step("a\n\n", 1),
        Step("b", 1, StopReason.FINISHED),
    ]


class Strict(FakeMessagesListChatModel):
    """A model that refuses settings that it does not know, as providers do."""

    def _generate(self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any) -> Any:
        if unknown := kwargs.keys() - {"temperature"}:
            raise TypeError(f"unexpected keyword arguments {sorted(unknown)}")
        return super()._generate(messages, stop, run_manager)


def test_a_fallback_is_not_given_the_settings_of_a_search_that_failed() -> None:
    def fail(request: ProposalRequest) -> str:
        raise ConnectionError("the server is gone")

    middleware = [ETSMiddleware(chat(fail), width=4), ModelFallbackMiddleware(Strict(responses=[AIMessage("spare")]))]
    agent = create_agent(Plain(responses=[AIMessage("own")]), middleware=middleware)
    assert agent.invoke({"messages": [HumanMessage("?")]})["messages"][-1].text == "spare"


def test_settings_of_the_agent_s_own_model_are_none_of_the_search_s() -> None:
    theirs = {"temperature": 0.0, "max_tokens": 5, "stop": ["is"], "width": 9, "lambda_b": 3.0}
    theirs |= {"stop_sequences": ["is"], "model_name": "own"}

    @wrap_model_call
    def careful(request: Any, handler: Any) -> Any:
        return handler(request.override(model_settings=theirs))

    spy, _ = spied(lambda request: "The answer is 3.")
    searched = ETSMiddleware(ChatETS(engine=spy), width=2, temperature=0.9)
    agent = create_agent(Plain(responses=[AIMessage("own")]), middleware=[careful, searched])
    assert agent.invoke({"messages": [HumanMessage("?")]})["messages"][-1].text == "The answer is 3."
    ((_, config, _),) = spy.submitted
    assert (config.width, config.temperature, config.lambda_b) == (2, 0.9, 3.0)
    assert config.max_tokens == SearchConfig().max_tokens


def test_two_verifying_middleware_live_in_one_agent_under_names() -> None:
    verify = [VerifierMiddleware(lambda problem, steps: 0.5, samples=1, name=name) for name in (None, "strict")]
    assert [one.name for one in verify] == ["VerifierMiddleware", "strict"]
    agent = create_agent(Plain(responses=[AIMessage("own")]), middleware=verify)
    assert agent.invoke({"messages": [HumanMessage("?")]})["messages"][-1].text == "own"
