"""What counts as an answer, and which answers are one vote."""

from __future__ import annotations

import json
from typing import Any

import dspy
import pytest

from ets_integrations.dspy import ETSLM, ETSReasoner
from ets_integrations.dspy.view import to_answer

QUESTION = {"question": "What is 20+22?"}
SMALL = {"width": 4, "strategy": "best_of_n", "vote": "majority"}


def test_nothing_is_an_answer_where_the_type_allows_it(chat: Any) -> None:
    with dspy.context(lm=ETSLM(service=chat.answering("None", "None", "5", "None"))):
        pred = ETSReasoner("question -> answer: Optional[int]", **SMALL)(**QUESTION)
    assert pred.completions.answer == [None, 5]


@pytest.mark.parametrize(("kind", "expected"), [("Optional[int]", None), ("int | None", None), ("int", 5)])
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
