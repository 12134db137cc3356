"""What a user's functions judge: each answer by itself, and what they ask on the way changes no other answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import dspy
import pytest

from ets_integrations.dspy import ETSLM, ETSReasoner, PlainAdapter

QUESTION = {"question": "What is 20+22?"}
SMALL = {"width": 4, "strategy": "best_of_n"}


class Judge:
    """A verifier that raises on one answer; it judges path by path, or all of them in one call."""

    def __call__(self, problem: str, steps: Sequence[str]) -> float:
        if "2" in "".join(steps):
            raise ValueError("no opinion on 2")
        return 0.5


class JudgeOfMany(Judge):
    def score_many(self, problem: str, paths: Sequence[Sequence[str]]) -> Sequence[float]:
        return [self(problem, path) for path in paths]


def test_a_verifier_that_raises_on_one_answer_loses_that_one(chat: Any, caplog: pytest.LogCaptureFixture) -> None:
    lm = ETSLM(service=chat.answering(1, 2, 3, 4), search=SMALL, verifier=Judge())
    with dspy.context(lm=lm):
        pred = ETSReasoner("question -> answer: int")(**QUESTION)
    assert (sorted(pred.completions.answer), pred._ets.num_errors) == ([1, 3, 4], 1)
    assert "no opinion on 2" in caplog.text


def test_a_verifier_of_many_is_asked_once_for_all(chat: Any) -> None:
    lm = ETSLM(service=chat.answering(1, 2, 3, 4), search=SMALL, verifier=JudgeOfMany())
    with dspy.context(lm=lm), pytest.raises(dspy.LMProviderError, match="all 4 branches failed"):
        ETSReasoner("question -> answer: int")(**QUESTION)


class LastWord:
    """Reads answers of one question only, as a view of a problem family does."""

    def answer(self, problem: str, text: str) -> str | None:
        return text.split()[-1] if problem == QUESTION["question"] else None

    def same(self, left: str, right: str) -> bool:
        return left == right


@pytest.mark.parametrize("mode", ["rerank", "search"])
@pytest.mark.parametrize("whose", ["reward", "step reward"])
def test_a_reward_may_ask_another_question_in_the_same_format(chat: Any, mode: Any, whose: str) -> None:
    engine = chat.scripted(lambda request, place: f"It is {place + 1}")
    judge = ETSLM(service=chat.scripted(lambda request, place: "The answer is 1.", name="judge"), search=SMALL)
    ask = dspy.Predict("question -> answer")

    def asks(*args: Any) -> float:
        with dspy.context(lm=judge, adapter=PlainAdapter()):
            ask(question=f"Is it right? {args}")
        return 0.5

    def reward(args: dict[str, Any], pred: dspy.Prediction) -> float:
        if whose == "reward":
            asks(pred.answer)
        return pred.answer / 10

    steps = {"step_reward_fn": asks} if whose == "step reward" else {}
    with dspy.context(lm=ETSLM(service=engine), adapter=PlainAdapter(view=LastWord())):
        pred = ETSReasoner("question -> answer: int", **SMALL, reward_fn=reward, reward=mode, **steps)(**QUESTION)
    assert (pred.completions.answer, pred._ets.rewards) == ([4, 3, 2, 1], (0.4, 0.3, 0.2, 0.1))


def test_a_step_reward_judges_where_an_input_has_a_type_of_its_own(chat: Any) -> None:
    class Note(dspy.Type):
        content: str

        def format(self) -> list[dict[str, Any]]:
            return [{"type": "text", "text": self.content}]

    reasoner = ETSReasoner("question, note -> answer: int", step_reward_fn=lambda args, steps: 0.5, **SMALL)
    reasoner.predict.signature = reasoner.predict.signature.with_updated_fields("note", type_=Note)
    with dspy.context(lm=ETSLM(service=chat.answering(42))):
        assert reasoner(**QUESTION, note=Note(content="Add them.")).answer == 42
