"""Model calls that are a part of a turn: hidden from its readers, seen in traces, made at once, logged on failure."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.callbacks import AsyncCallbackHandler, UsageMetadataCallbackHandler
from langchain_core.language_models import FakeListChatModel, FakeMessagesListChatModel, SimpleChatModel
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.runnables import ConfigurableField, RunnableLambda
from langchain_core.tracers import BaseTracer

from ets_engine import EngineError, HostedEngine
from ets_integrations.agents import ETSMiddleware, VerifierMiddleware, always, first_turn
from ets_integrations.langchain import ChatETS, ETSRunnable, LangChainPolicy, RunnableVerifier, judge

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


# ---------------------------------------------------------------------- where the calls are seen, and how many at once


class Recorder(BaseTracer):
    """Keeps the whole runs."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: list[Any] = []

    def _persist_run(self, run: Any) -> None:
        self.runs.append(run)


def hosted_chat() -> ChatETS:
    usage: Any = {"input_tokens": 5, "output_tokens": 6, "total_tokens": 11}
    said = AIMessage("The answer is 4.", usage_metadata=usage, response_metadata={"model_name": "paid"})
    policy = LangChainPolicy(FakeMessagesListChatModel(responses=[said]))
    return ChatETS(engine=HostedEngine(policy, marker(), name="hosted"), width=2)


def kinds_below(run: Any) -> set[str]:
    return {child.name for child in run.child_runs}


async def ask(chain: Any, way: str, config: Any) -> None:
    if way == "invoke":
        chain.invoke("2+2?", config=config)
    elif way == "batch":
        chain.batch(["2+2?", "3+3?"], config=config)
    elif way == "stream":
        assert list(chain.stream("2+2?", config=config))
    else:
        await chain.ainvoke("2+2?", config=config)


@pytest.mark.parametrize("way", ["invoke", "ainvoke", "batch"])  # to a model's stream LangChain hands no run on
@pytest.mark.parametrize("bare", [True, False])
async def test_the_calls_of_a_search_are_below_it_in_traces_and_counted(way: str, bare: bool) -> None:
    recorder, usage = Recorder(), UsageMetadataCallbackHandler()
    chat = hosted_chat()
    await ask(chat if bare else RunnableLambda(lambda x: x) | chat, way, {"callbacks": [recorder, usage]})
    tops = [run if bare else run.child_runs[-1] for run in recorder.runs]
    assert len(tops) == (2 if way == "batch" else 1)
    for top in tops:
        assert top.name == "ChatETS"
        assert kinds_below(top) == {"FakeMessagesListChatModel", "RunnableSequence"}
    assert usage.usage_metadata["paid"]["output_tokens"] == 12 * len(tops)


@pytest.mark.parametrize("way", ["invoke", "ainvoke", "batch", "stream"])
async def test_so_are_those_of_a_runnable(way: str) -> None:
    recorder = Recorder()
    await ask(ETSRunnable(engine=hosted_chat().engine, width=2), way, {"callbacks": [recorder]})
    assert [kinds_below(run) for run in recorder.runs] == [{"FakeMessagesListChatModel", "RunnableSequence"}] * len(
        recorder.runs
    )


class Slow(SimpleChatModel):
    """Says one thing, and counts how many of its calls run at a time; waits for `want` of them."""

    says: str
    want: int
    running: int = 0
    most: int = 0

    @property
    def _llm_type(self) -> str:
        return "slow"

    def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
        return self

    def _call(self, *args: Any, **kwargs: Any) -> str:
        self.running += 1
        self.most = max(self.most, self.running)
        until_s = time.monotonic() + 2.0
        while self.most < self.want and time.monotonic() < until_s:
            time.sleep(0.005)
        time.sleep(0.02)
        self.running -= 1
        return self.says


def test_all_branches_and_all_marks_of_a_depth_are_asked_for_at_once() -> None:
    policy, marks = Slow(says="The answer is 4.", want=40), Slow(says="7", want=40)
    engine = HostedEngine(LangChainPolicy(policy), judge(marks), name="slow")
    ChatETS(engine=engine, width=40).invoke("2+2?")
    assert (policy.most, marks.most) == (40, 40)


def limited(model: Any) -> Any:
    return model.with_config(max_concurrency=2)


@pytest.mark.parametrize(
    "how",
    [
        limited,
        lambda model: limited(model) | StrOutputParser(),
        lambda model: limited(model).with_fallbacks([model]),
        lambda model: (RunnableLambda(lambda x: x) | limited(model)).with_config(tags=["mine"]),
        lambda model: limited(model.configurable_fields(says=ConfigurableField(id="says"))),
        lambda model: limited(model.configurable_alternatives(ConfigurableField(id="which"), other=model)),
        lambda model: limited(model.configurable_fields(says=ConfigurableField(id="says"))).with_retry(),
    ],
)
def test_fewer_are_where_any_part_of_the_model_is_limited(how: Any) -> None:
    policy, marks = Slow(says="The answer is 4.", want=2), Slow(says="7", want=2)
    judging = RunnableVerifier(RunnableLambda(lambda given: given["text"]) | how(marks), scale=10.0)
    ChatETS(engine=HostedEngine(LangChainPolicy(limited(policy)), judging, name="slow"), width=8).invoke("2+2?")
    assert (policy.most, marks.most) == (2, 2)


def test_fewer_are_where_the_run_is_limited_or_the_model_has_tools() -> None:
    policy, marks = Slow(says="The answer is 4.", want=2), Slow(says="7", want=2)
    chat = ChatETS(engine=HostedEngine(LangChainPolicy(policy), judge(marks), name="slow"), width=8)
    (RunnableLambda(lambda x: x) | chat).invoke("2+2?", config={"max_concurrency": 2})
    assert (policy.most, marks.most) == (2, 2)
    policy.most = 0
    chat = ChatETS(engine=HostedEngine(LangChainPolicy(limited(policy)), judge(marks), name="slow"), width=8)
    chat.bind_tools([{"type": "function", "function": {"name": "add", "parameters": {}}}]).invoke("2+2?")
    assert policy.most == 2


@pytest.mark.parametrize("way", ["invoke", "batch"])
async def test_a_limit_of_the_call_holds_for_a_runnable_s_inner_calls(way: str) -> None:
    policy, marks = Slow(says="The answer is 4.", want=2), Slow(says="7", want=2)
    engine = HostedEngine(LangChainPolicy(policy), judge(marks), name="slow", max_concurrent_searches=1)
    chain: Any = ETSRunnable(engine=engine, width=8)
    config: Any = {"max_concurrency": 2}
    assert chain.invoke("2+2?", config) if way == "invoke" else chain.batch(["2+2?"], config)
    assert (policy.most, marks.most) == (2, 2)


class Locked(AsyncCallbackHandler):
    """Holds something that belongs to its event loop."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.loops: set[Any] = set()
        self.heard = 0

    async def on_chat_model_start(self, *args: Any, **kwargs: Any) -> None:
        async with self.lock:
            await asyncio.sleep(0.001)
        self.loops.add(asyncio.get_running_loop())
        self.heard += 1

    async def on_llm_end(self, *args: Any, **kwargs: Any) -> None:
        await self.on_chat_model_start()


@pytest.mark.parametrize("kind", [ChatETS, ETSRunnable])
async def test_async_handlers_hear_of_inner_calls_in_their_own_loop(kind: Any) -> None:
    locked = Locked()
    search: Any = kind(engine=hosted_chat().engine, width=4)
    await asyncio.wait_for(search.ainvoke("2+2?", config={"callbacks": [locked]}), 20)
    assert locked.loops == {asyncio.get_running_loop()}
    assert locked.heard == 2 * (4 + 4 + (kind is ChatETS))


@pytest.mark.parametrize("way", ["batch", "abatch", "batch_as_completed"])
@pytest.mark.parametrize("kind", [ChatETS, ETSRunnable])
async def test_how_many_searches_go_at_a_time_does_not_limit_the_calls_of_one(kind: Any, way: str) -> None:
    policy = Slow(says="The answer is 4.", want=8)
    engine = HostedEngine(LangChainPolicy(policy), lambda problem, steps: 0.5, name="slow", max_concurrent_searches=1)
    found = getattr(RunnableLambda(lambda x: x) | kind(engine=engine, width=8), way)(["2+2?", "3+3?"])
    assert len(await found if way == "abatch" else list(found)) == 2
    assert policy.most == 8


class Forced(FakeMessagesListChatModel):
    """Remembers how its tools were bound."""

    def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
        bound.append(([tool["function"]["name"] for tool in tools], kwargs))
        return self


bound: list[Any] = []


@pytest.mark.parametrize(
    ("choice", "told"), [(None, {}), ("any", {"tool_choice": "any"}), ("add", {"tool_choice": "add"})]
)
def test_a_hosted_model_is_told_that_it_must_call(choice: Any, told: Any) -> None:
    def add(a: int) -> int:
        """Add."""
        return a

    bound.clear()
    call: Any = {"name": "add", "args": {"a": 1}, "id": "1"}
    policy = LangChainPolicy(Forced(responses=[AIMessage("", tool_calls=[call])]))
    chat = ChatETS(engine=HostedEngine(policy, marker(), name="forced"), width=2).bind_tools([add], tool_choice=choice)
    assert chat.invoke("1?").tool_calls[0]["args"] == {"a": 1}
    assert bound == [(["add"], told)]


# ---------------------------------------------------------------------- a judge that fails


class Broken(FakeListChatModel):
    """A judge whose key has expired."""

    def _call(self, *args: Any, **kwargs: Any) -> str:
        raise RuntimeError("401: no such key")


@pytest.mark.parametrize(
    ("verifier", "said"),
    [
        (judge(Broken(responses=["7"])), "2 of 2 steps no score from 0 to 10, first: RuntimeError('401: no such key')"),
        (judge(FakeListChatModel(responses=["I cannot say."])), "first: 'I cannot say.'"),
        (RunnableVerifier(RunnableLambda(lambda given: 7)), "no score from 0 to 1, first: 7"),
    ],
)
def test_the_log_says_why_a_judge_gives_no_score(verifier: Any, said: str, caplog: pytest.LogCaptureFixture) -> None:
    chat = ChatETS(engine=scripted(lambda request: "The answer is 4.")[0], verifier=verifier, width=2)
    with pytest.raises(EngineError, match="the log says why"):
        chat.invoke("2+2?")
    assert said in caplog.text
