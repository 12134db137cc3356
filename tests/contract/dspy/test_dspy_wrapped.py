"""Adapters that do more than format and parse: what they change is asked, and what they make of an answer counts."""

from __future__ import annotations

import asyncio
from typing import Any

import dspy
import pytest
from dspy.utils.exceptions import AdapterParseError

from ets_engine.hosted import ProposalRequest
from ets_integrations.dspy import ETSLM, ETSReasoner, PlainAdapter

QUESTION = {"question": "What is 20+22?"}
SMALL = {"width": 4, "strategy": "best_of_n"}


def is_right(args: dict[str, Any], pred: dspy.Prediction) -> float:
    return float(pred.answer == 42)


@pytest.mark.parametrize("adapter", [None, dspy.JSONAdapter()], ids=["chat", "json"])
def test_refine_gives_its_advice_to_a_reasoner(chat: Any, adapter: dspy.Adapter | None) -> None:
    def write(request: ProposalRequest, place: int) -> str:
        asked = request.messages[-1]["content"]
        if "advice" in asked.rpartition("Respond with")[2]:
            fields = {"discussion": "It was 41.", "advice": '{"predict": "Say 42."}'}
            return chat.marked(**fields) if adapter is None else '{"discussion": "", "advice": {"predict": "Say 42."}}'
        answer = 42 if "Say 42." in asked and place == 3 else 41 if place else "forty"
        if adapter is None:
            return chat.marked(reasoning="So.", answer=answer)
        return f'{{"reasoning": "So.", "answer": "{answer}"}}'

    engine = chat.scripted(write)
    reasoner = ETSReasoner("question -> answer: int", width=4, strategy="best_of_n", reward_fn=is_right)
    with dspy.context(lm=ETSLM(service=engine), adapter=adapter, trace=[]):
        pred = dspy.Refine(reasoner, N=2, reward_fn=is_right, threshold=1.0)(**QUESTION)
        _, inputs, _ = dspy.settings.trace[-1]
    assert pred.completions.answer == [42, 41] and pred._ets.rewards == (1.0, 0.0) and pred._ets.width == 4
    assert len(engine.script.requests) == 3 and inputs == QUESTION


class Hinted(dspy.ChatAdapter):
    """Asks with a hint, at a temperature, and adds 1 to what comes back."""

    def __call__(self, lm: Any, lm_kwargs: Any, signature: Any, demos: Any, inputs: Any) -> list[dict[str, Any]]:
        inputs["hint"], lm_kwargs["temperature"] = "Count twice.", 0.3
        signature = signature.append("hint", dspy.InputField())
        try:
            found = super().__call__(lm, lm_kwargs, signature, demos, inputs)
        except Exception as error:
            raise AssertionError("nothing fails here") from error
        return [{**one, "answer": one["answer"] + 1} for one in found]


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("mode", ["rerank", "search"])
def test_an_adapter_may_change_question_and_answer(chat: Any, is_async: bool, mode: Any) -> None:
    engine = chat.answering(40, 41, 42, 43)
    reasoner = ETSReasoner("question -> answer: int", reward_fn=is_right, reward=mode, **SMALL)
    with dspy.context(lm=ETSLM(service=engine), adapter=Hinted()):
        pred = asyncio.run(reasoner.acall(**QUESTION)) if is_async else reasoner(**QUESTION)
    assert pred.answer == 42 and pred.reasoning == "Think about reasoning of 41."
    (request,) = engine.script.requests
    assert "Count twice." in request.messages[-1]["content"] and request.config.temperature == 0.3


def test_an_adapter_that_asks_no_lm_answers_by_itself(chat: Any) -> None:
    class Knowing(dspy.ChatAdapter):
        def __call__(self, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
            return [{"reasoning": "", "answer": 42}]

    engine = chat.answering(41)
    with dspy.context(lm=ETSLM(service=engine), adapter=Knowing()):
        assert ETSReasoner("question -> answer: int")(**QUESTION).answer == 42
    assert not engine.script.requests


def test_adapters_that_call_as_dspys_do_are_planned_as_before(chat: Any) -> None:
    engine = chat.scripted(lambda request, place: "The answer is 42.")
    with dspy.context(lm=ETSLM(service=engine), adapter=PlainAdapter()):
        assert ETSReasoner("question -> answer: int", **SMALL)(**QUESTION).answer == 42


# ---------------------------------------------------------------------- adapters that ask on


class Critic(dspy.ChatAdapter):
    """Asks whether the answer is right, and takes the verdict for the reasoning."""

    def __init__(self, as_messages: bool) -> None:
        super().__init__()
        self.as_messages = as_messages

    def __call__(self, lm: Any, lm_kwargs: Any, signature: Any, demos: Any, inputs: Any) -> list[dict[str, Any]]:
        (found,) = super().__call__(lm, lm_kwargs, signature, demos, inputs)
        asked = {"question": f"Is {found['answer']} right? yes or no"}
        if self.as_messages:
            (verdict,) = dspy.ChatAdapter()(lm, {}, dspy.Signature("question -> answer"), [], asked)
            return [{**found, "reasoning": verdict["answer"]}]
        return [{**found, "reasoning": lm(asked["question"])[0]}]


@pytest.mark.parametrize("mode", ["none", "rerank", "search", "async"])
@pytest.mark.parametrize("as_messages", [False, True])
def test_a_second_question_goes_to_the_lm_once_for_each_answer(chat: Any, mode: Any, as_messages: bool) -> None:
    def write(request: ProposalRequest, place: int) -> str:
        asked = request.messages[-1]["content"]
        if "yes or no" in asked:
            verdict = "yes" if "42" in asked else "no"
            return chat.marked(answer=verdict) if as_messages else verdict
        return chat.marked(reasoning="So.", answer=40 + place)

    engine = chat.scripted(write)
    reward = {} if mode in ("none", "async") else {"reward_fn": is_right, "reward": mode}
    reasoner = ETSReasoner("question -> answer: int", **SMALL, **reward)
    with dspy.context(lm=ETSLM(service=engine, cache=False), adapter=Critic(as_messages)):
        pred = asyncio.run(reasoner.acall(**QUESTION)) if mode == "async" else reasoner(**QUESTION)
    verdicts = dict(zip(pred.completions.answer, pred.completions.reasoning, strict=True))
    assert verdicts == {40: "no", 41: "no", 42: "yes", 43: "no"} and len(engine.script.requests) == 5
    assert pred.answer == (42 if reward else 40)


class Stubborn(dspy.ChatAdapter):
    """Asks until it can read the answer."""

    def __call__(self, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        while True:
            try:
                return super().__call__(*args, **kwargs)
            except AdapterParseError:
                pass


def test_an_answer_that_an_adapter_would_ask_for_again_is_dropped(chat: Any) -> None:
    engine = chat.answering("forty", 42)
    reasoner = ETSReasoner("question -> answer: int", **SMALL)
    with dspy.context(lm=ETSLM(service=engine), adapter=Stubborn()):
        assert reasoner(**QUESTION).completions.answer == [42]
    assert len(engine.script.requests) == 1
    with (
        dspy.context(lm=ETSLM(service=chat.answering("forty", name="wordy")), adapter=Stubborn()),
        pytest.raises(AdapterParseError, match="asked the same again"),
    ):
        reasoner(**QUESTION)


class Guarded(dspy.ChatAdapter):
    """Takes no odd answer."""

    def __call__(self, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        found = super().__call__(*args, **kwargs)
        if found[0]["answer"] % 2:
            raise ValueError("an odd answer")
        return found


def test_an_answer_for_which_an_adapter_raises_is_dropped(chat: Any) -> None:
    reasoner = ETSReasoner("question -> answer: int", **SMALL)
    with dspy.context(lm=ETSLM(service=chat.answering(40, 41, 42, 43)), adapter=Guarded()):
        assert reasoner(**QUESTION).completions.answer == [40, 42]
    with (
        dspy.context(lm=ETSLM(service=chat.answering(41, name="odd")), adapter=Guarded()),
        pytest.raises(ValueError, match="an odd answer"),
    ):
        reasoner(**QUESTION)
