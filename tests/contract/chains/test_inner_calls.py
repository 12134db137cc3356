"""Calls of a model that are only part of a turn, its drafts and their marks: no reader of the answer is shown them."""

from __future__ import annotations

from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.language_models import FakeListChatModel, FakeMessagesListChatModel
from langchain_core.messages import AIMessage, HumanMessage

from ets_engine import HostedEngine
from ets_integrations.agents import ETSMiddleware, VerifierMiddleware, always, first_turn
from ets_integrations.langchain import ChatETS, LangChainPolicy, judge

from .graphs import graph
from .scripted import scripted

QUESTION: Any = {"messages": [HumanMessage("2+2?")]}


def marker(*marks: str) -> Any:
    return judge(FakeListChatModel(responses=list(marks or ("7", "8"))))


def over_a_judge() -> Any:
    return graph(ChatETS(engine=scripted(lambda request: "I add.\n\nThe answer is 4.")[0], verifier=marker(), width=2))


def over_a_hosted_model() -> Any:
    policy = LangChainPolicy(FakeListChatModel(responses=["The answer is 4."]))
    return graph(ChatETS(engine=HostedEngine(policy, marker(), name="hosted"), width=2))


def over_drafts(draft: Any = None) -> Any:
    drafts: list[Any] = [AIMessage("Draft A. The answer is 4."), AIMessage("Draft B. The answer is 4.")]
    model = draft or FakeMessagesListChatModel(responses=drafts)
    return create_agent(model, middleware=[VerifierMiddleware(marker(), samples=2)])


def over_drafts_of_a_tagged_model() -> Any:
    return over_drafts(FakeListChatModel(responses=["The answer is 4."]).with_config(tags=["mine"]))


def over_drafts_with_a_fallback() -> Any:
    model = FakeListChatModel(responses=["The answer is 4."])
    return over_drafts(model.with_fallbacks([model]))


GRAPHS = [
    over_a_judge,
    over_a_hosted_model,
    over_drafts,
    over_drafts_of_a_tagged_model,
    over_drafts_with_a_fallback,
]


def whole(shown: list[Any]) -> tuple[str, str]:
    """What was shown of the run, and the message that it left."""
    text = "".join(data[0].text for mode, data in shown if mode == "messages")
    states = [data for mode, data in shown if mode == "values"]
    return text, states[-1]["messages"][-1].text


@pytest.mark.parametrize("make", GRAPHS)
def test_a_stream_of_messages_shows_the_answer_alone(make: Any) -> None:
    text, left = whole(list(make().stream(QUESTION, stream_mode=["messages", "values"])))
    assert text == left and left.endswith("The answer is 4.")


@pytest.mark.parametrize("make", GRAPHS)
async def test_and_so_in_an_event_loop(make: Any) -> None:
    text, left = whole([one async for one in make().astream(QUESTION, stream_mode=["messages", "values"])])
    assert text == left and left.endswith("The answer is 4.")


def test_a_call_that_is_not_sampled_is_streamed_as_it_comes() -> None:
    never = VerifierMiddleware(marker(), samples=2, when=lambda request: False)
    agent: Any = create_agent(FakeListChatModel(responses=["4!"]), middleware=[never])
    assert [chunk.text for chunk, _ in agent.stream(QUESTION, stream_mode="messages") if chunk.text] == ["4", "!"]


def test_drafts_of_a_question_with_an_image_are_judged_by_its_text() -> None:
    def verify(problem: str, steps: Any) -> float:
        assert problem == "What is it?"
        return float(steps == ("a cat",))

    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    asked = HumanMessage([{"type": "text", "text": "What is it?"}, image])
    model = FakeMessagesListChatModel(responses=[AIMessage("a dog"), AIMessage("a cat")])
    agent = create_agent(model, middleware=[VerifierMiddleware(verify, samples=2)])
    assert agent.invoke({"messages": [asked]})["messages"][-1].text == "a cat"


def test_two_searching_middleware_live_in_one_agent_under_names() -> None:
    def solver(answer: str) -> ChatETS:
        return ChatETS(engine=scripted(lambda request: f"The answer is {answer}.")[0], width=2)

    wide = ETSMiddleware(solver("wide"), when=lambda request: False, name="wide search")
    plan = ETSMiddleware(solver("plan"), when=first_turn, width=4)
    assert [ETSMiddleware(solver("any"), always).name, plan.name, wide.name] == ["ETSMiddleware"] * 2 + ["wide search"]
    agent = create_agent(FakeListChatModel(responses=["plain"]), middleware=[plan, wide])
    assert agent.invoke(QUESTION)["messages"][-1].text == "The answer is plan."
