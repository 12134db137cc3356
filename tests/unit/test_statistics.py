"""Intervals of shares and of paired differences stay honest where resampling has nothing to vary."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from ets_engine.evaluation.paired import percent
from ets_engine.evaluation.statistics import bootstrap, interval


@pytest.mark.parametrize(("right", "count"), [(0, 1), (0, 20), (20, 20), (19, 20), (13, 200)])
def test_shares_of_yes_and_no_have_the_interval_of_a_proportion(right: int, count: int) -> None:
    known = binomtest(right, count).proportion_ci(method="wilson")
    found = interval([1.0] * right + [0.0] * (count - right))
    assert found == pytest.approx((right / count, known.low, known.high))


def test_intervals_near_all_right_hold_what_they_say() -> None:
    rng = np.random.default_rng(0)
    found = [interval((rng.random(20) < 0.95).astype(float)) for _ in range(400)]
    assert np.mean([one.low <= 0.95 <= one.high for one in found]) > 0.9
    assert all(one.low < one.high for one in found)


def test_shares_over_seeds_are_resampled_unless_all_are_alike() -> None:
    assert interval([1.0, 0.5, 0.0]) == bootstrap([1.0, 0.5, 0.0])
    found = interval([0.5] * 10)
    assert found.low < 0.5 < found.high and found.high - found.low == pytest.approx(3.8415 / 13.8415, abs=1e-4)


def test_methods_that_agree_everywhere_may_still_differ_elsewhere() -> None:
    """At most so often as the interval of a proportion allows for what was never seen."""
    unseen = binomtest(0, 40).proportion_ci(method="wilson").high
    assert interval([0.0] * 40, least=-1.0) == pytest.approx((0.0, -unseen, unseen))
    assert interval([1.0] * 40, least=-1.0) == pytest.approx((1.0, 1 - 2 * unseen, 1.0))
    assert interval([1.0, 0.0, -1.0], least=-1.0) == bootstrap([1.0, 0.0, -1.0])
    ties = percent([0.0] * 40, least=-1.0)
    assert (ties.mean, ties.low, ties.high) == pytest.approx((0.0, -100 * unseen, 100 * unseen))


def test_nothing_has_no_interval() -> None:
    with pytest.raises(ValueError, match="no values"):
        interval([])
