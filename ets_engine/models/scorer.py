"""A PRM as a plain verifier, for steps of a policy that runs elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from ets_engine.config import EngineConfig
from ets_engine.models.prm_formats import PrmFormat
from ets_engine.models.prm_loading import load_prm
from ets_engine.models.verifier import PrmVerifier
from ets_engine.runtime import Runner


class PrmScorer:
    """A `BatchScorer` that runs a PRM here; what paths of one call have in common is read once.

    Args:
        runner: Of the PRM; the scorer alone uses it from now on.
        format: What the PRM reads.
        id: Names the PRM in caches.

    Example:
        >>> scorer = PrmScorer.from_pretrained("reference")
        >>> right, dead_end = scorer.score_many("Use 1, 3, 7 and 17 to make 22.", [
        ...     ["7-3=4 left 1 4 17", "17+4=21 left 1 21"], ["7-3=4 left 1 4 17", "17-4=13 left 1 13"]])
        >>> right > dead_end
        True
    """

    def __init__(self, runner: Runner, format: PrmFormat, id: str) -> None:
        """See the class."""
        self.id = id
        self._runner = runner
        self._format = format
        self._lock = threading.Lock()
        self._calls = 0

    @classmethod
    def from_pretrained(cls, verifier: str, config: EngineConfig | None = None) -> PrmScorer:
        """Load a PRM: "reference", or one of a published format by folder or hub name; see `load_prm`.

        Raises:
            ModelLoadError: It cannot be loaded, or is no PRM.
            ConfigError: A setting does not go with its format.
        """
        return cls(*load_prm(verifier, config), verifier)

    def score_many(self, problem: str, paths: Sequence[Sequence[str]]) -> list[float]:
        """Probability that all is right up to the last step of each path; NaN where the context is too small.

        Args:
            problem: What is being solved.
            paths: Steps of each path, at least one. Shape [L].

        Raises:
            ContextLengthError: The problem leaves no room for a step.
        """
        nodes: dict[tuple[str, ...], int] = {(): 0}
        for path in paths:
            for length in range(1, len(path) + 1):
                nodes.setdefault(tuple(path[:length]), len(nodes))
        found: dict[int, float] = {}
        with self._lock:  # the runner takes one caller at a time
            self._calls += 1
            verifier = PrmVerifier(self._runner, self._format, problem, self._calls)
            try:
                for length in range(1, max(map(len, paths), default=0) + 1):
                    level = [path for path in nodes if len(path) == length and found.get(nodes[path[:-1]], 1.0) >= 0]
                    new = [nodes[path] for path in level]
                    scores = verifier.score(new, [nodes[path[:-1]] for path in level], [path[-1] for path in level])
                    found |= dict(zip(new, scores, strict=True))
            finally:
                verifier.close()
        return [found.get(nodes[tuple(path)], float("nan")) for path in paths]
