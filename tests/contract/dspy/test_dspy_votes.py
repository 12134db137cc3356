"""What counts as an answer, and which answers are one vote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import dspy
import pytest
from dspy.utils import DummyLM

from ets_integrations.dspy import ETSLM, ETSReasoner
from ets_integrations.dspy.engine import _say_once
from ets_integrations.dspy.view import to_answer

QUESTION = {"question": "What is 20+22?"}
SMALL = {"width": 4, "strategy": "best_of_n", "vote": "majority"}


def test_nothing_is_an_answer_where_the_type_allows_it(chat: Any) -> None:
    with dspy.context(lm=ETSLM(service=chat.answering("None", "None", "5", "None"))):
        pred = ETSReasoner("question -> answer: Optional[int]", **SMALL)(**QUESTION)
    assert pred.completions.answer == [None, 5]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("Optional[int]", None), ("int | None", None), ("int", 5), ("Literal[5, None]", None), ("Literal[5, 'None']", 5)],
)
def test_a_json_null_is_an_answer_where_the_type_allows_it(chat: Any, kind: str, expected: int | None) -> None:
    engine = chat.scripted(lambda request, place: json.dumps({"answer": None if place < 3 else 5}))
    with dspy.context(lm=ETSLM(service=engine, search=SMALL), adapter=dspy.JSONAdapter()):
        assert dspy.Predict(f"question -> answer: {kind}")(**QUESTION).answer == expected


def test_equal_sets_are_one_vote_whatever_their_order(chat: Any) -> None:
    engine = chat.answering('["b", "a", "c"]', '["d"]', '["c", "b", "a"]', '["a", "c", "b"]')
    with dspy.context(lm=ETSLM(service=engine)):
        pred = ETSReasoner("question -> answer: set[str]", **SMALL)(**QUESTION)
    assert pred.answer == {"a", "b", "c"} and [one.votes for one in pred._ets.candidates] == [3, 1]


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ({"x": set(map(int, "1 9 17".split()))}, {"x": set(map(int, "17 9 1".split()))}),
        ({"b": 1, "a": 2}, {"a": 2, "b": 1}),
        ({(1, 2): 3, "a": 4}, {"a": 4, (1, 2): 3}),
        ([frozenset({"a", "b", "c"})], [frozenset({"c", "b", "a"})]),
    ],
)
def test_equal_values_are_the_same_answer(left: Any, right: Any) -> None:
    assert left == right and to_answer(left) == to_answer(right)


def test_different_values_are_different_answers() -> None:
    values = [None, "", 0, False, 1.5, [], {}, [1, 2], [2, 1], {"a": 1}, {"a": "1"}]
    answers = [to_answer(value) for value in values]
    assert len(set(answers)) == len(answers) and to_answer("") is None


# ---------------------------------------------------------------------- a whole program, through other adapters


def tagged(reasoning: str, answer: str) -> str:
    return f"<reasoning>\n{reasoning}\n</reasoning>\n\n<answer>\n{answer}\n</answer>"


def test_words_in_xml_vote(chat: Any) -> None:
    said = ("Rome", "Paris", " paris ", "Paris")
    texts = [tagged(f"Way {place}.", said[place]) if place else "<answer>Rome</answer>" for place in range(4)]
    lm = ETSLM(service=chat.scripted(lambda request, place: texts[place]), search=SMALL)
    with dspy.context(lm=lm, adapter=dspy.XMLAdapter()):
        assert dspy.ChainOfThought("question -> answer")(question="Where?").answer.casefold() == "paris"
    (candidate,) = lm.history[-1]["response"].provider_data["ets"]["candidates"]
    assert candidate["votes"] == 3


def test_nested_xml_votes_by_its_values(chat: Any) -> None:
    items = ("<item>1 2</item>", "<item>1</item><item>2</item>", "\n<item>1</item>\n<item>2</item>\n", "a < b")
    texts = [f"<answer>{one}</answer>" for one in items]
    lm = ETSLM(service=chat.scripted(lambda request, place: texts[place]), search=SMALL)
    with dspy.context(lm=lm, adapter=dspy.XMLAdapter()):
        assert dspy.Predict("question -> answer: list[str]")(**QUESTION).answer == ["1", "2"]
    assert [one["votes"] for one in lm.history[-1]["response"].provider_data["ets"]["candidates"]] == [2, 1]


def test_text_around_xml_elements_counts(chat: Any) -> None:
    items = ["x<sup>2</sup>", "y<sup>2</sup>", "<b />y<sup>2</sup> + 1", "y<sup>2</sup>"]
    lm = ETSLM(service=chat.scripted(lambda request, place: f"<answer>\n{items[place]}\n</answer>"), search=SMALL)
    with dspy.context(lm=lm, adapter=dspy.XMLAdapter()):
        assert dspy.Predict("question -> answer")(**QUESTION).answer.strip() == "y<sup>2</sup>"
    candidates = lm.history[-1]["response"].provider_data["ets"]["candidates"]
    assert [(one["answer"], one["votes"]) for one in candidates] == [(items[1], 2), (items[0], 1), (items[2], 1)]


def test_entries_of_an_xml_mapping_are_told_apart_by_their_keys(chat: Any) -> None:
    keys = ["a-1", "b-1", "b-1", "b-1"]
    texts = [f'<answer><entry key="{one}">7</entry></answer>' for one in keys]
    lm = ETSLM(service=chat.scripted(lambda request, place: texts[place]), search=SMALL)
    with dspy.context(lm=lm, adapter=dspy.XMLAdapter()):
        assert dspy.Predict("question -> answer: dict[str, int]")(**QUESTION).answer == {"b-1": 7}


@pytest.mark.parametrize(
    ("kind", "expected"), [("list[str]", []), ("Optional[list[str]]", None), ("str", "<item>7</item>")]
)
def test_an_xml_element_without_content_is_an_answer_where_a_list_is_asked(chat: Any, kind: str, expected: Any) -> None:
    texts = ["<answer><item>7</item></answer>", "<answer />", "<answer></answer>", "<answer>\n</answer>"]
    lm = ETSLM(service=chat.scripted(lambda request, place: texts[place]), search=SMALL)
    with dspy.context(lm=lm, adapter=dspy.XMLAdapter()):
        assert dspy.Predict(f"question -> answer: {kind}")(**QUESTION).answer == expected
    votes = [one["votes"] for one in lm.history[-1]["response"].provider_data["ets"]["candidates"]]
    assert votes == ([3, 1] if kind != "str" else [1])


@pytest.mark.parametrize("whose", ["the LM's", "the service's own", "a step reward"])
def test_no_judge_reads_xml_markup(chat: Any, whose: str) -> None:
    seen: list[tuple[Any, str]] = []

    def watching(problem: Any, steps: Sequence[str]) -> float:
        seen.append((problem, "".join(steps)))
        return 0.5

    question, text = "Is a < b & b<c>?", tagged("So <b>it</b> is.\n\nYes.", "yes")
    own = {"verifier": watching} if whose == "the service's own" else {}
    lm = ETSLM(
        service=chat.scripted(lambda request, place: text, **own),
        search=SMALL,
        verifier=watching if whose == "the LM's" else None,
    )
    with dspy.context(lm=lm, adapter=dspy.XMLAdapter()):
        if whose == "a step reward":
            ETSReasoner("question -> answer", step_reward_fn=watching)(question=question)
        else:
            dspy.ChainOfThought("question -> answer")(question=question)
    assert {str(problem) for problem, _ in seen} == {str({"question": question}) if "step" in whose else question}
    assert {text.split()[-1] for _, text in seen} == {"is.", "Yes.", "yes"}
    assert not any("reasoning>" in text or "answer>" in text for _, text in seen) and "<b>it</b>" in seen[0][1]


def test_where_no_text_states_an_answer_that_is_said_once(chat: Any, caplog: pytest.LogCaptureFixture) -> None:
    _say_once.cache_clear()
    extractor = DummyLM([{"answer": "Paris"}] * 4, adapter=dspy.ChatAdapter())
    lm = ETSLM(service=chat.scripted(lambda request, place: "It is Paris, surely", name="wordy"), search=SMALL)
    with dspy.context(lm=lm, adapter=dspy.TwoStepAdapter(extractor)):
        for question in ("Where?", "Where again?"):
            assert dspy.Predict("question -> answer")(question=question).answer == "Paris"
    assert caplog.text.count("nobody voted") == 1 and "XMLAdapter" in caplog.text


@pytest.mark.parametrize(("text", "width"), [("The answer is 42.", 4), ("It is Paris, surely", 1)])
def test_where_nobody_had_to_vote_or_all_could_nothing_is_said(
    chat: Any, caplog: pytest.LogCaptureFixture, text: str, width: int
) -> None:
    lm = ETSLM(service=chat.scripted(lambda request, place: text, name="terse"), search={**SMALL, "width": width})
    assert lm("20+22?") == [text] and "nobody voted" not in caplog.text
