"""`ChatETS` on a scripted engine: what goes in, what comes out, caches."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.language_models import FakeListChatModel
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.runnables import ConfigurableField, RunnableLambda
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import BaseModel, ValidationError

from ets_engine import ConfigError, EngineError, HostedEngine, NoUsableAnswerError, SearchConfig, register_service
from ets_engine.hosted import ProposalRequest
from ets_engine.types import Step, StopReason
from ets_integrations.langchain import ChatETS, LangChainPolicy, RunnableVerifier, judge

from .scripted import scripted, spied

HEAVY = ("torch", "transformers", "triton", "langgraph", "litellm", "fastapi", "dspy")


def model(reply: Any = None, **fields: Any) -> ChatETS:
    return ChatETS(engine=spied(reply)[0], **{"width": 3, **fields})


# ---------------------------------------------------------------------- imports and construction


@pytest.mark.parametrize("name", ["ets_integrations.langchain", "ets_integrations.settings"])
def test_the_import_loads_no_model_library(name: str) -> None:
    program = f"import json, sys, {name}\nprint(json.dumps(sorted(set(sys.modules) & {set(HEAVY)!r})))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(done.stdout) == []


def test_nothing_is_loaded_before_the_first_call() -> None:
    ChatETS(model="no/such/model", width=4).bind(width=8)


@pytest.mark.parametrize("bad", [{"width": 0}, {"temperature": -1.0}, {"search": {"widht": 3}}, {"effort": "huge"}])
def test_a_bad_setting_is_refused_in_the_constructor(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(bad)) if "search" not in bad else "widht"):
        ChatETS(**bad)


def test_a_prm_by_name_beside_an_engine_is_refused() -> None:
    with pytest.raises(ConfigError, match="has its PRM already"):
        model(verifier="some/prm").invoke("Hi")


def test_something_else_than_a_service_is_refused() -> None:
    with pytest.raises(ConfigError, match="give an ETSEngine"):
        ChatETS(engine=object()).invoke("Hi")


def test_an_engine_may_be_given_by_its_registered_name() -> None:
    spy, _ = spied(name="fake/by-name")
    register_service("fake/by-name", spy)
    message = ChatETS(engine="fake/by-name", width=2).invoke("Hi")
    assert len(spy.submitted) == 1 and message.response_metadata["model_name"] == "fake/by-name"


# ---------------------------------------------------------------------- settings


def test_settings_of_the_model_of_the_binding_and_of_the_call() -> None:
    spy, _ = spied()
    chat = ChatETS(engine=spy, width=8, temperature=0.5, search={"max_steps": 7}, timeout=9.0)
    chat.invoke("Hi")
    chat.bind(width=2).invoke("Hi", lambda_b=0.25)
    chat.invoke("Hi", effort="low", stop=["END"])
    configs = [config for _, config, _ in spy.submitted]
    assert [one.width for one in configs] == [8, 2, 4]
    assert [one.lambda_b for one in configs] == [1.0, 0.25, 1.0]
    assert [one.stop for one in configs] == [(), (), ("END",)]
    assert {(one.temperature, one.max_steps, one.deadline_s) for one in configs} == {(0.5, 7, 9.0)}


def test_without_a_seed_every_call_draws_one() -> None:
    spy, _ = spied()
    for chat in (ChatETS(engine=spy), ChatETS(engine=spy, seed=5)):
        for _ in range(2):
            chat.invoke("Hi")
    seeds = [config.seed for _, config, _ in spy.submitted]
    assert seeds[0] != seeds[1] and seeds[2:] == [5, 5]


def test_configurable_fields_change_the_search() -> None:
    spy, _ = spied()
    chat = ChatETS(engine=spy, width=8).configurable_fields(width=ConfigurableField(id="ets_width"))
    chat.invoke("Hi", config={"configurable": {"ets_width": 3}})
    assert spy.submitted[0][1].width == 3


# ---------------------------------------------------------------------- messages


def test_the_conversation_reaches_the_policy_as_chat_templates_take_it() -> None:
    spy, _ = spied()
    call = {"name": "add", "args": {"a": 1}, "id": "c1"}
    ChatETS(engine=spy, width=1).invoke(
        [
            SystemMessage("Be brief."),
            HumanMessage([{"type": "text", "text": "1+1?"}], name="Ann"),
            AIMessage("", tool_calls=[call]),
            ToolMessage("2", tool_call_id="c1"),
            ToolMessage("boom", tool_call_id="c1", status="error"),
        ]
    )
    assert spy.submitted[0][0] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1?", "name": "Ann"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "id": "c1", "function": {"name": "add", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "content": "2", "tool_call_id": "c1"},
        {"role": "tool", "content": "Error: boom", "tool_call_id": "c1"},
    ]


def test_an_image_is_refused() -> None:
    with pytest.raises(ConfigError, match="image_url"):
        model().invoke([HumanMessage([{"type": "image_url", "image_url": {"url": "data:,"}}])])


def test_the_message_tells_what_the_search_found_and_cost() -> None:
    message = model(width=4).invoke("What is it?")
    assert message.text.endswith("The answer is 42.")
    metadata = message.response_metadata
    assert (metadata["model_name"], metadata["finish_reason"]) == ("fake/ets", "stop")
    ets = metadata["ets"]
    assert (ets["answer"], ets["width"], ets["trajectories"], ets["steps"]) == ("42", 4, 4, 2)
    assert ets["candidates"][0]["votes"] == 4
    assert json.loads(json.dumps(metadata)) == metadata, "plain JSON"
    usage = message.usage_metadata
    assert usage is not None
    assert usage["output_tokens"] == ets["generated_tokens"] > 0
    details = usage["output_token_details"]
    assert 0 < details["reasoning"] < usage["output_tokens"], "what the other branches wrote"


def test_the_answer_alone_carries_its_solution_as_reasoning() -> None:
    message = model(output="answer").invoke("What is it?")
    assert message.content == "42"
    assert [block["type"] for block in message.content_blocks] == ["reasoning", "text"]
    assert message.additional_kwargs["reasoning_content"].endswith("The answer is 42.")


def test_an_answer_alone_is_nothing_where_no_solution_was_finished() -> None:
    thinks = HostedEngine(
        lambda request: [Step("I think.\n\n", 3) for _ in request.partials], lambda p, s: 0.5, name="thinks"
    )
    message = ChatETS(engine=thinks, width=2, max_steps=2, output="answer").invoke("Hi")
    assert (message.content, message.response_metadata["finish_reason"]) == ("", "length")
    assert message.additional_kwargs["reasoning_content"] == "I think.\n\nI think.\n\n"
    prose = ChatETS(engine=spied(lambda request: "Hello there.")[0], width=2, output="answer").invoke("Hi")
    assert (prose.content, prose.additional_kwargs) == ("Hello there.", {})


def test_prose_that_was_finished_before_the_deadline_is_the_answer() -> None:
    def one_ends(request: ProposalRequest) -> list[Step]:
        time.sleep(0.02)
        return [
            Step("Hello there.", 3, StopReason.FINISHED) if child == 1 else Step("I think.\n\n", 3)
            for child in request.children
        ]

    engine = HostedEngine(one_ends, lambda problem, steps: 0.5, name="prose")
    chat = ChatETS(engine=engine, width=2, max_steps=1000, max_tokens=100_000, timeout=0.5, output="answer")
    message = chat.invoke("Hi")
    assert (message.content, message.response_metadata["finish_reason"]) == ("Hello there.", "deadline")


def test_tokens_of_messages_are_those_of_calls_and_tools_too() -> None:
    counted = [
        HumanMessage([{"type": "text", "text": "one two"}, {"type": "image_url", "image_url": {"url": "data:,"}}]),
        AIMessage("", tool_calls=[{"name": "add", "args": {"a": 1}, "id": "1"}]),
        ToolMessage("three", tool_call_id="1"),
    ]
    chat = ChatETS(engine=spied()[0])  # it counts words
    assert chat.get_num_tokens_from_messages(counted) == 2 + len('{"name": "add", "arguments": {"a": 1}}'.split()) + 1
    more = chat.get_num_tokens_from_messages(counted, tools=[add])
    assert more == chat.get_num_tokens_from_messages(counted) + len(json.dumps(convert_to_openai_tool(add)).split())


def test_a_stop_text_ends_the_answer() -> None:
    assert model().invoke("Hi", stop=["is 42"]).text.endswith("The answer ")


def test_every_branch_failing_is_an_error_and_falls_back() -> None:
    def fail(request: ProposalRequest) -> str:
        raise ConnectionError("the server is gone")

    broken = model(fail)
    with pytest.raises(EngineError, match="the server is gone"):
        broken.invoke("Hi")
    plain = FakeListChatModel(responses=["plain"])
    assert broken.with_fallbacks([plain]).invoke("Hi").text == "plain"


# ---------------------------------------------------------------------- streaming


def branches(request: ProposalRequest) -> list[Step]:
    """A common first step; then two kinds of branches, one of which the verifier likes."""
    steps = []
    for place, partial in enumerate(request.partials):
        if not partial:
            steps.append(Step("We add. \n\n", 3))
        elif partial.count("\n\n") == 1:
            steps.append(Step(f"Way {'AB'[place % 2]} of it.\n\n", 4))
        else:
            steps.append(Step("The answer is 2.", 5, StopReason.FINISHED))
    return steps


def likes_b(problem: str, steps: Any) -> float:
    return 1.0 if "Way A" not in "".join(steps) else 0.01


def branching() -> ChatETS:
    return ChatETS(
        engine=HostedEngine(branches, likes_b, name="branching"), width=4, strategy="beam", search={"keep": 1}
    )


def test_what_is_streamed_is_what_no_pruning_can_take_back() -> None:
    chunks = list(branching().stream("1+1?"))
    texts = [chunk.text for chunk in chunks if chunk.text]
    assert texts == ["We add. \n\n", "Way B of it.\n\n", "The answer is 2."]
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole = whole + chunk
    assert whole.usage_metadata is not None and whole.response_metadata["ets"]["answer"] == "2"
    assert sum("ets" in chunk.response_metadata for chunk in chunks) == 1


async def test_the_same_is_streamed_to_an_event_loop() -> None:
    texts = [chunk.text async for chunk in branching().astream("1+1?") if chunk.text]
    assert texts == ["We add. \n\n", "Way B of it.\n\n", "The answer is 2."]


def test_an_answer_alone_is_not_streamed_in_parts() -> None:
    chat = ChatETS(engine=HostedEngine(branches, likes_b, name="branching"), width=4, output="answer")
    assert [chunk.text for chunk in chat.stream("1+1?") if chunk.text] == ["2"]


# ---------------------------------------------------------------------- tools and structured output


class Joke(BaseModel):
    """A joke."""

    setup: str
    punchline: str


def add(a: int, b: int) -> int:
    """Add two numbers."""
    raise AssertionError("nothing is called inside a search")


def mixed(request: ProposalRequest) -> list[Step]:
    """One call in four is well formed, the others are what models write on bad days."""
    turns = [
        '<tool_call>{"name": "add", "arguments": {"a": "one", "b": 2}}</tool_call>',
        '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>',
        '<tool_call>{"name": "subtract", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "add"',
    ]
    return [Step(turns[place % 4], 9, StopReason.FINISHED) for place, _ in enumerate(request.partials)]


def test_leaves_that_are_no_valid_turn_are_dead() -> None:
    chat = ChatETS(engine=HostedEngine(mixed, lambda problem, steps: 0.5, name="mixed"), width=8)
    message = chat.bind_tools([add]).invoke("1+2?")
    assert [(call["name"], call["args"]) for call in message.tool_calls] == [("add", {"a": 1, "b": 2})]
    assert message.response_metadata["finish_reason"] == "tool_calls"
    assert message.response_metadata["ets"]["candidates"][0]["votes"] == 2
    (chunk,) = [one for one in chat.bind_tools([add]).stream("1+2?") if one.tool_call_chunks]
    assert [(call["name"], call["args"]) for call in chunk.tool_calls] == [("add", {"a": 1, "b": 2})]


def test_a_demanded_call_that_nobody_made_is_an_error() -> None:
    chat = model(lambda request: "The answer is 3.")
    assert chat.bind_tools([add]).invoke("1+2?").text == "The answer is 3."
    for choice in ("any", "required", "add", True, {"type": "function", "function": {"name": "add"}}):
        with pytest.raises(NoUsableAnswerError, match="no call of"):
            chat.bind_tools([add], tool_choice=choice).invoke("1+2?")
    with pytest.raises(ConfigError, match="subtract"):
        chat.bind_tools([add], tool_choice="subtract")


def test_a_turn_of_two_calls_is_none_where_one_is_asked_for() -> None:
    call = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>'

    def one_or_two(request: ProposalRequest) -> list[Step]:
        return [Step(call * (1 + (place < 3)), 9, StopReason.FINISHED) for place, _ in enumerate(request.partials)]

    chat = ChatETS(engine=HostedEngine(one_or_two, lambda problem, steps: 0.5, name="calls"), width=4)
    assert len(chat.bind_tools([add]).invoke("?").tool_calls) == 2
    assert len(chat.bind_tools([add], parallel_tool_calls=False).invoke("?").tool_calls) == 1
    with pytest.raises(NoUsableAnswerError, match="2 calls, of at most 1"):
        model(lambda request: call * 2).bind_tools([add], parallel_tool_calls=False).invoke("?")


def test_structured_output_comes_from_a_leaf() -> None:
    structured = model().with_structured_output(Joke)
    joke = structured.invoke("Tell me 'one'.")
    assert isinstance(joke, Joke) and joke.setup == "one"


# ---------------------------------------------------------------------- caches


def test_caches_never_mix_two_searches() -> None:
    cache = InMemoryCache()
    spy, _ = spied()
    other, _ = spied(name="fake/other")

    def one(problem: str, steps: Any) -> float:
        return 0.5

    def two(problem: str, steps: Any) -> float:
        return 0.25

    def closing_over(score: float) -> Any:
        return lambda problem, steps: score

    chats = [
        ChatETS(engine=spy, width=2, cache=cache),
        ChatETS(engine=spy, width=3, cache=cache),
        ChatETS(engine=other, width=2, cache=cache),
        ChatETS(engine=spy, width=2, cache=cache, verifier=one),
        ChatETS(engine=spy, width=2, cache=cache, verifier=two),
        ChatETS(engine=spy, width=2, cache=cache, verifier=closing_over(0.5)),
        ChatETS(engine=spy, width=2, cache=cache, verifier=closing_over(0.25)),
        ChatETS(engine=spy, width=2, cache=cache, verifier=RunnableVerifier(RunnableLambda(lambda given: 0.5))),
        ChatETS(engine=spy, width=2, cache=cache, output="answer"),
        ChatETS(engine=spy, width=2, cache=cache, search={"max_steps": 9}),
        ChatETS(engine=spy, width=2, cache=cache, timeout=60),
        ChatETS(engine=spy, width=2, cache=cache).bind(lambda_b=0.5),
    ]
    for chat in chats:
        chat.invoke("Hi")
    assert len(spy.submitted) + len(other.submitted) == len(chats)
    for chat in chats:
        chat.invoke("Hi")
    assert len(spy.submitted) + len(other.submitted) == len(chats), "each finds its own"


# ---------------------------------------------------------------------- verifiers and policies


def test_verifiers_in_langchain_terms_judge_the_steps() -> None:
    seen: list[Any] = []

    def note(given: dict[str, Any]) -> float:
        seen.append(given)
        return 0.5

    model(verifier=RunnableLambda(note), width=1).invoke("1+1?")
    assert [one["problem"] for one in seen] == ["1+1?", "1+1?"]
    assert seen[1]["steps"][0].startswith("Hello") and seen[1]["text"] == "".join(seen[1]["steps"])
    marked = judge(FakeListChatModel(responses=["Score: 7", "none", "99", "2/10", "3 out of 10"]))
    scores = marked.score_many("1+1?", [["a"], ["b"], ["c"], ["d"], ["e"]])
    assert sorted(map(str, scores)) == ["0.2", "0.3", "0.7", "nan", "nan"]


def test_a_hosted_chat_model_is_a_policy() -> None:
    hosted = FakeListChatModel(responses=["1+1 makes 2.", "The answer is 2."] * 50)
    service = HostedEngine(LangChainPolicy(hosted), lambda problem, steps: 0.5, name="hosted")
    message = ChatETS(engine=service, width=2, output="answer").invoke("1+1?")
    assert message.text == "2" and message.response_metadata["ets"]["kv"] is None


def test_copies_share_the_engine() -> None:
    chat = model()
    assert copy.deepcopy(scripted()[0]) is not None
    assert chat.model_copy(update={"width": 9}).engine is chat.engine
    assert ChatETS(engine=scripted()[0]).get_num_tokens("four words are here") > 0


def test_langsmith_sees_what_is_searched() -> None:
    params = ChatETS(model="fake/ets", temperature=0.5)._get_ls_params(model="fake/other")
    assert (params["ls_provider"], params["ls_model_name"]) == ("ets", "fake/other")
    assert (params["ls_temperature"], params["ls_max_tokens"]) == (0.5, SearchConfig().max_tokens)
    hosted = ChatETS(engine=HostedEngine(lambda request: [Step("The answer is 2.", 5)], name="desk"))
    assert hosted._get_ls_params()["ls_model_name"] == "desk"
    metadata = ChatETS(model="fake/ets").metadata
    assert metadata is not None and "ets-integrations" in metadata["lc_versions"]
