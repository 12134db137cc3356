"""Verifiers without a model: plain functions, combinations of them, and one that has no opinion."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias, get_args, runtime_checkable

from ets_engine.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

StepScorer = Callable[[str, Sequence[str]], float]
"""`scorer(problem, steps)`: how good the last of these steps is after the others, in [0, 1]."""

Scorer: TypeAlias = "StepScorer | BatchScorer"
"""What may stand in for a PRM."""

Combine = Literal["mean", "min", "prod"]

_LOGGER = logging.getLogger(__name__)


@runtime_checkable
class BatchScorer(Protocol):
    """A scorer that judges all new steps of a depth in one call, as a model behind a network would."""

    def score_many(self, problem: str, paths: Sequence[Sequence[str]]) -> Sequence[float]:
        """How good the last step of each path is, in [0, 1]; NaN for one that cannot be judged."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class StepEvidence:
    """What the policy computed anyway as it wrote a step.

    Attributes:
        num_sampled: Tokens sampled, an end-of-text token included (count).
        logprob: Sum of their log-probabilities under the policy: temperature 1, no cuts.
        certainty: Sum over them of KL(uniform || next-token distribution), in units of ln V; 0.0 when nobody asked.
        hidden_mean: Mean of the policy's last hidden states at the step's tokens but the last. Shape [hidden], float32.
    """

    num_sampled: int
    logprob: float
    certainty: float
    hidden_mean: NDArray[np.float32]


@runtime_checkable
class EvidenceScorer(Protocol):
    """A scorer that needs no forward pass, for an engine that runs the policy itself.

    It is called in the engine's thread, between forward passes: it must be quick, and must not call the engine.
    """

    @property
    def needs_certainty(self) -> bool:
        """Whether `StepEvidence.certainty` must be filled."""
        ...

    def score_evidence(self, paths: Sequence[Sequence[StepEvidence]]) -> Sequence[float]:
        """How good the last step of each path is, in [0, 1]; NaN for one that cannot be judged."""
        ...


class CallableVerifier:
    """Scores steps with a plain function, a unit test or an exact checker, say; it has no KV.

    Args:
        scorer: Called once per step with the problem and the steps up to it, or, a `BatchScorer`, once per depth.
        problem: What is being solved.
        read_step: What the scorer is given of a step's text, None = all of it.

    Raises:
        ConfigError: It is no scorer, or one of evidence, which only an engine that runs the policy has.

    Example:
        >>> verifier = CallableVerifier(lambda problem, steps: 1.0 if "4" in steps[-1] else 0.0, "2+2=?")
        >>> verifier.score([1, 2], [0, 0], ["so 4", "so 5"])
        [1.0, 0.0]
        >>> verifier.score([3], [1], ["it is 4"])
        [1.0]
    """

    def __init__(
        self, scorer: Scorer | EvidenceScorer, problem: str, read_step: Callable[[str], str] | None = None
    ) -> None:
        """See the class."""
        self._scorer = _check_scorer(scorer)
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
        return score_paths(self._scorer, self._problem, [self._paths[node] for node in nodes], self._note)

    def _note(self, path: Sequence[str], error: Exception) -> None:
        if not self._has_failed:
            _LOGGER.warning("the verifier function failed on %r: %r; such branches end", path[-1], error)
        self._has_failed = True

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


class Ensemble:
    """Several scorers as one `BatchScorer`; they are asked one after the other.

    A step that one of them raises on or scores as NaN is not judged by the others alone: it is NaN, and its branch
    ends. A score outside [0, 1] is handed on as it is, for the search to refuse.

    Args:
        scorers: At least one; a PRM among them is a `PrmScorer`.
        combine: "mean", "min" (the strictest decides) or "prod" (as if they erred independently).
        weights: Of the mean, one per scorer, >= 0 and not all 0; None = all alike.
        id: Names it in caches, None = searches with it are never mixed with any other's.

    Raises:
        ConfigError: No scorers, one that is none or reads evidence, or weights that do not fit.

    Example:
        >>> from ets_engine.models import PrmScorer
        >>> both = Ensemble(PrmScorer.from_pretrained("reference"), lambda problem, steps: 0.5, combine="min")
        >>> both.score_many("Use 1, 3, 7 and 17 to make 22.", [["7-3=4 left 1 4 17", "17+4=21 left 1 21"]])
        [0.5]
        >>> good, bad = (lambda problem, steps: 1.0), (lambda problem, steps: 0.0)
        >>> Ensemble(good, bad, weights=(3, 1)).score_many("2+2=?", [["so 4"]])
        [0.75]
    """

    def __init__(
        self, *scorers: Scorer, combine: Combine = "mean", weights: Sequence[float] | None = None, id: str | None = None
    ) -> None:
        """See the class."""
        if not scorers:
            raise ConfigError("scorers=(): an ensemble needs at least one")
        if combine not in get_args(Combine):
            raise ConfigError(f"combine={combine!r}: use one of {', '.join(get_args(Combine))}")
        for scorer in scorers:
            _check_scorer(scorer)
        if weights is not None:
            fit = len(weights) == len(scorers) and all(math.isfinite(one) and one >= 0 for one in weights)
            if combine != "mean" or not fit or not sum(weights) > 0:
                raise ConfigError(
                    f"weights={weights!r}: combine='mean' takes one finite weight >= 0 per scorer, not all 0"
                )
        self.id = id
        self._scorers = scorers
        self._combine: Combine = combine
        self._weights = tuple(weights or (1.0,) * len(scorers))

    def score_many(self, problem: str, paths: Sequence[Sequence[str]]) -> list[float]:
        """Combined scores of the last steps, NaN for one that some scorer cannot judge; failures are logged."""
        rows = zip(*(_ask(scorer, problem, paths) for scorer in self._scorers), strict=True)
        return [self._reduce(row) for row in rows]

    def _reduce(self, row: Sequence[float]) -> float:
        wrong = [score for score in row if not 0.0 <= score <= 1.0]
        if wrong:
            return float("nan") if any(map(math.isnan, wrong)) else wrong[0]
        if self._combine == "mean":
            total = math.fsum(weight * score for weight, score in zip(self._weights, row, strict=True))
            return total / math.fsum(self._weights)  # <= 1: exact sums keep the order of their parts
        return min(row) if self._combine == "min" else math.prod(row)


class OutcomeScorer:
    """A `BatchScorer` that judges finished solutions only, as an outcome reward model or a unit test does.

    A step after which a solution is not finished gets the neutral score, so that selectors treat such leaves alike;
    take `SearchConfig.reduce="last"`, under which neutral scores have no say in the vote.

    Args:
        scorer: Judges finished solutions.
        is_finished: Whether a text, all steps joined, is a finished solution: it states an answer, say.
        neutral: Of the others, in [0, 1].
        id: Names it in caches, None = searches with it are never mixed with any other's.

    Raises:
        ConfigError: `neutral` is outside [0, 1], or the scorer is none or reads evidence.

    Example:
        >>> right = lambda problem, steps: 1.0 if "boxed{4}" in steps[-1] else 0.0
        >>> scorer = OutcomeScorer(right, lambda text: "boxed{" in text)
        >>> scorer.score_many("2+2=?", [["add both"], ["add both", "it is boxed{4}"], ["it is boxed{5}"]])
        [0.5, 1.0, 0.0]
    """

    def __init__(
        self, scorer: Scorer, is_finished: Callable[[str], bool], *, neutral: float = 0.5, id: str | None = None
    ) -> None:
        """See the class."""
        _check_scorer(scorer)
        if not 0.0 <= neutral <= 1.0:
            raise ConfigError(f"neutral={neutral!r}: scores lie in [0, 1]")
        self.id = id
        self._scorer = scorer
        self._is_finished = is_finished
        self._neutral = neutral

    def score_many(self, problem: str, paths: Sequence[Sequence[str]]) -> list[float]:
        """The scorer's numbers where a solution is finished, else the neutral one; NaN where the scorer fails."""
        finished = [place for place, path in enumerate(paths) if self._is_finished("".join(path))]
        scores = [self._neutral] * len(paths)
        if finished:
            found = _ask(self._scorer, problem, [paths[place] for place in finished])
            for place, score in zip(finished, found, strict=True):
                scores[place] = score
        return scores


def score_paths(
    scorer: Scorer,
    problem: str,
    paths: Sequence[Sequence[str]],
    on_failure: Callable[[Sequence[str], Exception], object],
) -> list[float]:
    """Scores of the last steps; NaN where the scorer raises or returns no number, once `on_failure` was told.

    Args:
        scorer: Asked once per path, or, a `BatchScorer`, once for all of them.
        problem: What is being solved.
        paths: Steps of each path, at least one. Shape [L].
        on_failure: Called with every path that has no score, and why.

    Example:
        >>> score_paths(lambda problem, steps: 1 / len(steps[-1]), "2+2=?", [["four"], [""]], lambda path, error: None)
        [0.25, nan]
    """

    def read(path: Sequence[str], ask: Callable[[], object]) -> float:
        try:
            return float(ask())  # pyright: ignore[reportArgumentType] # a caller's function returned it
        except Exception as error:
            on_failure(path, error)
            return float("nan")

    if not isinstance(scorer, BatchScorer):
        return [read(path, partial(scorer, problem, path)) for path in paths]
    try:
        scores = list(scorer.score_many(problem, paths))
        if len(scores) != len(paths):
            raise ValueError(f"score_many returned {len(scores)} scores for {len(paths)} steps; return one each")
    except Exception as error:
        for path in paths:
            on_failure(path, error)
        return [float("nan")] * len(paths)
    return [read(path, lambda score=score: score) for path, score in zip(paths, scores, strict=True)]


def _ask(scorer: Scorer, problem: str, paths: Sequence[Sequence[str]]) -> list[float]:
    """`score_paths` that logs what fails, once per call."""
    failures: list[tuple[Sequence[str], Exception]] = []
    scores = score_paths(scorer, problem, paths, lambda path, error: failures.append((path, error)))
    if failures:
        path, error = failures[0]
        _LOGGER.warning(
            "a scorer failed on %d of %d steps, first on %r: %r", len(failures), len(paths), path[-1], error
        )
    return scores


def _check_scorer(scorer: Scorer | EvidenceScorer) -> Scorer:
    if isinstance(scorer, EvidenceScorer):
        raise ConfigError(
            f"verifier={scorer!r:.100} reads what the policy computes as it writes, not text: give it alone, to an "
            "ETSEngine"
        )
    if not callable(scorer) and not isinstance(scorer, BatchScorer):
        raise ConfigError(f"verifier={scorer!r:.100} is no function of problem and steps, and has no score_many")
    return scorer
