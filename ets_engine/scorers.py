"""Verifiers without a model: a plain function, and one that has no opinion."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias, runtime_checkable

StepScorer = Callable[[str, Sequence[str]], float]
"""`scorer(problem, steps)`: how good the last of these steps is after the others, in [0, 1]."""

Scorer: TypeAlias = "StepScorer | BatchScorer"
"""What may stand in for a PRM."""

_LOGGER = logging.getLogger(__name__)


@runtime_checkable
class BatchScorer(Protocol):
    """A scorer that judges all new steps of a depth in one call, as a model behind a network would."""

    def score_many(self, problem: str, paths: Sequence[Sequence[str]]) -> Sequence[float]:
        """How good the last step of each path is, in [0, 1]; NaN for one that cannot be judged."""
        ...


class CallableVerifier:
    """Scores steps with a plain function, a unit test or an exact checker, say; it has no KV.

    Args:
        scorer: Called once per step with the problem and the steps up to it, or, a `BatchScorer`, once per depth.
        problem: What is being solved.
        read_step: What the scorer is given of a step's text, None = all of it.

    Example:
        >>> verifier = CallableVerifier(lambda problem, steps: 1.0 if "4" in steps[-1] else 0.0, "2+2=?")
        >>> verifier.score([1, 2], [0, 0], ["so 4", "so 5"])
        [1.0, 0.0]
        >>> verifier.score([3], [1], ["it is 4"])
        [1.0]
    """

    def __init__(self, scorer: Scorer, problem: str, read_step: Callable[[str], str] | None = None) -> None:
        """See the class."""
        self._scorer = scorer
        self._problem = problem
        self._read_step = read_step
        self._paths: dict[int, tuple[str, ...]] = {0: ()}
        self._has_failed = False

    def score(self, nodes: Sequence[int], parents: Sequence[int], texts: Sequence[str]) -> list[float]:
        """One score per step; NaN where the function raises: that branch has failed, the search goes on.

        The first error of a search is logged as a warning.
        """
        for node, parent, text in zip(nodes, parents, texts, strict=True):
            self._paths[node] = (*self._paths[parent], text if self._read_step is None else self._read_step(text))
        if isinstance(self._scorer, BatchScorer):
            return self._score_many(self._scorer, nodes)
        return [self._score(self._scorer, node) for node in nodes]

    def _score(self, scorer: StepScorer, node: int) -> float:
        try:
            return float(scorer(self._problem, self._paths[node]))
        except Exception as error:
            return self._fail(node, error)

    def _score_many(self, scorer: BatchScorer, nodes: Sequence[int]) -> list[float]:
        try:
            scores = scorer.score_many(self._problem, [self._paths[node] for node in nodes])
            return [self._number(node, score) for node, score in zip(nodes, scores, strict=True)]
        except Exception as error:
            return [self._fail(node, error) for node in nodes]

    def _number(self, node: int, score: object) -> float:
        try:
            return float(score)  # pyright: ignore[reportArgumentType] # a caller's function returned it
        except Exception as error:
            return self._fail(node, error)

    def _fail(self, node: int, error: Exception) -> float:
        if not self._has_failed:
            text = self._paths[node][-1]
            _LOGGER.warning("the verifier function failed on %r: %r; such branches end", text, error)
        self._has_failed = True
        return float("nan")

    def retain(self, leaves: Sequence[int]) -> None:
        """Forget every other path."""
        self._paths = {leaf: self._paths[leaf] for leaf in leaves}

    def drop(self) -> None:
        """No KV is held."""

    def close(self) -> None:
        """Nothing is held."""


class EqualVerifier:
    """Scores every step alike, for searches whose outcome no score can change: greedy, and plain majority votes.

    Example:
        >>> EqualVerifier().score([1, 2], [0, 0], ["so 4", "so 5"])
        [1.0, 1.0]
    """

    def score(self, nodes: Sequence[int], parents: Sequence[int], texts: Sequence[str]) -> list[float]:
        """1.0 per step."""
        return [1.0] * len(nodes)

    def retain(self, leaves: Sequence[int]) -> None:
        """Nothing is held."""

    def drop(self) -> None:
        """Nothing is held."""

    def close(self) -> None:
        """Nothing is held."""
