"""Verifiers that need no second model: how sure the policy was of what it wrote."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ets_engine.errors import ProtocolError
from ets_engine.models.policy import TreePolicy
from ets_engine.models.probe import Probe
from ets_engine.models.verifier import SCORE_DIGITS
from ets_engine.scorers import EvidenceScorer, StepEvidence


@dataclass(frozen=True, slots=True)
class LogProb:
    """Scores a path by the geometric mean of its tokens' probabilities: exp(mean log-probability), in [0, 1].

    Over all tokens from the first step on, like the length-normalised likelihood of a whole response, and like a PRM,
    which judges everything up to a step. With `SearchConfig.reduce="last"` it is the whole trajectory that votes.

    Example:
        >>> steps = [StepEvidence(2, math.log(0.25), 0.0, None), StepEvidence(2, math.log(0.04), 0.0, None)]
        >>> [round(score, 6) for score in LogProb().score_evidence([steps[:1], steps])]
        [0.5, 0.316228]
    """

    id = "logprob"
    needs_certainty = False

    def score_evidence(self, paths: Sequence[Sequence[StepEvidence]]) -> list[float]:
        """One score per path."""
        return [math.exp(_mean([(one.logprob, one.num_sampled) for one in path])) for path in paths]


@dataclass(frozen=True, slots=True)
class SelfCertainty:
    """Scores a path by self-certainty (Kang et al., arXiv 2502.18581), as c / (c + ln V), in [0, 1).

    c is the mean over all tokens of the path, from the first step on, of KL(uniform || next-token distribution) in
    nats; V is the size of the vocabulary. The squash is monotone, so ranks are those of the paper: 0 for a policy that
    knows nothing, 1/2 where c is the entropy of the uniform distribution.

    Example:
        >>> SelfCertainty().score_evidence([[StepEvidence(2, -1.0, 2.0, None), StepEvidence(1, -1.0, 7.0, None)]])
        [0.75]
    """

    id = "self_certainty"
    needs_certainty = True

    def score_evidence(self, paths: Sequence[Sequence[StepEvidence]]) -> list[float]:
        """One score per path; NaN where the model rules tokens out altogether, and its certainty is infinite."""
        means = [_mean([(one.certainty, one.num_sampled) for one in path]) for path in paths]
        return [max(mean, 0.0) / (mean + 1.0) for mean in means]  # a mean below 0 is rounding noise


class EvidenceVerifier:
    """One search's scores from what its policy computed anyway: no forward pass, no KV, nothing to lose with it.

    Args:
        scorer: Judges.
        policy: Of the search; its steps of the round are scored before the next round.
    """

    def __init__(self, scorer: EvidenceScorer, policy: TreePolicy) -> None:
        """See the class."""
        self._scorer = scorer
        self._policy = policy
        self._paths: dict[int, tuple[StepEvidence, ...]] = {0: ()}

    def score(self, nodes: Sequence[int], parents: Sequence[int], texts: Sequence[str]) -> list[float]:
        """One score per step, rounded so that it does not depend on what else was in the batch; NaN = unscorable.

        Raises:
            ProtocolError: The scorer returned another number of scores, or something that is no number.
        """
        for node, parent, seen in zip(nodes, parents, self._policy.evidence(nodes), strict=True):
            self._paths[node] = (*self._paths[parent], seen)
        scores = self._scorer.score_evidence([self._paths[node] for node in nodes])
        try:
            return [round(float(score), SCORE_DIGITS) for _, score in zip(nodes, scores, strict=True)]
        except (TypeError, ValueError):
            raise ProtocolError(
                f"verifier={self._scorer!r:.90} returned {scores!r:.90} for {len(nodes)} steps; return a number each"
            ) from None

    def retain(self, leaves: Sequence[int]) -> None:
        """Forget every other path."""
        self._paths = {leaf: self._paths[leaf] for leaf in leaves}

    def drop(self) -> None:
        """No KV is held."""

    def close(self) -> None:
        """Nothing is held."""


def find_intrinsic(name: str) -> EvidenceScorer | None:
    """The verifier that a name stands for: "logprob", "self_certainty", or "probe:FILE"; None = a PRM's name.

    Raises:
        ModelLoadError: The file holds no probe.

    Example:
        >>> find_intrinsic("logprob"), find_intrinsic("path/to/prm")
        (LogProb(), None)
    """
    match name.partition(":"):
        case "logprob", "", _:
            return LogProb()
        case "self_certainty", "", _:
            return SelfCertainty()
        case "probe", ":", path:
            return Probe.load(path)
    return None


def _mean(parts: Sequence[tuple[float, int]]) -> float:
    """Mean per token of sums over some tokens; NaN without a token."""
    total = sum(count for _, count in parts)
    return math.fsum(part for part, _ in parts) / total if total else math.nan
