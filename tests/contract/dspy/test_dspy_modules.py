"""DSPy's own modules and helpers work unchanged on an ETSLM, under `-W error::DeprecationWarning`."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Sequence
from typing import Any, Literal

import dspy
import pytest
from dspy.streaming import StatusMessage, StreamListener, StreamResponse

from ets_engine.config import SearchConfig
from ets_engine.hosted import ProposalRequest
from ets_integrations.dspy import ETSLM, ETSPredict, ETSReasoner

QUESTION = {"question": "What is 20+22?"}
SMALL = {"width": 4, "strategy": "rebase"}


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def plain_lm(chat: Any, *texts: str) -> tuple[ETSLM, Any]:
    """A scripted LM that gives these texts, request by request, and its engine."""

    def write(request: ProposalRequest, place: int) -> str:
        return texts[min(len(engine.script.requests) - 1, len(texts) - 1)]

    engine = chat.scripted(write)
    return ETSLM(service=engine, search=SMALL, cache=False), engine


def test_chain_of_thought_with_types(chat: Any) -> None:
    class Sum(dspy.Signature):
        """Add."""

        question: str = dspy.InputField()
        parts: list[int] = dspy.OutputField()
        size: Literal["small", "large"] = dspy.OutputField()

    def write(request: ProposalRequest, place: int) -> str:
        said = {"parts": [20, 22], "size": "large"} if place % 2 else {"size": "large"}
        return chat.marked(reasoning="Both.\n\nThen size.", **said)

    engine = chat.scripted(write)
    with dspy.context(lm=ETSLM(service=engine, search=SMALL)):
        pred = dspy.ChainOfThought(Sum)(**QUESTION)
    assert (pred.parts, pred.reasoning) == ([20, 22], "Both.\n\nThen size.") and pred.size == "large"


def test_react_searches_only_where_it_is_told_to(chat: Any) -> None:
    turns = [
        chat.marked(next_thought="Add them.", next_tool_name="add", next_tool_args='{"a": 20, "b": 22}'),
        chat.marked(next_thought="Done.", next_tool_name="finish", next_tool_args="{}"),
    ]
    plain, acting = plain_lm(chat, *turns)
    searching = chat.answering("42")
    agent = dspy.ReAct("question -> answer: int", tools=[add])
    agent.extract.set_lm(ETSLM(service=searching, search=SMALL))
    with dspy.context(lm=plain):
        pred = agent(**QUESTION)
        assert pred.answer == 42 and pred.trajectory["observation_0"] == 42
        assert (len(acting.script.requests), len(searching.script.requests)) == (2, 1)

    plain, acting = plain_lm(chat, *turns)
    with dspy.context(lm=plain):
        assert asyncio.run(agent.acall(question="And 20+22?")).answer == 42


def test_react_shortens_its_trajectory_when_the_prompt_is_too_long(chat: Any) -> None:
    from ets_engine.errors import ContextLengthError

    turns = iter(range(100))

    class Short:
        name, max_concurrent_searches = "short", 4

        def __init__(self) -> None:
            self.engine = chat.scripted(
                lambda request, place: (
                    chat.marked(answer="42", reasoning="r")
                    if "next_tool_name" not in chat.fields_asked(request)
                    else chat.marked(
                        next_thought="Again.",
                        next_tool_name="add" if next(turns) < 12 else "finish",
                        next_tool_args='{"a": 1, "b": 1}' if next(turns) < 24 else "{}",
                    )
                )
            )
            self.refused = 0

        def submit(self, problem: Any, config: Any = None, **options: Any) -> Any:
            if sum(len(turn["content"]) for turn in problem) > 3000:
                self.refused += 1
                raise ContextLengthError("too long")
            return self.engine.submit(problem, config, **options)

        def count_tokens(self, text: str) -> int:
            return len(text)

    service = Short()
    with dspy.context(lm=ETSLM(service=service, search={"strategy": "greedy"}, cache=False)):
        pred = dspy.ReAct("question -> answer", tools=[add], max_iters=8)(**QUESTION)
    assert pred.answer == "42" and service.refused > 0


def test_react_v2_calls_tools_natively(chat: Any) -> None:
    def call(name: str, **arguments: Any) -> str:
        return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"

    def write(request: ProposalRequest, place: int) -> str:
        if any(turn["role"] == "tool" for turn in request.messages):
            return "I know." + call("submit", answer=42)
        if place == 1:
            return call("add", a="twenty")  # does not fit the schema: a dead leaf
        return call("add", a=20, b=22)

    engine = chat.scripted(write)
    lm = ETSLM(service=engine, search={**SMALL, "strategy": "best_of_n"})
    adapter = dspy.ChatAdapter(use_native_function_calling=True)
    ran: list[tuple[int, int]] = []

    def watched(a: int, b: int) -> int:
        """Add two numbers."""
        ran.append((a, b))
        return a + b

    tool = dspy.Tool(watched, name="add")
    with dspy.context(lm=lm, adapter=adapter):
        pred = dspy.ReActV2("question -> answer: int", tools=[tool])(**QUESTION)
    assert pred.answer == 42 and pred.termination_reason == "submit"
    assert ran == [(20, 22)], "tools are called by the program, once, and never inside the search"
    first = lm.history[0]["response"]
    assert [(part.name, part.input) for part in first.tool_calls] == [("add", {"a": 20, "b": 22})]
    assert first.finish_reason == "tool_call" and first.provider_data["ets"]["candidates"][0]["votes"] == 3
    sent = engine.script.requests[1].messages
    called = next(place for place, turn in enumerate(sent) if turn.get("tool_calls"))
    assert sent[called]["tool_calls"][0]["function"]["arguments"] == {"a": 20, "b": 22}
    assert (sent[called + 1]["role"], sent[called + 1]["content"]) == ("tool", "42")
    assert sent[called + 1]["tool_call_id"] == sent[called]["tool_calls"][0]["id"]
    assert {tool["function"]["name"] for tool in engine.script.requests[0].tools} == {"add", "submit"}


@pytest.mark.parametrize("module", [dspy.Predict, ETSPredict])
def test_a_history_of_tool_calls_reaches_the_model(chat: Any, module: Any) -> None:
    """DSPy leaves out turns whose calls have no ids."""

    class Act(dspy.Signature):
        question: str = dspy.InputField()
        history: dspy.History = dspy.InputField()
        tools: list[dspy.Tool] = dspy.InputField()
        outputs: dspy.ToolCalls = dspy.OutputField()

    call = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>'
    engine = chat.scripted(lambda request, place: call)
    lm = ETSLM(service=engine, search=SMALL, cache=False)
    act, tools = module(Act), [dspy.Tool(add)]
    with dspy.context(lm=lm, adapter=dspy.ChatAdapter(use_native_function_calling=True)):
        asked = act(question="1+2?", history=dspy.History(messages=[]), tools=tools).outputs
        ids = {one.id for one in asked.tool_calls}
        assert None not in ids and len(ids) == 1
        result = dspy.ToolCallResults.from_tool_calls_and_values(asked, [3])
        turn = {"question": "1+2?", "outputs": asked.model_copy(update={"tool_call_results": result})}
        act(question="and now?", history=dspy.History(messages=[turn]), tools=tools)
    sent = [message["role"] for message in engine.script.requests[-1].messages]
    assert sent == ["system", "user", "assistant", "tool", "user"]


def test_best_of_n_gets_other_answers(chat: Any) -> None:
    """Without a seed each attempt is another search, and each is cached under its own rollout."""
    answers = iter(["41", "43", "42", "44"])
    given: dict[int, str] = {}

    def write(request: ProposalRequest, place: int) -> str:
        return chat.marked(reasoning="r", answer=given.setdefault(request.config.seed, "") or next_answer(request))

    def next_answer(request: ProposalRequest) -> str:
        given[request.config.seed] = next(answers)
        return given[request.config.seed]

    engine = chat.scripted(write)
    best = dspy.BestOfN(
        dspy.ChainOfThought("question -> answer"), N=3, reward_fn=lambda args, pred: pred.answer == "42", threshold=1.0
    )
    with dspy.context(lm=ETSLM(service=engine, search=SMALL)):
        assert best(**QUESTION).answer == "42" and len(engine.script.requests) == 3
        assert best(**QUESTION).answer == "42" and len(engine.script.requests) == 3, "from the cache"
    assert {one.config.temperature for one in engine.script.requests} == {1.0}


def reward_42(args: dict[str, Any], pred: dspy.Prediction) -> float:
    return 1.0 if pred.answer == "42" else 0.0


def test_refine_gives_advice(chat: Any) -> None:
    def write(request: ProposalRequest, place: int) -> str:
        if "advice" in chat.fields_asked(request):
            return chat.marked(discussion="It was wrong.", advice='{"predict": "Say 42."}')
        return chat.marked(reasoning="r", answer="42" if "Say 42." in request.messages[-1]["content"] else "41")

    engine = chat.scripted(write)
    refine = dspy.Refine(dspy.ChainOfThought("question -> answer"), N=2, reward_fn=reward_42, threshold=1.0)
    with dspy.context(lm=ETSLM(service=engine, search=SMALL)):
        assert refine(**QUESTION).answer == "42"
    assert len(engine.script.requests) == 3


@pytest.mark.filterwarnings("ignore:The 'prefix' argument:DeprecationWarning")  # DSPy's own use of it
def test_multi_chain_comparison_compares_samples(chat: Any) -> None:
    engine = chat.answering("42")
    with dspy.context(lm=ETSLM(service=engine, search=SMALL)):
        samples = dspy.ChainOfThought("question -> answer", n=3, temperature=0.7)(**QUESTION).completions
        assert len(samples.answer) == 3 and len(engine.script.requests) == 3
        attempts = [{"reasoning": one.reasoning, "answer": one.answer} for one in samples]
        assert dspy.MultiChainComparison("question -> answer", M=3)(attempts, **QUESTION).answer == "42"
    asked = engine.script.requests[-1].messages[-1]["content"]
    assert "reasoning_attempt_3" in asked and engine.script.requests[-1].config.temperature == 0.7


@pytest.mark.filterwarnings("ignore:ProgramOfThought is deprecated:DeprecationWarning")  # DSPy's word about itself
def test_program_of_thought_plans(chat: Any) -> None:
    """The call that writes the program; running it needs Deno."""
    engine = chat.answering("print(20 + 22)")
    program = dspy.ProgramOfThought("question -> answer")
    with dspy.context(lm=ETSLM(service=engine, search=SMALL)):
        assert program.code_generate(**QUESTION).generated_code == "print(20 + 22)"


def waiting(chat: Any, seen: list[int]) -> Any:
    """A service whose searches are slow, noting how many are under way."""
    under_way, lock = [0], threading.Lock()

    def write(request: ProposalRequest, place: int) -> str:
        return chat.marked(answer="42")

    class Slow:
        name, max_concurrent_searches = "slow", 64

        def __init__(self) -> None:
            self.engine = chat.scripted(write, verifier=self.judge)

        def judge(self, problem: str, steps: Sequence[str]) -> float:
            with lock:
                under_way[0] += 1
                seen.append(under_way[0])
            time.sleep(0.05)
            with lock:
                under_way[0] -= 1
            return 0.5

        def submit(self, *args: Any, **options: Any) -> Any:
            return self.engine.submit(*args, **options)

        def count_tokens(self, text: str) -> int:
            return len(text)

    return Slow()


def test_evaluate_and_parallel_search_side_by_side(chat: Any) -> None:
    seen: list[int] = []
    lm = ETSLM(service=waiting(chat, seen), search={"strategy": "best_of_n", "width": 2})
    examples = [dspy.Example(question=str(place), answer="42").with_inputs("question") for place in range(16)]
    program = dspy.Predict("question -> answer")
    with dspy.context(lm=lm):
        score = dspy.Evaluate(
            devset=examples, metric=dspy.evaluate.answer_exact_match, num_threads=8, display_progress=False
        )(program).score
        assert score == 100.0 and max(seen) >= 4
        seen.clear()
        pairs = [(program, {"question": f"again {place}"}) for place in range(8)]
        found = dspy.Parallel(num_threads=8, disable_progress_bar=True)(pairs)
    assert [one.answer for one in found] == ["42"] * 8 and max(seen) >= 4


def test_asyncify_and_acall_leave_the_loop_free(chat: Any) -> None:
    seen: list[int] = []
    program = dspy.Predict("question -> answer")

    async def run(call: Any) -> int:
        ticks = 0
        task = asyncio.ensure_future(call(question=f"1 for {call}"))
        while not task.done():
            await asyncio.sleep(0.005)
            ticks += 1
        assert task.result().answer == "42"
        return ticks

    with dspy.context(lm=ETSLM(service=waiting(chat, seen), search={"strategy": "best_of_n", "width": 2}, cache=False)):
        assert asyncio.run(run(dspy.asyncify(program))) > 3
        assert asyncio.run(run(program.acall)) > 3


def test_track_usage_of_a_module(chat: Any) -> None:
    lm = ETSLM(service=chat.answering("42"), search=SMALL)
    with dspy.context(lm=lm, track_usage=True):
        pred = dspy.ChainOfThought("question -> answer")(**QUESTION)
    usage = pred.get_lm_usage()[lm.model]
    ets = lm.history[0]["response"].provider_data["ets"]
    assert usage["completion_tokens"] == ets["generated_tokens"]
    assert usage["total_tokens"] == ets["generated_tokens"] + ets["prompt_tokens"]


# ---------------------------------------------------------------------- streams


def thinking(request: ProposalRequest, place: int) -> str:
    """Branches that begin alike and part at the third step."""
    text = "[[ ## reasoning ## ]]\nWe have 20.\n\nWe have 22 as well.\n\n"
    return text + f"Way {place} adds them.\n\n[[ ## answer ## ]]\n{42 if place else 41}\n\n[[ ## completed ## ]]"


def unhurried(problem: str, steps: Sequence[str]) -> float:
    time.sleep(0.01)
    return 0.5


@pytest.mark.parametrize("module", [dspy.ChainOfThought, ETSReasoner])
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
async def test_streamify_with_listeners(chat: Any, module: Any, is_async: bool) -> None:
    engine = chat.scripted(thinking, verifier=unhurried)
    program = dspy.streamify(
        module("question -> answer"),
        stream_listeners=[StreamListener("reasoning"), StreamListener("answer")],
        is_async_program=is_async,
    )
    lm = ETSLM(service=engine, search={"strategy": "best_of_n", "width": 4, "vote": "majority"})
    with dspy.context(lm=lm):
        items = [item async for item in program(**QUESTION)]
    said: dict[str, str] = {"reasoning": "", "answer": ""}
    for item in items:
        if isinstance(item, StreamResponse):
            said[item.signature_field_name] += item.chunk
    pred = items[-1]
    assert isinstance(pred, dspy.Prediction) and pred.answer == said["answer"] == "42"
    assert said["reasoning"].strip() == pred.reasoning
    kinds = [type(item) for item in items]
    assert kinds.count(StatusMessage) >= 3
    first_text = kinds.index(StreamResponse)
    assert StatusMessage in kinds[first_text:], "the common beginning came before the search was through"
    status = next(item for item in items if isinstance(item, StatusMessage))
    assert status.message.startswith("ets step 1: ")


async def test_a_stream_never_shows_what_can_be_pruned(chat: Any) -> None:
    """Every piece that was streamed is the beginning of the answer, whatever branches were there."""
    engine = chat.scripted(thinking, verifier=unhurried)
    lm = ETSLM(service=engine, search={**SMALL, "strategy": "beam", "keep": 1})
    with dspy.context(lm=lm):
        stream = dspy.streamify(dspy.ChainOfThought("question -> answer"))
        items = [item async for item in stream(**QUESTION)]
    chunks = [item for item in items if hasattr(item, "choices")]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    response = lm.history[0]["response"]
    assert response.text == text and len(chunks) > 2


def test_a_synchronous_stream(chat: Any) -> None:
    engine = chat.scripted(thinking)
    program = dspy.streamify(
        dspy.ChainOfThought("question -> answer"), stream_listeners=[StreamListener("answer")], async_streaming=False
    )
    with dspy.context(lm=ETSLM(service=engine, search={"strategy": "best_of_n", "width": 4})):
        items = list(program(**QUESTION))
    assert "".join(item.chunk for item in items if isinstance(item, StreamResponse)) == items[-1].answer


async def test_tool_calls_are_not_streamed_as_text(chat: Any) -> None:
    def write(request: ProposalRequest, place: int) -> str:
        return 'Let me see.\n\n<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>'

    class Act(dspy.Signature):
        question: str = dspy.InputField()
        tools: list[dspy.Tool] = dspy.InputField()
        tool_calls: dspy.ToolCalls = dspy.OutputField()

    lm = ETSLM(service=chat.scripted(write, verifier=unhurried), search=SMALL)
    with dspy.context(lm=lm, adapter=dspy.ChatAdapter(use_native_function_calling=True)):
        stream = dspy.streamify(dspy.Predict(Act))
        items = [item async for item in stream(tools=[dspy.Tool(add)], **QUESTION)]
    text = "".join(item.choices[0].delta.get("content") or "" for item in items if hasattr(item, "choices"))
    assert text == "Let me see." and items[-1].tool_calls.tool_calls[0].args == {"a": 1, "b": 2}


def test_width_one_is_one_plain_call(chat: Any) -> None:
    engine = chat.answering("42", "41")
    with dspy.context(lm=ETSLM(service=engine, search={"strategy": "greedy"})):
        assert dspy.Predict("question -> answer")(**QUESTION).answer == "42"
    assert len(engine.script.requests[0].partials) == 1
    assert SearchConfig(strategy="greedy").strategy == engine.script.requests[0].config.strategy
