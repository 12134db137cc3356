"""From trajectories to answers: votes, ties, abstentions."""

import pytest

from ets_engine.search import SearchTree, Trajectory, rank_answers, reduce_scores, trajectories
from ets_engine.types import ScoredStep, Step, StopReason


def paths(*scores: float) -> list[Trajectory]:
    return [
        Trajectory(leaf, f"t{leaf}", score, 1, (ScoredStep(text=f"t{leaf}", score=score, num_tokens=1),))
        for leaf, score in enumerate(scores)
    ]


def ranked(scores, answers, vote, same=str.__eq__) -> list[str]:
    return [candidate.answer for candidate in rank_answers(paths(*scores), answers, same, vote)]


def test_reductions():
    scores = [0.5, 0.25, 1.0]
    assert reduce_scores(scores, "last") == 1.0
    assert reduce_scores(scores, "min") == 0.25
    assert reduce_scores(scores, "prod") == 0.125
    assert reduce_scores(scores, "mean") == 1.75 / 3
    assert reduce_scores([1.0] * 49, "mean") == 1.0
    with pytest.raises(ValueError, match="empty"):
        reduce_scores([], "last")


@pytest.mark.parametrize(
    ("vote", "order"), [("best", ["7", "8", "9"]), ("majority", ["9", "8", "7"]), ("weighted", ["8", "7", "9"])]
)
def test_votes(vote, order):
    # 7: one at 0.9; 8: two, 1.3 in all; 9: three, 0.6 in all.
    assert ranked([0.9, 0.8, 0.5, 0.2, 0.2, 0.2], ["7", "8", "8", "9", "9", "9"], vote) == order


@pytest.mark.parametrize(
    ("vote", "scores", "answers", "first"),
    [
        ("majority", [0.6, 0.3, 0.5, 0.5], ["a", "a", "b", "b"], "b"),  # equal votes: higher weight
        ("majority", [0.5, 0.5, 0.75, 0.25], ["a", "a", "b", "b"], "b"),  # equal weight: higher best score
        ("weighted", [0.5, 0.5, 0.75, 0.25], ["a", "a", "b", "b"], "b"),
        ("best", [0.5, 0.5, 0.1], ["a", "b", "b"], "b"),  # equal best score: higher weight
        ("weighted", [0.0, 0.0, 0.0], ["a", "b", "b"], "b"),  # equal weight: more votes
        ("best", [0.0, 0.0, 0.0], ["a", "b", "b"], "b"),
        ("weighted", [0.5, 0.5], ["a", "b"], "a"),  # equal in all: the earliest
        ("best", [0.5, 0.5], ["b", "a"], "b"),
    ],
)
def test_ties(vote, scores, answers, first):
    assert ranked(scores, answers, vote)[0] == first


def test_unparsed_answers_abstain():
    assert ranked([0.9, 0.9, 0.1], [None, None, "7"], "majority") == ["7"]
    assert ranked([0.9], [None], "weighted") == []
    assert ranked([], [], "weighted") == []


def test_classes_by_sameness_and_the_best_spelling():
    (candidate,) = rank_answers(paths(0.4, 0.9, 0.5), ["0.5", "1/2", "0.50"], lambda left, right: True, "weighted")
    assert (candidate.answer, candidate.votes, candidate.score) == ("1/2", 3, 0.9)
    assert candidate.weight == pytest.approx(1.8)
    assert candidate.steps[0].text == "t1"


def test_every_trajectory_votes_once_where_sameness_is_not_transitive():
    # 1 ~ 2 and 2 ~ 3, but not 1 ~ 3: 2 joins the first class it matches, 3 matches that class's first answer no more.
    candidates = rank_answers(paths(0.5, 0.5, 0.5), ["1", "2", "3"], lambda a, b: abs(int(a) - int(b)) <= 1, "majority")
    assert [candidate.votes for candidate in candidates] == [2, 1]


def test_each_spelling_is_compared_once():
    compared = []
    rank_answers(paths(*[0.5] * 50), ["a", "b"] * 25, lambda a, b: compared.append((a, b)) is not None, "best")
    assert compared == [("a", "b")]


def test_trajectories_are_the_finished_paths():
    tree = SearchTree(prompt_tokens=5)
    tree.grow([1, 2], [0, 0], [Step("x ", 2), Step("no", 1, StopReason.FINISHED)], [0.5, 0.25])
    tree.grow([3, 4], [1, 1], [Step("yes", 3, StopReason.FINISHED), Step("", 0, StopReason.ERROR)], [0.75, 0.0])
    short, long = trajectories(tree, "min")
    assert (short.leaf, short.text, short.score, short.num_tokens) == (2, "no", 0.25, 1)
    assert (long.leaf, long.text, long.score, long.num_tokens) == (3, "x yes", 0.5, 5)
    assert [step.score for step in long.steps] == [0.5, 0.75]
