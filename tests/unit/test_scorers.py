"""Verifiers that are functions: what they are called with, and that a step they cannot judge costs only its branch."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from ets_engine.config import SearchConfig, Strategy
from ets_engine.scorers import BatchScorer, CallableVerifier, EqualVerifier
from ets_engine.search import Beam, BestOfN, needs_scores, run, search
from ets_engine.testing import FakePolicy
from ets_engine.types import Step, StopReason

GOOD, BAD = Step("good", 1, StopReason.FINISHED), Step("bad", 1, StopReason.FINISHED)


class Batch:
    """A batch scorer that notes what it is asked."""

    def __init__(self, judge: Callable[[str], Any] = len) -> None:
        self.judge = judge
        self.asked: list[tuple[str, list[tuple[str, ...]]]] = []

    def score_many(self, problem: str, paths: Sequence[Sequence[str]]) -> Any:
        self.asked.append((problem, [tuple(path) for path in paths]))
        return [self.judge(path[-1]) for path in paths]


class Whole(Batch):
    """One that answers something of its own to every question."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def score_many(self, problem: str, paths: Sequence[Sequence[str]]) -> Any:
        super().score_many(problem, paths)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def test_a_function_is_asked_once_per_step_with_the_path_to_it() -> None:
    asked: list[tuple[str, tuple[str, ...]]] = []

    def judge(problem: str, steps: Sequence[str]) -> float:
        asked.append((problem, tuple(steps)))
        return 0.5

    verifier = CallableVerifier(judge, "1+1?")
    assert verifier.score([1, 2], [0, 0], ["a", "b"]) == [0.5, 0.5]
    verifier.retain([2])
    assert verifier.score([3], [2], ["c"]) == [0.5]
    assert asked == [("1+1?", ("a",)), ("1+1?", ("b",)), ("1+1?", ("b", "c"))]
    with pytest.raises(KeyError):
        verifier.score([4], [1], ["d"])  # that path was given up


def test_a_batch_scorer_is_asked_once_per_depth() -> None:
    batch = Batch(lambda text: 0.25)
    assert isinstance(batch, BatchScorer) and not isinstance(len, BatchScorer)
    config = SearchConfig(strategy="rebase", width=4, max_steps=3)
    tree = run(search(config), FakePolicy(seed=3, finish_chance=0.1), CallableVerifier(batch, "1+1?"))
    scored = [node for node in tree.nodes[1:] if node.step.stop is not StopReason.LENGTH]
    assert len(batch.asked) == len({node.depth for node in scored}) == 3
    assert [path for _, paths in batch.asked for path in paths] == [
        tuple(above.step.text for above in tree.path(node.id)[1:]) for node in scored
    ]
    assert {problem for problem, _ in batch.asked} == {"1+1?"} and {node.step_score for node in scored} == {0.25}


@pytest.mark.parametrize("answer", [[0.5], [0.5, 0.5, 0.5], [], None, 0.5, RuntimeError("the judge is away")])
def test_a_batch_that_cannot_be_read_fails_all_its_branches_and_is_logged_once(
    answer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    verifier = CallableVerifier(Whole(answer), "1+1?")
    with caplog.at_level(logging.WARNING):
        for nodes in ([1, 2], [3, 4]):
            assert all(map(math.isnan, verifier.score(nodes, [0, 0], ["a", "b"])))
    (record,) = caplog.records
    assert "the verifier function failed on 'a'" in record.getMessage()


@pytest.mark.parametrize("wrong", [None, float("nan"), "much", [1.0]])
def test_one_score_that_is_no_number_fails_one_branch(wrong: Any) -> None:
    scores = CallableVerifier(Whole([0.25, wrong, 1]), "1+1?").score([1, 2, 3], [0, 0, 0], ["a", "b", "c"])
    assert (scores[0], math.isnan(scores[1]), scores[2]) == (0.25, True, 1.0)
    scores = CallableVerifier(lambda _, steps: wrong if steps[-1] == "b" else 0.5, "1+1?").score([1, 2], [0, 0], "ab")
    assert scores[0] == 0.5 and math.isnan(scores[1])


def test_an_array_of_scores_will_do() -> None:
    assert CallableVerifier(Whole(np.array([0.25, 0.5])), "1+1?").score([1, 2], [0, 0], ["a", "b"]) == [0.25, 0.5]


def test_a_function_that_raises_fails_its_branch_and_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    def judge(problem: str, steps: Sequence[str]) -> float:
        if steps[-1] != "good":
            raise ZeroDivisionError(steps[-1])
        return 1.0

    policy = FakePolicy(script=[[GOOD, BAD, BAD]])
    with caplog.at_level(logging.WARNING):
        tree = run(search(SearchConfig(strategy="best_of_n", width=3)), policy, CallableVerifier(judge, "1+1?"))
    assert [node.step.stop for node in tree.nodes[1:]] == [StopReason.FINISHED, StopReason.ERROR, StopReason.ERROR]
    assert tree[2].step.error == "the verifier could not score it"
    (record,) = caplog.records
    assert "ZeroDivisionError('bad')" in record.getMessage()


def test_an_interrupt_is_no_failed_branch() -> None:
    def judge(problem: str, steps: Sequence[str]) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        CallableVerifier(judge, "1+1?").score([1], [0], ["a"])


def test_equal_scores_hold_nothing() -> None:
    verifier = EqualVerifier()
    assert verifier.score([1, 2], [0, 0], ["a", "b"]) == [1.0, 1.0]
    verifier.retain([1])
    verifier.drop()
    verifier.close()
    assert verifier.score([3], [2], ["c"]) == [1.0]


@pytest.mark.parametrize(
    ("strategy", "changes", "expected"),
    [
        ("greedy", {"width": 16}, False),
        ("ets", {"width": 1}, False),
        ("best_of_n", {"vote": "majority"}, False),
        ("best_of_n", {"vote": "weighted"}, True),
        ("best_of_n", {"vote": "best"}, True),
        ("beam", {"vote": "majority"}, True),
        ("ets", {"vote": "majority"}, True),
    ],
)
def test_which_searches_need_scores(strategy: Strategy, changes: dict[str, Any], expected: bool) -> None:
    config = SearchConfig(strategy=strategy, **changes)
    assert needs_scores(config) is expected
    assert needs_scores(config, Beam(2)) and needs_scores(config, BestOfN()), "a caller's own selector may use them"


@pytest.mark.parametrize("seed", range(5))
def test_what_needs_no_scores_is_the_same_whatever_they_are(seed: int) -> None:
    for config in (
        SearchConfig(strategy="best_of_n", vote="majority", width=6, max_steps=6),
        SearchConfig(strategy="ets", width=1),
        SearchConfig(strategy="greedy"),
    ):
        texts = [
            [node.step.text for node in run(search(config), FakePolicy(seed=seed), verifier).nodes]
            for verifier in (EqualVerifier(), CallableVerifier(lambda _, steps: len(steps[-1]) % 7 / 7, ""))
        ]
        assert texts[0] == texts[1] and len(texts[0]) > 1
