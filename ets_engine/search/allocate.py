"""Pure splits of a width over scored leaves; it knows neither trees nor text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

_ROUNDING = 1e-9  # quotas and remainders that differ by less are equal


def best_first(scores: Sequence[float]) -> list[int]:
    """Positions from the best score to the worst; equal scores keep their order."""
    return sorted(range(len(scores)), key=lambda leaf: -scores[leaf])


def softmax(scores: Sequence[float], temperature: float) -> list[float]:
    """Softmax of `score / temperature`, safe for any finite score.

    Args:
        scores: Finite, at least one. Shape [L].
        temperature: > 0.

    Returns:
        Weights that sum to 1. Shape [L].

    Raises:
        ValueError: `scores` is empty or not finite, or `temperature` is not positive.

    Example:
        >>> softmax([0.3, 0.3], temperature=0.2)
        [0.5, 0.5]
    """
    if not scores or not all(map(math.isfinite, scores)):
        raise ValueError(f"scores must be non-empty and finite, got {list(scores)!r}")
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature!r}")
    top = max(scores)
    weights = [math.exp((score - top) / temperature) for score in scores]
    total = math.fsum(weights)  # the same whatever the order of the leaves
    return [weight / total for weight in weights]


def ceil_shares(scores: Sequence[float], width: int, *, temperature: float) -> tuple[int, ...]:
    """Split `width` by REBASE's sequential ceiling rule (arXiv 2408.00724).

    The best leaf first takes the ceiling of its softmax share of what is left. The rule is top-heavy: the tail often
    gets nothing. Masses are suffix sums in float64, so the last leaf that still has weight takes exactly the rest.

    Args:
        scores: One step score per leaf, finite. Shape [L], L >= 1.
        width: Children to hand out (count), >= 0.
        temperature: > 0; small values concentrate on the best leaf.

    Returns:
        Shares in the order of `scores`: non-negative, summing to `width`; a better leaf never gets fewer, and of equal
        ones the earlier never gets fewer. Shape [L].

    Raises:
        ValueError: A score, the width or the temperature is out of range.

    Example:
        >>> ceil_shares([0.9, 0.1, 0.9], width=4, temperature=0.2)
        (2, 0, 2)
    """
    _check_width(width)
    weights = softmax(scores, temperature)
    order = best_first(scores)
    masses = list(accumulate(weights[leaf] for leaf in reversed(order)))[::-1]  # weight of this leaf and all after it
    shares = [0] * len(scores)
    rate = math.inf  # children per weight; rounding up lowers it from leaf to leaf, and `_ROUNDING` must not raise it
    for leaf, mass in zip(order, masses, strict=True):
        if width == 0:
            break
        rate = min(rate, width / mass)
        shares[leaf] = math.ceil(weights[leaf] * rate - _ROUNDING)
        width -= shares[leaf]
    return tuple(shares)


def floor_one_shares(scores: Sequence[float], width: int, *, temperature: float) -> tuple[int, ...]:
    """Give every leaf one child, then split the rest by softmax with largest remainders.

    Args:
        scores: One step score per leaf, finite. Shape [L], 1 <= L <= width.
        width: Children to hand out (count).
        temperature: > 0.

    Returns:
        Shares >= 1 that sum to `width`; a better leaf never gets fewer. Shape [L].

    Raises:
        ValueError: There are more leaves than `width`, or a score or the temperature is out of range.

    Example:
        >>> floor_one_shares([0.9, 0.1, 0.9], width=5, temperature=0.2)
        (2, 1, 2)
    """
    if len(scores) > width:
        raise ValueError(f"{len(scores)} leaves cannot get one child each out of width {width}; keep fewer leaves")
    rest = largest_remainder_shares(softmax(scores, temperature), width - len(scores), scores=scores)
    return tuple(1 + share for share in rest)


def largest_remainder_shares(
    weights: Sequence[float], width: int, *, scores: Sequence[float] | None = None
) -> tuple[int, ...]:
    """Split `width` in proportion to weights: whole parts first, then the largest remainders.

    Equal remainders go by score, then by place: scores may differ by less than their weights can show.

    Args:
        weights: Non-negative, with a positive sum. Shape [L].
        width: Children to hand out (count), >= 0.
        scores: What ranks equal remainders, None = the weights. Shape [L].

    Returns:
        Shares that sum to `width`, each within one of `width * weight / sum`; a larger weight never gets fewer, and of
        weights that differ by rounding noise the higher score never gets fewer. Shape [L].

    Raises:
        ValueError: A weight is negative or not finite, all are zero, or `width` < 0.

    Example:
        >>> largest_remainder_shares([0.5, 0.3, 0.2], width=4)
        (2, 1, 1)
    """
    _check_width(width)
    total = math.fsum(weights)
    if not (math.isfinite(total) and total > 0 and min(weights) >= 0):
        raise ValueError(f"weights must be finite and >= 0 with a positive sum, got {list(weights)!r}")
    quotas = [width * (weight / total) for weight in weights]
    shares = [math.floor(quota) for quota in quotas]
    left = width - sum(shares)
    order = best_first(weights if scores is None else scores)
    by_remainder = sorted(order, key=lambda leaf: round((shares[leaf] - quotas[leaf]) / _ROUNDING))
    for leaf in by_remainder[:left]:
        shares[leaf] += 1
    return tuple(shares)


def even_shares(chosen: Sequence[int], num_leaves: int, width: int) -> tuple[int, ...]:
    """Split `width` evenly over the chosen leaves; the first ones take what does not divide.

    Args:
        chosen: Distinct leaf positions, best first, at least one.
        num_leaves: Leaves in all (count); those not chosen get 0.
        width: Children to hand out (count), >= 0. If it is smaller than `chosen`, the last ones get 0.

    Returns:
        Shares that sum to `width`. Shape [num_leaves].

    Example:
        >>> even_shares([2, 0], num_leaves=3, width=5)
        (2, 0, 3)
    """
    _check_width(width)
    base, extra = divmod(width, len(chosen))
    shares = [0] * num_leaves
    for rank, leaf in enumerate(chosen):
        shares[leaf] = base + (rank < extra)
    return tuple(shares)


def best_per_group(scores: Sequence[float], groups: Sequence[int]) -> tuple[int, ...]:
    """The best leaf of each group (the earlier of equal ones), best leaf first.

    Example:
        >>> best_per_group([0.2, 0.9, 0.5], groups=[0, 1, 0])
        (1, 2)
    """
    winners: dict[int, int] = {}
    for leaf in best_first(scores):
        winners.setdefault(groups[leaf], leaf)
    return tuple(winners.values())


def scatter(shares: Sequence[int], kept: Sequence[int], num_leaves: int) -> tuple[int, ...]:
    """Shares of the kept leaves put back among all leaves, 0 for the others.

    Example:
        >>> scatter([3, 1], kept=[2, 0], num_leaves=3)
        (1, 0, 3)
    """
    spread = [0] * num_leaves
    for leaf, share in zip(kept, shares, strict=True):
        spread[leaf] = share
    return tuple(spread)


def _check_width(width: int) -> None:
    if width < 0:
        raise ValueError(f"width must be >= 0, got {width}")
