"""Which of the settings that are said counts, from the call to the LM, and which are refused where they are said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dspy
import pytest

from ets_engine.config import SearchConfig
from ets_engine.errors import ConfigError
from ets_engine.registry import register_service
from ets_integrations.dspy import ETSLM, ETSPredict, ETSReasoner

QUESTION = {"question": "What is 20+22?"}
SMALL = {"width": 4, "strategy": "best_of_n"}


def largest(args: dict[str, Any], pred: dspy.Prediction) -> float:
    return float(pred.answer)


# ---------------------------------------------------------------------- who goes first


@pytest.mark.parametrize("how", ["lm.search", "reasoner"])
def test_search_settings_of_a_call_or_a_module_go_before_the_lms_own_parameters(chat: Any, how: str) -> None:
    engine = chat.answering(42)
    lm = ETSLM(service=engine, search=SMALL, cache=False, temperature=0.7, max_tokens=500, top_p=0.9, stop=["END"])
    said = {"temperature": 0.2, "max_tokens": 77, "top_p": 0.5, "top_k": 3, "seed": 5, "stop": ["FOO"]}
    if how == "lm.search":
        module: dspy.Module = dspy.Predict("question -> answer", **lm.search(**said))
    else:
        module = ETSReasoner("question -> answer", search=SearchConfig(**said))
    module(**QUESTION, lm=lm)
    config = engine.script.requests[-1].config
    assert {name: getattr(config, name) for name in said} == {**said, "stop": ("FOO", "[[ ## completed ## ]]")}
    module(**QUESTION, lm=lm, config={"temperature": 0.4, "stop": ["BAR"]})
    config = engine.script.requests[-1].config
    assert (config.temperature, config.max_tokens, config.stop[0]) == (0.4, 77, "BAR"), "the call's own go first"


def test_a_calls_search_settings_say_everything(chat: Any) -> None:
    engine = chat.answering(42)
    lm = ETSLM(service=engine, search=SMALL, cache=False)
    reasoner = ETSReasoner("question -> answer", search={"temperature": 0.2, "width": 3})
    reasoner(**QUESTION, lm=lm, config=lm.search(vote="best"))
    config = engine.script.requests[-1].config
    assert (config.temperature, config.width, config.vote) == (1.0, 4, "best")


def test_a_seed_may_be_taken_back_for_one_call(chat: Any) -> None:
    engine = chat.answering(42)
    lm = ETSLM(service=engine, search=SMALL, cache=False).copy(seed=9)
    for _ in range(2):
        dspy.Predict("question -> answer", **lm.search(seed=None))(**QUESTION, lm=lm)
    first, second = (one.config.seed for one in engine.script.requests)
    assert first != second


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, 0.1), ({"search": {"temperature": 1.2}}, 1.2), ({"temperature": 0.3}, 0.3), ({"temperature": 0.05}, 0.05)],
)
def test_a_number_of_completions_changes_no_temperature(chat: Any, settings: Any, expected: float) -> None:
    engine = chat.answering(1, 2, 3, 4)
    with dspy.context(lm=ETSLM(service=engine, search=SMALL, temperature=0.1)):
        pred = ETSReasoner("question -> answer: int", n=3, **settings)(**QUESTION)
    assert engine.script.requests[-1].config.temperature == expected and len(pred.completions.answer) == 3


@pytest.mark.parametrize("mode", ["rerank", "search"])
def test_a_reward_chooses_among_all_answers_however_many_are_shown(chat: Any, mode: Any) -> None:
    engine = chat.answering(*range(1, 17))
    lm = ETSLM(service=engine, search={"strategy": "best_of_n"})
    reasoner = ETSReasoner("question -> answer: int", reward_fn=largest, reward=mode)
    with dspy.context(lm=lm):
        shown = reasoner(**QUESTION, config={"n": 2})
        assert (shown.completions.answer, len(shown._ets.rewards)) == ([16, 15], 2)
        for settings in ({}, lm.search(width=16), lm.search(width=12)):
            width = settings.get("metadata", {"ets": {"search": {"width": 16}}})["ets"]["search"]["width"]
            assert reasoner(**QUESTION, config=settings).answer == width
        assert len(reasoner(**QUESTION, config=lm.search(width=12, n_candidates=3)).completions.answer) == 3


# ---------------------------------------------------------------------- said in the wrong place

WRONG: dict[str, Callable[[ETSLM], Any]] = {
    "constructor": lambda lm: ETSLM(service=lm.source.find(), width=16),
    "copy": lambda lm: lm.copy(width=16),
    "call": lambda lm: lm("hello", width=16),
    "predict": lambda lm: dspy.Predict("question -> answer", width=16)(**QUESTION, lm=lm),
    "reasoner": lambda lm: ETSReasoner("question -> answer")(**QUESTION, lm=lm, config={"width": 16}),
}


@pytest.mark.parametrize("where", WRONG)
def test_a_search_setting_in_the_wrong_place_is_refused_with_the_right_one(chat: Any, where: str) -> None:
    engine = chat.answering(42)
    lm = ETSLM(service=engine)
    with pytest.raises(ConfigError, match=r"width: .*search=\{.*lm\.search\("):
        WRONG[where](lm)
    assert not engine.script.requests


def test_copies_may_search_otherwise(chat: Any) -> None:
    engine = chat.scripted(lambda request, place: "42")
    lm = ETSLM(service=engine, search=SMALL, cache=False, temperature=0.7, metadata={"run": "7"})
    copied = lm.copy(search={"width": 3, "temperature": 0.2}, rollout_id=1).copy(search=SearchConfig(vote="best"))
    for one in (copied, lm.copy(effort="medium"), lm):
        one("hello")
    configs = [request.config for request in engine.script.requests]
    assert [(one.width, one.vote, one.temperature) for one in configs] == [
        (3, "best", 0.2),
        (16, "weighted", 0.7),
        (4, "weighted", 0.7),
    ]
    assert all(one.strategy == "best_of_n" for one in configs)
    assert copied.kwargs["metadata"]["run"] == "7" and copied.search(width=2)["metadata"]["ets"]["search"]["width"] == 2
    with pytest.raises(ConfigError, match="width=0"):
        lm.copy(search={"width": 0})


COPIES: dict[str, tuple[Callable[[ETSLM], ETSLM], int]] = {
    "other metadata": (lambda lm: lm.copy(search={"width": 2}).copy(metadata={"user": "x"}), 2),
    "no metadata": (lambda lm: lm.copy(search={"width": 2}).copy(metadata=None), 2),
    "metadata of a search": (lambda lm: lm.copy(**lm.search(width=2)).copy(metadata={"user": "x"}), 2),
    "DSPy's effort": (lambda lm: lm.copy(reasoning_effort="high"), 64),
    "a later effort": (lambda lm: lm.copy(reasoning_effort="high").copy(effort="low"), 4),
    "a later width": (lambda lm: lm.copy(reasoning_effort="high").copy(search={"width": 2}), 2),
    "a width beside it": (lambda lm: lm.copy(reasoning_effort="high", search={"width": 2}), 2),
    "the same effort twice": (lambda lm: lm.copy(effort="high", reasoning_effort="high"), 64),
}


@pytest.mark.parametrize("how", COPIES)
def test_what_was_said_last_of_a_copys_width_counts(chat: Any, how: str) -> None:
    make, width = COPIES[how]
    text = chat.marked(reasoning="So.", answer=42)
    engine = chat.scripted(lambda request, place: text, name="registered")
    register_service("registered", engine)
    copied = make(ETSLM(service="registered", search=SMALL, cache=False))
    saved = dspy.BaseLM.load_state(copied.dump_state(), allow_custom_lm_class=True)
    for lm in (copied, saved):
        lm("hello")
        lm("hello", **lm.search(width=3))
        ETSReasoner("question -> answer", width=5)(**QUESTION, lm=lm)
    assert [one.config.width for one in engine.script.requests] == [width, 3, 5] * 2


def test_efforts_that_differ_are_refused_by_a_copy_too(chat: Any) -> None:
    with pytest.raises(ConfigError, match="give one"):
        ETSLM(service=chat.answering(42)).copy(effort="low", reasoning_effort="high")


def test_dspys_own_parameters_of_a_copy_go_before_its_search_settings(chat: Any) -> None:
    engine = chat.scripted(lambda request, place: "42")
    lm = ETSLM(service=engine, search=SMALL, cache=False)
    said = {"temperature": 0.9, "top_p": 0.5, "seed": 3, "stop": ["A"]}
    copied = lm.copy(**said, search={"temperature": 0.5, "top_p": 0.1, "seed": 7, "stop": ["B"], "max_tokens": 9})
    for one in (copied, copied.copy(search={"temperature": 0.2})):
        one("hello")
    first, second = (one.config for one in engine.script.requests)
    assert {name: getattr(first, name) for name in said} == {**said, "stop": ("A",)} and first.max_tokens == 9
    assert (second.temperature, second.top_p) == (0.2, 0.5)


# ---------------------------------------------------------------------- tools and saving


@pytest.mark.parametrize("module", [dspy.Predict, ETSPredict])
@pytest.mark.parametrize(("parallel", "calls"), [(None, 2), (True, 2), (False, 1)])
def test_parallel_tool_calls_may_be_refused(chat: Any, module: Any, parallel: bool | None, calls: int) -> None:
    def add(a: int, b: int) -> int:
        return a + b

    class Act(dspy.Signature):
        question: str = dspy.InputField()
        tools: list[dspy.Tool] = dspy.InputField()
        outputs: dspy.ToolCalls = dspy.OutputField()

    def write(request: Any, place: int) -> str:
        texts = [json.dumps({"name": "add", "arguments": {"a": a, "b": 2}}) for a in (1, 3)]
        return "".join(f"<tool_call>{one}</tool_call>" for one in (texts if place < 3 else texts[:1]))

    adapter = dspy.ChatAdapter(use_native_function_calling=True, parallel_tool_calls=parallel)
    lm = ETSLM(service=chat.scripted(write), search={**SMALL, "vote": "majority"})
    with dspy.context(lm=lm, adapter=adapter):
        assert len(module(Act)(tools=[dspy.Tool(add)], **QUESTION).outputs.tool_calls) == calls


def test_what_was_saved_without_a_reward_leaves_that_of_the_loader(tmp_path: Path) -> None:
    ETSReasoner("question -> answer", width=4).save(tmp_path / "plain.json")
    judged = ETSReasoner("question -> answer", reward_fn=largest, threshold=1.0, reward="search")
    judged.load(tmp_path / "plain.json")
    assert (judged.predict.settings, judged.predict.threshold, judged.predict.reward) == ({"width": 4}, 1.0, "search")
    judged.predict.threshold = 2.0
    judged.save(tmp_path / "judged.json")
    fresh = ETSReasoner("question -> answer", reward_fn=largest)
    fresh.load(tmp_path / "judged.json")
    assert (fresh.predict.threshold, fresh.predict.reward) == (2.0, "search")
    plain = ETSReasoner("question -> answer")
    plain.load(tmp_path / "judged.json")
    assert (plain.predict.threshold, plain.predict.reward) == (None, "rerank")
