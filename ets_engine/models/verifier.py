"""One search's verifier: a PRM that reads each new step once in a KV tree of its own, or a plain function."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import islice

from ets_engine.errors import ContextLengthError, PoolExhaustedError
from ets_engine.models.formats import PrmFormat
from ets_engine.runtime import Runner

StepScorer = Callable[[str, Sequence[str]], float]
"""`scorer(problem, steps)`: how good the last of these steps is after the others, in [0, 1]."""

_LOGGER = logging.getLogger(__name__)


@dataclass(slots=True)
class VerifierUsage:
    """What one search cost its verifier so far.

    Attributes:
        tokens: Tokens read (count).
        peak_tokens: Most KV tokens resident after a round.
        resident_token_rounds: Resident KV tokens summed over rounds.
        rounds: Batches scored (count).
        path_tokens: Whole paths of all nodes that nothing follows, summed.
        busy_s: Seconds in forward passes.
        bytes_moved: Weights plus distinct KV read (bytes).
    """

    tokens: int = 0
    peak_tokens: int = 0
    resident_token_rounds: int = 0
    rounds: int = 0
    path_tokens: int = 0
    busy_s: float = 0.0
    bytes_moved: int = 0

    @property
    def mean_tokens(self) -> float:
        """Mean KV tokens resident over rounds."""
        return self.resident_token_rounds / self.rounds if self.rounds else 0.0


class PrmVerifier:
    """Scores steps with a token-classification PRM; every token is read once, ever.

    Args:
        runner: The PRM's, shared with other searches.
        format: What the PRM reads.
        problem: What is being solved.
        search: Name of this search among those of the runner.

    Raises:
        ContextLengthError: The problem leaves no room for a step.
    """

    def __init__(self, runner: Runner, format: PrmFormat, problem: str, search: Hashable) -> None:
        """See the class."""
        self._runner = runner
        self._format = format
        self._search = search
        self._root_ids = format.root_ids(problem)
        if len(self._root_ids) >= runner.context_tokens:
            raise ContextLengthError(
                f"the verifier reads the problem as {len(self._root_ids)} tokens, its context has "
                f"{runner.context_tokens}; shorten the problem or take a verifier with a longer context"
            )
        self._handles: dict[int, int] = {}  # nodes whose KV is held
        self.usage = VerifierUsage()

    def score(self, nodes: Sequence[int], parents: Sequence[int], texts: Sequence[str]) -> list[float]:
        """Probability that all is right up to each step; NaN where the context or the KV pool is too small for it."""
        tree, stats = self._runner.tree, self._runner.stats
        busy_s, moved_bytes = stats.busy_s, stats.bytes_moved
        rows: dict[int, tuple[int, list[int]]] = {}
        if self._open_root():
            for node, parent, text in zip(nodes, parents, texts, strict=True):
                above, ids = self._handles[parent], self._format.step_ids(text)
                if tree.path_tokens(above) + len(ids) <= self._runner.context_tokens:
                    self._handles[node] = tree.fork(above)
                    rows[node] = (self._handles[node], ids)
        scores = self._read(rows)
        self._count([rows[node] for node in scores])
        for node in rows.keys() - scores.keys():
            tree.release(self._handles.pop(node))
        self.usage.busy_s += stats.busy_s - busy_s
        self.usage.bytes_moved += stats.bytes_moved - moved_bytes
        return [scores.get(node, float("nan")) for node in nodes]

    def _open_root(self) -> bool:
        """Read the problem once; whether there was room for it."""
        if self.usage.tokens:
            return True
        self._handles[0] = self._runner.tree.root(owner=self._search)
        try:
            self._runner.extend_last([(self._handles[0], self._root_ids)])
        except PoolExhaustedError:
            self._runner.tree.release(self._handles.pop(0))
            return False
        self.usage.tokens = self.usage.path_tokens = len(self._root_ids)
        return True

    def _read(self, rows: dict[int, tuple[int, list[int]]]) -> dict[int, float]:
        """Score as many rows as the pool holds, in one batch if it can be."""
        if not rows:
            return {}
        try:
            hidden = self._runner.extend_last(list(rows.values()))  # [B, hidden]
        except PoolExhaustedError:
            if len(rows) == 1:
                return {}
            half = len(rows) // 2
            return self._read(dict(islice(rows.items(), half))) | self._read(dict(islice(rows.items(), half, None)))
        right = self._runner.logits(hidden).float().softmax(-1)[:, self._format.right]  # [B]
        return dict(zip(rows, right.tolist(), strict=True))

    def _count(self, rows: Sequence[tuple[int, list[int]]]) -> None:
        usage, tree = self.usage, self._runner.tree
        extended = {tree.parent(handle) for handle, _ in rows}
        usage.path_tokens += sum(tree.path_tokens(handle) for handle, _ in rows) - sum(map(tree.path_tokens, extended))
        usage.tokens += sum(len(ids) for _, ids in rows)
        resident = tree.resident_tokens_of(self._search)
        usage.peak_tokens = max(usage.peak_tokens, resident)
        usage.resident_token_rounds += resident
        usage.rounds += 1

    def retain(self, leaves: Sequence[int]) -> None:
        """Free the KV of every path that leads to none of these nodes, at once."""
        kept = {leaf: self._handles[leaf] for leaf in leaves if leaf in self._handles}
        for node, handle in self._handles.items():
            if node not in kept:
                self._runner.tree.release(handle)
        self._handles = kept

    def close(self) -> None:
        """Free everything this search holds."""
        self.retain(())


class CallableVerifier:
    """Scores steps with a plain function, a unit test or an exact checker, say; it has no KV.

    Args:
        scorer: Called once per step with the problem and the steps up to it.
        problem: What is being solved.

    Example:
        >>> verifier = CallableVerifier(lambda problem, steps: 1.0 if "4" in steps[-1] else 0.0, "2+2=?")
        >>> verifier.score([1, 2], [0, 0], ["so 4", "so 5"])
        [1.0, 0.0]
        >>> verifier.score([3], [1], ["it is 4"])
        [1.0]
    """

    def __init__(self, scorer: StepScorer, problem: str) -> None:
        """See the class."""
        self._scorer = scorer
        self._problem = problem
        self._paths: dict[int, tuple[str, ...]] = {0: ()}
        self._has_failed = False

    def score(self, nodes: Sequence[int], parents: Sequence[int], texts: Sequence[str]) -> list[float]:
        """One score per step; NaN where the function raises: that branch has failed, the search goes on.

        The first error of a search is logged as a warning.
        """
        return [self._score(*one) for one in zip(nodes, parents, texts, strict=True)]

    def _score(self, node: int, parent: int, text: str) -> float:
        self._paths[node] = (*self._paths[parent], text)
        try:
            return float(self._scorer(self._problem, self._paths[node]))
        except Exception as error:
            if not self._has_failed:
                _LOGGER.warning("the verifier function failed on %r: %r; such branches end", text, error)
            self._has_failed = True
            return float("nan")

    def retain(self, leaves: Sequence[int]) -> None:
        """Forget every other path."""
        self._paths = {leaf: self._paths[leaf] for leaf in leaves}

    def close(self) -> None:
        """Nothing is held."""
