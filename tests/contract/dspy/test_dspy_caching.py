"""Which answers DSPy's caches keep, and for whom."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import dspy
import pytest

from ets_engine.hosted import ProposalRequest
from ets_integrations.dspy import ETSLM, ETSReasoner, PlainAdapter

QUESTION = {"question": "What is 20+22?"}
SMALL = {"width": 4, "strategy": "best_of_n"}


def likes_41(problem: str, steps: Sequence[str]) -> float:
    return 0.9 if "41" in "".join(steps) else 0.1


def likes_42(problem: str, steps: Sequence[str]) -> float:
    return 0.9 if "42" in "".join(steps) else 0.1


# ---------------------------------------------------------------------- deadlines


class Pace:
    """Texts of two steps, of which the second takes a while as long as `is_slow`."""

    def __init__(self) -> None:
        self.is_slow = True

    def wait(self, problem: str, steps: Sequence[str]) -> float:
        if self.is_slow and len(steps) > 1:
            time.sleep(0.3)
        return 0.5


def ask(lm: dspy.LM, is_async: bool) -> list[Any]:
    return asyncio.run(lm.acall("20+22?")) if is_async else lm("20+22?")


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_an_answer_that_was_cut_off_is_not_for_the_next_one(chat: Any, is_async: bool) -> None:
    pace = Pace()
    engine = chat.scripted(lambda request, place: "One.\n\nTwo.\n\nThe answer is 42.", verifier=pace.wait)
    lm = ETSLM(service=engine, search={**SMALL, "deadline_s": 0.2})
    assert "42" not in ask(lm, is_async)[0]
    assert lm.history[-1]["response"].provider_data["ets"]["finish_reason"] == "deadline"
    pace.is_slow = False
    for _ in range(2):
        assert "42" in ask(lm, is_async)[0]
    assert len(engine.script.requests) == 2, "what was finished is kept"


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_an_answer_that_was_cut_off_behind_forward_is_for_no_door(chat: Any, is_async: bool) -> None:
    def ask_forward() -> str:
        asked = {"messages": [{"role": "user", "content": "20+22?"}]}
        response = asyncio.run(lm.aforward(**asked)) if is_async else lm.forward(**asked)
        return response.choices[0].message.content

    pace = Pace()
    engine = chat.scripted(lambda request, place: "One.\n\nTwo.\n\nThe answer is 42.", verifier=pace.wait)
    lm = ETSLM(service=engine, search={**SMALL, "deadline_s": 0.2})
    assert "42" not in ask_forward()
    pace.is_slow = False
    assert "42" in ask(lm, is_async)[0] and "42" in ask_forward()
    assert len(engine.script.requests) == 2, "what was finished is for every door"


def test_forward_is_dspys_where_dspy_looks_for_it() -> None:
    assert ETSLM.forward is dspy.LM.forward and ETSLM.aforward is dspy.LM.aforward


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_a_deadline_before_the_first_word_is_an_error_and_not_retried(chat: Any, is_async: bool) -> None:
    def write(request: ProposalRequest, place: int) -> str:
        time.sleep(0.1)
        return "The answer is 42."

    engine = chat.scripted(write)
    lm = ETSLM(service=engine, search={**SMALL, "deadline_s": 0.05})
    for attempt in (1, 2):
        with pytest.raises(dspy.LMProviderError, match="deadline_s"):
            ask(lm, is_async)
        assert len(engine.script.requests) == attempt


# ---------------------------------------------------------------------- keys


def test_settings_made_by_one_lm_do_not_name_it_in_calls_of_another(chat: Any) -> None:
    engine = chat.answering("41", "42")
    one, other = (ETSLM(service=engine, verifier=who, search={**SMALL, "vote": "best"}) for who in (likes_41, likes_42))
    predict = dspy.Predict("question -> answer", **one.search(width=5))
    assert [predict(**QUESTION, lm=lm).answer for lm in (one, other, one)] == ["41", "42", "41"]
    assert len(engine.script.requests) == 2


class FirstWord:
    """Reads the first word of a solution."""

    def answer(self, problem: str, text: str) -> str | None:
        return text.split()[0]

    def same(self, left: str, right: str) -> bool:
        return left == right


class LastWord(FirstWord):
    def answer(self, problem: str, text: str) -> str | None:
        return text.split()[-1]


def reading(view: FirstWord, name: str | None) -> FirstWord:
    if name is not None:
        view.id = name  # type: ignore[attr-defined]
    return view


@pytest.mark.parametrize(("names", "searches"), [(("first", "last"), 2), ((None, None), 4)], ids=["named", "nameless"])
@pytest.mark.parametrize("seed", [None, 3])
def test_how_solutions_are_read_is_part_of_the_key(chat: Any, names: Any, searches: int, seed: int | None) -> None:
    texts = ["1 then 9", "2 then 9", "3 then 9", "1 then 8"]
    engine = chat.scripted(lambda request, place: texts[place])
    lm = ETSLM(service=engine, search={**SMALL, "vote": "majority"}, seed=seed)
    reasoner = ETSReasoner("question -> answer")
    views = [reading(FirstWord(), names[0]), reading(LastWord(), names[1])]
    for _ in range(2):
        for view, expected in zip(views, ("1", "9"), strict=True):
            with dspy.context(lm=lm, adapter=PlainAdapter(view=view)):
                assert reasoner(**QUESTION).answer == expected
    assert len(engine.script.requests) == searches


def test_adapters_of_one_name_in_two_modules_share_nothing(chat: Any) -> None:
    def adapter_of(module: str, place: int) -> dspy.Adapter:
        def parse(self: Any, signature: Any, completion: str) -> dict[str, Any]:
            return {"reasoning": "", "answer": completion.split()[place]}

        return type("Adapter", (dspy.ChatAdapter,), {"parse": parse, "__module__": module, "__qualname__": "Adapter"})()

    texts = ["1 then 9", "2 then 9", "3 then 9", "1 then 8"]
    engine = chat.scripted(lambda request, place: texts[place])
    lm = ETSLM(service=engine, search={**SMALL, "vote": "majority"})
    for adapter, expected in ((adapter_of("one", 0), "1"), (adapter_of("other", -1), "9")):
        with dspy.context(lm=lm, adapter=adapter):
            assert ETSReasoner("question -> answer")(**QUESTION).answer == expected
    assert len(engine.script.requests) == 2


class Signed(dspy.ChatAdapter):
    """Reads an answer, or whether it is odd."""

    def __init__(self, is_odd: bool, name: str | None) -> None:
        super().__init__()
        self.is_odd = is_odd
        if name is not None:
            self.id = name

    def parse(self, signature: Any, completion: str) -> dict[str, Any]:
        fields = super().parse(signature, completion)
        return {**fields, "answer": fields["answer"] % 2 if self.is_odd else fields["answer"]}


@pytest.mark.parametrize(("names", "searches"), [(("plain", "odd"), 2), ((None, None), 4)], ids=["named", "nameless"])
def test_adapters_of_one_class_that_read_otherwise_share_nothing(chat: Any, names: Any, searches: int) -> None:
    engine = chat.answering(40, 41, 41, 42)
    lm = ETSLM(service=engine, search={**SMALL, "vote": "majority"})
    reasoner = ETSReasoner("question -> answer: int")
    adapters = [Signed(is_odd, name) for is_odd, name in zip((False, True), names, strict=True)]
    for _ in range(2):
        for adapter, expected in zip(adapters, ([41, 40, 42], [0, 1]), strict=True):
            with dspy.context(lm=lm, adapter=adapter):
                assert reasoner(**QUESTION).completions.answer == expected
    assert len(engine.script.requests) == searches


# ---------------------------------------------------------------------- no cache, no sharing


@pytest.mark.parametrize(("is_enabled", "searches"), [(True, 1), (False, 4)])
def test_equal_calls_at_once_are_one_search_only_where_there_is_a_cache(
    chat: Any, is_enabled: bool, searches: int
) -> None:
    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=is_enabled)

    def write(request: ProposalRequest, place: int) -> str:
        time.sleep(0.05)
        return chat.marked(answer=42)

    engine = chat.scripted(write)
    lm, predict = ETSLM(service=engine, search=SMALL), dspy.Predict("question -> answer")
    with dspy.context(lm=lm):
        dspy.Parallel(num_threads=4, disable_progress_bar=True)([(predict, QUESTION)] * 4)
    assert len(engine.script.requests) == searches


def test_a_verifier_without_a_name_is_cached_by_no_door(chat: Any) -> None:
    engine, limit = chat.scripted(lambda request, place: "42"), 0.5
    lm = ETSLM(service=engine, search=SMALL, verifier=lambda problem, steps: limit)
    messages = [{"role": "user", "content": "20+22?"}]
    for searches in (1, 2):
        lm.forward(messages=messages, cache=True)
        assert len(engine.script.requests) == searches

    async def twice() -> None:
        for _ in range(2):
            await lm.aforward(messages=messages)

    asyncio.run(twice())
    assert len(engine.script.requests) == 4
