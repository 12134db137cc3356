"""Verifiers that are functions, alone and combined: what they are asked, and that a failure costs only its branch."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from ets_engine.config import SearchConfig, Strategy
from ets_engine.errors import ConfigError, ProtocolError
from ets_engine.scorers import (
    BatchScorer,
    CallableVerifier,
    Ensemble,
    EqualVerifier,
    EvidenceScorer,
    OutcomeScorer,
    StepEvidence,
    StepScorer,
)
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


# ---------------------------------------------------------------------- combined


def says(score: float) -> StepScorer:
    return lambda problem, steps: score


@pytest.mark.parametrize(
    ("scores", "options", "expected"),
    [
        ((0.2, 0.8), {}, 0.5),
        ((0.2, 0.8), {"weights": (3, 1)}, 0.35),
        ((0.2, 0.8), {"weights": (0, 0.5)}, 0.8),
        ((0.2, 0.8, 0.5), {"combine": "min"}, 0.2),
        ((0.2, 0.8, 0.5), {"combine": "prod"}, 0.08),
        ((1.0,) * 10, {"weights": (0.1,) * 10}, 1.0),
        ((0.3,), {"combine": "prod"}, 0.3),
    ],
)
def test_an_ensemble_by_hand(scores: tuple[float, ...], options: dict[str, Any], expected: float) -> None:
    (found,) = Ensemble(*map(says, scores), **options).score_many("1+1?", [["a"]])
    assert found == pytest.approx(expected) and found <= 1.0


def test_an_ensemble_asks_batch_scorers_once_and_functions_per_step() -> None:
    batch = Batch(lambda text: len(text) / 10)
    asked: list[Sequence[str]] = []

    def judge(problem: str, steps: Sequence[str]) -> float:
        asked.append(steps)
        return 1.0

    paths = [["a"], ["a", "bbb"], ["cc"]]
    assert Ensemble(batch, judge, combine="min").score_many("1+1?", paths) == [0.1, 0.3, 0.2]
    assert batch.asked == [("1+1?", [("a",), ("a", "bbb"), ("cc",)])] and asked == paths


@pytest.mark.parametrize("combine", ["mean", "min", "prod"])
@pytest.mark.parametrize("place", [0, 1])
def test_who_is_not_judged_by_all_is_not_judged(combine: Any, place: int, caplog: pytest.LogCaptureFixture) -> None:
    def judge(problem: str, steps: Sequence[str]) -> float:
        if steps[-1] == "bad":
            raise ZeroDivisionError(steps[-1])
        return math.nan if steps[-1] == "unknown" else 0.5

    scorers = [judge, says(0.5)]
    ensemble = Ensemble(scorers[place], scorers[1 - place], combine=combine)
    with caplog.at_level(logging.WARNING):
        scores = ensemble.score_many("1+1?", [["good"], ["bad"], ["unknown"], ["bad"]])
    assert [math.isnan(score) for score in scores] == [False, True, True, True]
    (record,) = caplog.records
    assert record.getMessage() == "a scorer failed on 2 of 4 steps, first on 'bad': ZeroDivisionError('bad')"


def test_a_scorer_that_is_away_fails_all_steps_of_an_ensemble(caplog: pytest.LogCaptureFixture) -> None:
    away = Whole(RuntimeError("the judge is away"))
    assert all(map(math.isnan, Ensemble(says(0.5), away).score_many("1+1?", [["a"], ["b"]])))
    assert "the judge is away" in caplog.records[0].getMessage()


def test_a_score_out_of_range_is_not_hidden_in_a_mean() -> None:
    verifier = CallableVerifier(Ensemble(says(1.5), says(0.1)), "1+1?")
    with pytest.raises(ProtocolError, match=r"1\.5 .* scores lie in"):
        run(search(SearchConfig(strategy="rebase", width=2)), FakePolicy(), verifier)


def test_an_ensemble_in_a_search_equals_its_only_member() -> None:
    config = SearchConfig(strategy="rebase", width=6)

    def judge(problem: str, steps: Sequence[str]) -> float:
        return len("".join(steps)) % 7 / 7

    trees = [
        run(search(config), FakePolicy(seed=5), CallableVerifier(scorer, "1+1?")).nodes
        for scorer in (judge, Ensemble(judge), Ensemble(judge, Ensemble(judge, judge, combine="min")))
    ]
    assert trees[0] == trees[1] == trees[2] and len(trees[0]) > 6


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (0, {}, r"scorers=\(\): an ensemble needs at least one"),
        (2, {"combine": "max"}, "combine='max': use one of mean, min, prod"),
        (2, {"weights": (1,)}, "one finite weight >= 0 per scorer"),
        (2, {"weights": (1, -1)}, "one finite weight >= 0 per scorer"),
        (2, {"weights": (1, math.inf)}, "one finite weight >= 0 per scorer"),
        (2, {"weights": (0, 0)}, "not all 0"),
        (2, {"weights": (1, 1), "combine": "min"}, "combine='mean' takes"),
    ],
)
def test_ensembles_that_make_no_sense_are_refused(count: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Ensemble(*[says(0.5)] * count, **options)


def test_an_outcome_scorer_is_asked_about_finished_solutions_only() -> None:
    batch = Batch(lambda text: 0.25)
    scorer = OutcomeScorer(batch, lambda text: text.endswith("so 4."), neutral=0.75)
    paths = [["add"], ["add ", "so 4."], ["add ", "so"], ["so ", "4."]]
    assert scorer.score_many("2+2?", paths) == [0.75, 0.25, 0.75, 0.25]
    assert batch.asked == [("2+2?", [("add ", "so 4."), ("so ", "4.")])], "the whole text decides"
    assert OutcomeScorer(batch, lambda text: False).score_many("2+2?", paths) == [0.5] * 4
    assert len(batch.asked) == 1


def test_an_outcome_scorer_that_fails_costs_the_finished_branch(caplog: pytest.LogCaptureFixture) -> None:
    scorer = OutcomeScorer(Whole(RuntimeError("no sandbox")), lambda text: text == "done")
    unfinished, finished = scorer.score_many("2+2?", [["add"], ["done"]])
    assert unfinished == 0.5 and math.isnan(finished)
    assert "no sandbox" in caplog.records[0].getMessage()


@pytest.mark.parametrize("neutral", [-0.1, 1.1, math.nan])
def test_a_neutral_score_out_of_range_is_refused(neutral: float) -> None:
    with pytest.raises(ConfigError, match=r"neutral=.*: scores lie in \[0, 1\]"):
        OutcomeScorer(says(0.5), bool, neutral=neutral)


def test_what_reads_evidence_is_refused_where_there_is_only_text() -> None:
    class Sure:
        needs_certainty = False

        def score_evidence(self, paths: Sequence[Sequence[StepEvidence]]) -> list[float]:
            return [1.0] * len(paths)

    assert isinstance(Sure(), EvidenceScorer) and not isinstance(says(0.5), EvidenceScorer)
    check_refused(Sure(), "reads what the policy computes as it writes, not text")


def test_what_is_no_scorer_is_refused() -> None:
    check_refused("logprob", "verifier='logprob' is no function of problem and steps, and has no score_many")


def check_refused(scorer: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CallableVerifier(scorer, "1+1?")
    with pytest.raises(ConfigError, match=message):
        Ensemble(says(0.5), scorer)
    with pytest.raises(ConfigError, match=message):
        OutcomeScorer(scorer, bool)


def test_a_wrong_number_of_scores_is_said_with_both_numbers(caplog: pytest.LogCaptureFixture) -> None:
    class Short:
        def score_many(self, problem: str, paths: Sequence[Sequence[str]]) -> list[float]:
            return [0.5]

    assert all(map(math.isnan, CallableVerifier(Short(), "?").score([1, 2], [0, 0], ["a", "b"])))
    assert "returned 1 scores for 2 steps; return one each" in caplog.text
