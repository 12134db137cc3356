"""Confidence intervals over problems, and rank correlation; it knows no search."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 4000
_Z = 1.959964  # standard errors to either side of 95 %


class Interval(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


def interval(values: Sequence[float], least: float = 0.0) -> Interval:
    """Mean and 95 % interval of shares, or of differences of shares.

    Values of only `least` and 1 have Wilson's interval of a proportion (1927). Equal ones, which resampling would be
    certain of, have what his bound leaves to problems of another kind, at `least` or 1. All others are resampled.

    Args:
        values: One per problem, at least one, from `least` to 1.
        least: 0.0 of shares, -1.0 of differences.

    Raises:
        ValueError: No value.

    Example:
        >>> [round(bound, 2) for bound in interval([1.0] * 20)]
        [1.0, 0.84, 1.0]
    """
    found = bootstrap(values)
    count, ends = len(values), {least, 1.0}
    spread = _Z**2 / (count + _Z**2)
    if len(set(values)) == 1:
        mean = float(values[0])
        return Interval(mean, mean - spread * (mean - least), mean + spread * (1.0 - mean))
    if not ends.issuperset(values):
        return found
    share = (found.mean - least) / (1.0 - least)
    centre = share + spread * (0.5 - share)
    half = (1 - spread) * _Z * math.sqrt(share * (1 - share) / count + (_Z / count / 2) ** 2)
    low, high = (least + (1.0 - least) * bound for bound in (centre - half, centre + half))
    return Interval(found.mean, low, high)


def bootstrap(values: Sequence[float], seed: int = 0) -> Interval:
    """Mean and 95 % interval by resampling (Efron 1979), in the unit of the values.

    Args:
        values: One per problem, at least one. Differences of two methods on the same problems make it a paired test.
        seed: The same one gives the same interval.

    Raises:
        ValueError: No value.

    Example:
        >>> bootstrap([1.0, 1.0, 1.0])
        Interval(mean=1.0, low=1.0, high=1.0)
    """
    if not len(values):
        raise ValueError("no values to resample")
    data = np.asarray(values, dtype=np.float64)
    means = _resample(data, seed)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(data.mean()), float(low), float(high))


def _resample(data: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Means of resamples; in parts, so that memory stays small. Shape [RESAMPLES]."""
    rng = np.random.default_rng(seed)
    part = max(1, 2_000_000 // len(data))
    counts = [min(part, RESAMPLES - start) for start in range(0, RESAMPLES, part)]
    return np.concatenate([data[rng.integers(0, len(data), (count, len(data)))].mean(1) for count in counts])


def rank_correlation(left: Sequence[float], right: Sequence[float]) -> float | None:
    """Spearman's correlation in [-1, 1]; None for fewer than three pairs, or where one side never changes.

    Example:
        >>> rank_correlation([1, 2, 3], [10, 30, 200])
        1.0
    """
    from scipy.stats import spearmanr

    if len(left) < 3 or len(set(left)) < 2 or len(set(right)) < 2:
        return None
    return round(float(spearmanr(left, right).statistic), 6)
