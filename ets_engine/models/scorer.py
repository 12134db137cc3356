"""A PRM as a plain verifier, for steps of a policy that runs elsewhere; it reads a search's steps once."""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from ets_engine.config import EngineConfig
from ets_engine.errors import PoolExhaustedError
from ets_engine.models.prm_formats import PrmFormat
from ets_engine.models.prm_loading import load_prm
from ets_engine.models.verifier import PrmVerifier, score_together
from ets_engine.runtime import Runner

_MAX_READINGS = 64  # searches whose steps are kept, as many as a `HostedEngine` runs at a time

Path = tuple[str, ...]


class PrmScorer:
    """A `BatchScorer` that runs a PRM here.

    Nobody tells it which search asks, or when one is over. It keeps what it read for the last 64 that did, in as much
    of its KV pool as nobody else needs, and goes on where the paths that it is given do: a search that asks once per
    depth has every token read once. Any other call is answered too, from the problem on.

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
        self._readings: list[_Reading] = []  # the last to be asked for is last

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
        asked = [tuple(path) for path in paths]
        prefixes = list(dict.fromkeys(path[:length] for path in asked for length in range(1, len(path) + 1)))
        with self._lock:  # the runner takes one caller at a time
            reading = next((one for one in reversed(self._readings) if one.leads_to(problem, prefixes)), None)
            if reading is None:
                self._calls += 1
                reading = _Reading(problem, PrmVerifier(self._runner, self._format, problem, self._calls))
            else:
                self._readings.remove(reading)
            try:
                for length in range(1, max(map(len, prefixes), default=0) + 1):
                    self._read(reading, [path for path in prefixes if len(path) == length])
                scores = [reading.scores.get(path, float("nan")) for path in asked]
                reading.keep(asked)
            except BaseException:
                reading.verifier.close()
                raise
            self._readings.append(reading)
            if len(self._readings) > _MAX_READINGS:
                self._readings.pop(0).verifier.close()
        return scores

    def _read(self, reading: _Reading, level: Sequence[Path]) -> None:
        """Score those paths of one length that are new and do not follow a step without a score."""
        new = [path for path in level if path not in reading.scores and reading.scores.get(path[:-1], 1.0) >= 0]
        if not new:
            return
        nodes = [reading.name(path) for path in new]
        texts = reading.verifier.read([path[-1] for path in new])
        request = (reading.verifier, nodes, [reading.nodes[path[:-1]] for path in new], texts)
        try:
            scores = score_together([request])[0]
        except PoolExhaustedError:
            while self._readings:  # what is kept for others makes room
                self._readings.pop().verifier.close()
            scores = reading.verifier.score_read(*request[1:])
        reading.add(new, scores)


@dataclass(slots=True)
class _Reading:
    """What was read of one problem: where its paths stand in the verifier, and what they scored.

    Attributes:
        problem: What is being solved.
        verifier: Holds the KV of the open paths.
        nodes: Node of each path.
        scores: Of each path but the empty one.
        open: Paths that steps may follow.
    """

    problem: str
    verifier: PrmVerifier
    nodes: dict[Path, int] = field(default_factory=lambda: {(): 0})
    scores: dict[Path, float] = field(default_factory=dict[Path, float])
    open: set[Path] = field(default_factory=lambda: {()})
    _last: int = 0

    def leads_to(self, problem: str, prefixes: Collection[Path]) -> bool:
        """Whether all that is new of these paths and their prefixes follows what is open here."""
        new = {path for path in prefixes if path not in self.scores}
        return problem == self.problem and all(path[:-1] in self.open for path in new if path[:-1] not in new)

    def name(self, path: Path) -> int:
        """A node for a new path."""
        self._last += 1
        return self.nodes.setdefault(path, self._last)

    def add(self, paths: Sequence[Path], scores: Sequence[float]) -> None:
        """These were read."""
        self.scores |= zip(paths, scores, strict=True)
        self.open |= {path for path, score in zip(paths, scores, strict=True) if score >= 0}

    def keep(self, paths: Sequence[Path]) -> None:
        """Forget all but these paths and what is above them; steps may follow them and the steps before them.

        The empty path stays open for nobody: whoever begins at the problem is another search.
        """
        self.open &= {path for end in paths for path in (end, end[:-1]) if path}
        above = {path[:length] for path in paths for length in range(len(path) + 1)}
        self.nodes = {path: node for path, node in self.nodes.items() if path in above}
        self.scores = {path: score for path, score in self.scores.items() if path in above}
        self.verifier.retain([self.nodes[path] for path in self.open])
