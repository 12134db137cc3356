"""Splits of a width that a reader can check by hand."""

import pytest

from ets_engine.search.allocate import (
    best_per_group,
    ceil_shares,
    even_shares,
    floor_one_shares,
    largest_remainder_shares,
    scatter,
    softmax,
)


@pytest.mark.parametrize(
    ("scores", "width", "shares"),
    [
        ([0.5], 7, (7,)),  # one leaf takes all
        ([0.5, 0.5, 0.5], 3, (1, 1, 1)),  # quotas that are whole numbers are not rounded up by float noise
        ([0.5] * 7, 7, (1,) * 7),
        ([0.5, 0.5], 3, (2, 1)),  # of equals the earlier gets more
        ([0.5, 0.5, 0.5], 2, (1, 1, 0)),
        ([0.9, 0.1, 0.9], 4, (2, 0, 2)),
        ([0.1, 0.9], 0, (0, 0)),  # no width, no children
    ],
)
def test_ceil_rule(scores, width, shares):
    assert ceil_shares(scores, width, temperature=0.2) == shares


@pytest.mark.parametrize("top", [0.5, 0.5 + 1e-12])
def test_ceil_rule_is_monotone_where_quotas_are_almost_whole(top):
    # The first quota exceeds 1 by less than the rounding, the second, of what is then left, by more.
    assert ceil_shares([top, 0.5, 0.5 - 5e-10], 3, temperature=0.2) == (1, 1, 1)


def test_ceil_rule_survives_weights_that_underflow():
    assert ceil_shares([1.0, 0.0, 0.0], 5, temperature=1e-4) == (5, 0, 0)


@pytest.mark.parametrize(
    ("scores", "width", "shares"),
    [
        ([0.9, 0.1, 0.9], 3, (1, 1, 1)),  # no more than the floor
        ([0.9, 0.1, 0.9], 5, (2, 1, 2)),
        ([0.9, 0.1], 10, (9, 1)),  # 8 * (0.982, 0.018) = 7.86, 0.14
        ([0.2, 0.2], 3, (2, 1)),  # of equals the earlier gets the remainder
    ],
)
def test_floor_one_rule(scores, width, shares):
    assert floor_one_shares(scores, width, temperature=0.2) == shares


def test_floor_one_rule_refuses_more_leaves_than_width():
    with pytest.raises(ValueError, match="3 leaves cannot get one child each out of width 2"):
        floor_one_shares([0.1, 0.2, 0.3], 2, temperature=0.2)


@pytest.mark.parametrize("split", [ceil_shares, floor_one_shares])
def test_a_better_leaf_goes_first_even_where_the_weights_are_equal(split):
    # Both weights are exactly one half in floating point.
    assert softmax([0.0, 7e-173], 0.01) == [0.5, 0.5]
    assert split([0.0, 7e-173], 3, temperature=0.01) == (1, 2)
    assert split([7e-173, 0.0], 3, temperature=0.01) == (2, 1)


def test_softmax_does_not_depend_on_the_order_of_the_leaves():
    scores = [place / 7 for place in range(200)]
    assert softmax(scores, 3.0) == softmax(scores[::-1], 3.0)[::-1]


def test_equal_remainders_go_by_score_then_by_place():
    assert largest_remainder_shares([0.5, 0.5], 3, scores=[0.1, 0.9]) == (1, 2)
    assert largest_remainder_shares([0.5, 0.5 + 1e-15], 3, scores=[0.9, 0.9]) == (2, 1)  # noise decides nothing
    assert largest_remainder_shares([0.3, 0.7], 5) == (1, 4)  # 1.5 and 3.5: the larger weight


def test_largest_remainder():
    assert largest_remainder_shares([1.0, 1.0, 1.0], 3) == (1, 1, 1)
    assert largest_remainder_shares([0.6, 0.4], 2) == (1, 1)  # 1.2, 0.8
    assert largest_remainder_shares([0.0, 2.0], 3) == (0, 3)


def test_even_split_groups_and_scatter():
    assert even_shares([1, 2], 4, 5) == (0, 3, 2, 0)
    assert even_shares([1, 2, 3], 4, 2) == (0, 1, 1, 0)
    assert best_per_group([0.3, 0.3, 0.9, 0.1], [0, 0, 1, 2]) == (2, 0, 3)
    assert scatter((2, 1), (3, 0), 4) == (1, 0, 0, 2)


@pytest.mark.parametrize(
    "call",
    [
        lambda: softmax([], 0.2),
        lambda: softmax([float("nan")], 0.2),
        lambda: softmax([0.5], 0.0),
        lambda: ceil_shares([0.5], -1, temperature=0.2),
        lambda: largest_remainder_shares([0.0, 0.0], 2),
        lambda: largest_remainder_shares([-1.0, 2.0], 2),
        lambda: even_shares([0], 1, -1),
    ],
)
def test_bad_input_is_refused(call):
    with pytest.raises(ValueError, match="got"):
        call()
