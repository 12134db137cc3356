"""The selectors that need only scores and subtrees: best-of-N, beam search, DVTS, REBASE."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ets_engine.errors import ConfigError
from ets_engine.protocols import Frontier, Selection
from ets_engine.search.allocate import best_first, best_per_group, ceil_shares, even_shares, softmax
from ets_engine.types import LeafVerdict


class _ScoresOnly:
    """A selector that needs no embeddings."""

    __slots__ = ()

    @property
    def needs_embeddings(self) -> bool:
        """No."""
        return False


@dataclass(frozen=True, slots=True)
class BestOfN(_ScoresOnly):
    """Independent samples: the root gets the whole width, every other leaf one child.

    With a majority vote this is self-consistency (arXiv 2203.11171).

    Example:
        >>> leaves = Frontier((-1, 0, 0), (9, 5, 5), (1, 2), (0.2, 0.9), (0, 1), depth=1)
        >>> BestOfN().select(leaves, open_width=2).shares
        (1, 1)
    """

    def select(self, frontier: Frontier, open_width: int) -> Selection:
        """One child each, scores ignored; with more leaves than width the first ones."""
        if frontier.depth == 0:
            return Selection((max(open_width, 0),))
        return Selection(tuple(int(leaf < open_width) for leaf in range(len(frontier.leaves))))


@dataclass(frozen=True, slots=True)
class Beam(_ScoresOnly):
    """Beam search over steps: the best `keep` leaves share the width evenly (arXiv 2408.03314).

    As everywhere here, a trajectory that finished keeps its place in the width; the reference code refills the beam.

    Attributes:
        keep: Leaves kept (count), None = a quarter of the open width, at least 1.

    Raises:
        ConfigError: `keep` < 1.

    Example:
        >>> leaves = Frontier((-1, 0, 0, 0), (9, 5, 5, 5), (1, 2, 3), (0.2, 0.9, 0.5), (0, 1, 2), depth=1)
        >>> Beam(keep=2).select(leaves, open_width=5).shares
        (0, 3, 2)
    """

    keep: int | None = None

    def __post_init__(self) -> None:
        """Refuse a `keep` that keeps nothing."""
        check_keep(self.keep)

    def select(self, frontier: Frontier, open_width: int) -> Selection:
        """Split the width over the best `keep` leaves; what does not divide goes to the best ones."""
        keep = max(1, open_width // 4) if self.keep is None else self.keep
        return _split_top(frontier, open_width, keep)


@dataclass(frozen=True, slots=True)
class BeamSqrt(_ScoresOnly):
    """Beam search that keeps the square root of the width, rounded up.

    As in the comparison of arXiv 2502.13575, except that the shares sum to the open width instead of exceeding it when
    it does not divide (14 is 4 + 4 + 3 + 3 here, 4 x 4 there).

    Example:
        >>> leaves = Frontier((-1, 0, 0, 0), (9, 5, 5, 5), (1, 2, 3), (0.2, 0.9, 0.5), (0, 1, 2), depth=1)
        >>> BeamSqrt().select(leaves, open_width=3).shares
        (0, 2, 1)
    """

    def select(self, frontier: Frontier, open_width: int) -> Selection:
        """Split the width over the best `ceil(sqrt(open_width))` leaves."""
        keep = math.isqrt(max(open_width - 1, 0)) + 1
        return _split_top(frontier, open_width, keep)


@dataclass(frozen=True, slots=True)
class Dvts(_ScoresOnly):
    """Diverse verifier tree search: greedy search in `keep` independent subtrees that share the width evenly.

    The root's children are dealt to the subtrees in turn; from then on each subtree keeps only its best leaf. The
    width of a subtree that ended goes to the others. The reference code gives each subtree `width / keep` children to
    its end, and all leaves of its last step vote.

    Attributes:
        keep: Subtrees (count), the same in every round.

    Raises:
        ConfigError: `keep` < 1.

    Example:
        >>> scores = (0.2, 0.9, 0.5, 0.8)
        >>> leaves = Frontier((-1, 0, 0, 0, 0), (9, 5, 5, 5, 5), (1, 2, 3, 4), scores, (0, 1, 2, 3), depth=1)
        >>> Dvts(keep=2).select(leaves, open_width=4).shares
        (0, 2, 2, 0)
    """

    keep: int = 4

    def __post_init__(self) -> None:
        """Refuse a `keep` that keeps nothing."""
        check_keep(self.keep)

    def select(self, frontier: Frontier, open_width: int) -> Selection:
        """Split the width evenly over the best leaf of each subtree."""
        winners = best_per_group(frontier.scores, [subtree % self.keep for subtree in frontier.subtrees])
        return Selection(even_shares(winners, len(frontier.leaves), max(open_width, 0)))


@dataclass(frozen=True, slots=True)
class Rebase(_ScoresOnly):
    """Reward-balanced search: children in proportion to `exp(score / temperature)` (REBASE, arXiv 2408.00724).

    Attributes:
        softmax_temperature: > 0; small values concentrate on the best leaf.

    Raises:
        ConfigError: The temperature is not positive.

    Example:
        >>> leaves = Frontier((-1, 0, 0, 0), (9, 5, 5, 5), (1, 2, 3), (0.2, 0.9, 0.5), (0, 1, 2), depth=1)
        >>> Rebase().select(leaves, open_width=8).shares
        (0, 7, 1)
    """

    softmax_temperature: float = 0.2

    def __post_init__(self) -> None:
        """Refuse a temperature that softmax cannot use."""
        check_positive("softmax_temperature", self.softmax_temperature)

    def select(self, frontier: Frontier, open_width: int) -> Selection:
        """Split the width by the sequential ceiling rule; a verdict's reward is the softmax weight."""
        shares = ceil_shares(frontier.scores, max(open_width, 0), temperature=self.softmax_temperature)
        weights = softmax(frontier.scores, self.softmax_temperature)
        verdicts = tuple(
            LeafVerdict(node=node, share=share, reward=weight)
            for node, share, weight in zip(frontier.leaves, shares, weights, strict=True)
        )
        return Selection(shares, verdicts)


def check_keep(keep: int | None) -> None:
    """Refuse a number of kept leaves below 1.

    Raises:
        ConfigError: naming it.
    """
    if keep is not None and keep < 1:
        raise ConfigError(f"keep={keep}: must be >= 1")


def check_positive(name: str, value: float) -> None:
    """Refuse a setting that is not a positive finite number.

    Raises:
        ConfigError: naming it.
    """
    if not (value > 0 and math.isfinite(value)):
        raise ConfigError(f"{name}={value}: must be a finite number > 0")


def _split_top(frontier: Frontier, open_width: int, keep: int) -> Selection:
    chosen = best_first(frontier.scores)[:keep]
    return Selection(even_shares(chosen, len(frontier.leaves), max(open_width, 0)))
