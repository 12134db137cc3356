"""An ETSReasoner on an LM that cannot search: how often that is asked, and with what."""

from __future__ import annotations

from typing import Any

import dspy
import pytest
from dspy import lm15

from ets_integrations.dspy import ETSReasoner

QUESTION = {"question": "What is 20+22?"}


class Counting:
    """An engine whose answers count up."""

    def __init__(self, chat: Any) -> None:
        self.requests: list[lm15.Request] = []
        self._chat = chat

    def complete(self, request: lm15.Request) -> lm15.Response:
        self.requests.append(request)
        said = self._chat.marked(reasoning="So it is.", answer=len(self.requests))
        return lm15.Response(None, request.model, lm15.Message.assistant(said), "stop", lm15.Usage())


@pytest.mark.parametrize(
    ("of_lm", "settings", "expected"),
    [
        ({}, {}, 1.0),
        ({"temperature": 0.3}, {}, 0.3),
        ({"temperature": 0.3}, {"search": {"temperature": 0.6}}, 0.6),
        ({"temperature": 0.3}, {"temperature": 0.1}, 0.1),
        ({"temperature": 0.3}, {"search": {"temperature": 0.6}, "temperature": 0.2}, 0.2),
        ({}, {"n": 3}, 1.0),
    ],
)
def test_a_temperature_that_is_said_is_kept(
    chat: Any, of_lm: dict[str, Any], settings: dict[str, Any], expected: float
) -> None:
    engine = Counting(chat)
    with dspy.context(lm=dspy.LM("some/model", engine=engine, **of_lm)):
        ETSReasoner("question -> answer: int", n_candidates=2, **settings)(**QUESTION)
    assert [one.config.temperature for one in engine.requests] == [expected] * 2


@pytest.mark.parametrize(
    ("settings", "requests"),
    [
        ({}, 8),
        ({"n": 3}, 8),
        ({"width": 4}, 4),
        ({"effort": "low"}, 4),
        ({"width": 16, "n_candidates": 3}, 3),
        ({"temperature": 0.0}, 1),
    ],
)
def test_one_request_per_sample(chat: Any, settings: dict[str, Any], requests: int) -> None:
    engine = Counting(chat)
    with dspy.context(lm=dspy.LM("some/model", engine=engine)):
        ETSReasoner("question -> answer: int", **settings)(**QUESTION)
    assert len(engine.requests) == requests


def test_every_attempt_of_best_of_n_has_samples_of_its_own(chat: Any) -> None:
    engine = Counting(chat)
    attempts = dspy.BestOfN(
        ETSReasoner("question -> answer: int", n_candidates=4), N=3, reward_fn=lambda args, pred: 0.0, threshold=1.0
    )
    with dspy.context(lm=dspy.LM("some/model", engine=engine)):
        attempts(**QUESTION)
        assert len(engine.requests) == 12
        attempts(**QUESTION)
    assert len(engine.requests) == 12, "asked again, they are found in the cache"
