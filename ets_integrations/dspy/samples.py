"""Answers of an LM that cannot search: whole samples, told apart by their last field; no KV is shared."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import dspy
from dspy.utils.exceptions import AdapterParseError

from ets_engine.config import SearchConfig
from ets_integrations.dspy.plan import Plan
from ets_integrations.dspy.view import to_answer

_PER_SAMPLE = ("temperature", "rollout_id")
_COUNTS = ("n", "num_generations")  # of completions, not of samples
_LOGGER = logging.getLogger(__name__)


def _samples(plan: Plan) -> Iterator[tuple[Any, dict[str, Any]]]:
    """LMs that give one sample each, and what they are asked with; calls of other rollout ids get other samples."""
    _say_once(plan.lm.model)
    settings = plan.predict.settings
    count = settings.get("n_candidates") or settings.get("width") or SearchConfig().n_candidates
    asked = {"temperature": 1.0, **_given(getattr(plan.lm, "kwargs", {})), **_given(settings), **_given(plan.config)}
    start = count * asked.get("rollout_id", 0)
    rollouts = range(start, start + count) if asked["temperature"] else [None]  # at 0 all samples are the same
    config = {name: value for name, value in plan.config.items() if name not in (*_PER_SAMPLE, *_COUNTS)}
    for rollout_id in rollouts:
        yield plan.lm.copy(rollout_id=rollout_id, temperature=asked["temperature"], n=None), dict(config)


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What is said of a single sample."""
    return {name: settings[name] for name in _PER_SAMPLE if settings.get(name) is not None}


def sample(plan: Plan) -> tuple[list[str], list[dict[str, Any]], None]:
    """Answers of an LM that cannot search, most frequent first.

    Raises:
        AdapterParseError: None parses.
    """
    ballot = _Ballot(plan)
    for lm, config in _samples(plan):
        with ballot.vote() as values, dspy.context(send_stream=None):
            values += plan.adapter(lm, config, plan.signature, plan.demos, plan.inputs)
        if ballot.is_decided:
            break
    return ballot.count()


async def asample(plan: Plan) -> tuple[list[str], list[dict[str, Any]], None]:
    """As `sample`.

    Raises:
        AdapterParseError: None parses.
    """
    ballot = _Ballot(plan)
    for lm, config in _samples(plan):
        with ballot.vote() as values, dspy.context(send_stream=None):
            values += await plan.adapter.acall(lm, config, plan.signature, plan.demos, plan.inputs)
        if ballot.is_decided:
            break
    return ballot.count()


class _Ballot:
    """Samples of one question, told apart by their last field."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._values: dict[str, dict[str, Any]] = {}
        self._votes: Counter[str] = Counter()
        self._first: AdapterParseError | None = None
        self.is_decided = False
        if plan.rewards is not None:
            plan.rewards.parse = self._prediction

    @contextmanager
    def vote(self) -> Iterator[list[dict[str, Any]]]:
        values: list[dict[str, Any]] = []
        try:
            yield values
        except AdapterParseError as error:
            self._first = self._first or error
        for value in values:
            answer = to_answer(list(value.values())[-1]) or ""
            self._values.setdefault(answer, value)
            self._votes[answer] += 1
            rewards = self._plan.rewards
            self.is_decided = rewards is not None and rewards.is_enough(rewards.of(answer))

    def count(self) -> tuple[list[str], list[dict[str, Any]], None]:
        if not self._values:
            raise self._first or AssertionError("there was one sample at least")
        answers = [answer for answer, _ in self._votes.most_common()]
        return answers, [self._values[answer] for answer in answers], None

    def _prediction(self, answer: str) -> dspy.Prediction:
        return dspy.Prediction.from_completions([self._values[answer]], signature=self._plan.signature)


@cache
def _say_once(model: str) -> None:
    _LOGGER.warning(
        "%s is no ETSLM: its answers are the best of several whole samples, one request each, and share no KV cache",
        model,
    )
