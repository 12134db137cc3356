"""One search's verifier: a PRM that reads each new step once in a KV tree of its own, or a plain function."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from ets_engine.errors import PoolExhaustedError
from ets_engine.models.formats import PrmFormat
from ets_engine.runtime import Runner

StepScorer = Callable[[str, Sequence[str]], float]
"""`scorer(problem, steps)`: how good the last of these steps is after the others, in [0, 1]."""


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
    """

    def __init__(self, runner: Runner, format: PrmFormat, problem: str, search: Hashable) -> None:
        """See the class."""
        self._runner = runner
        self._format = format
        self._search = search
        self._root_ids = format.root_ids(problem)
        self._handles: dict[int, int] = {}  # nodes whose KV is held
        self.usage = VerifierUsage()

    def score(self, nodes: Sequence[int], parents: Sequence[int], texts: Sequence[str]) -> list[float]:
        """Probability that all is right up to each step; NaN where the context or the KV pool is too small."""
        runner, tree, stats = self._runner, self._runner.tree, self._runner.stats
        busy_s, moved_bytes = stats.busy_s, stats.bytes_moved
        scores = {node: float("nan") for node in nodes}
        try:
            self._open_root()
            rows: dict[int, tuple[int, list[int]]] = {}
            extended: set[int] = set()
            for node, parent, text in zip(nodes, parents, texts, strict=True):
                above, ids = self._handles.get(parent), self._format.step_ids(text)
                if above is not None and tree.path_tokens(above) + len(ids) <= runner.context_tokens:
                    self._handles[node] = tree.fork(above)
                    rows[node] = (self._handles[node], ids)
                    extended.add(above)
            if rows:
                hidden = runner.extend_last(list(rows.values()))  # [B, hidden]
                right = runner.logits(hidden).float().softmax(-1)[:, self._format.right]
                scores |= zip(rows, right.tolist(), strict=True)
                handles, ids = zip(*rows.values(), strict=True)
                self._count(handles, sum(map(len, ids)), extended)
        except PoolExhaustedError:
            pass  # the branches of this round fail, the search goes on with what it has
        self.usage.busy_s += stats.busy_s - busy_s
        self.usage.bytes_moved += stats.bytes_moved - moved_bytes
        return list(scores.values())

    def _open_root(self) -> None:
        if self.usage.tokens:
            return
        root = self._runner.tree.root(owner=self._search)
        self._handles[0] = root
        self._runner.extend_last([(root, self._root_ids)])
        self.usage.tokens = self.usage.path_tokens = len(self._root_ids)

    def _count(self, handles: Sequence[int], num_tokens: int, extended: set[int]) -> None:
        usage, tree = self.usage, self._runner.tree
        usage.path_tokens += sum(map(tree.path_tokens, handles)) - sum(map(tree.path_tokens, extended))
        usage.tokens += num_tokens
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

    def score(self, nodes: Sequence[int], parents: Sequence[int], texts: Sequence[str]) -> list[float]:
        """One score per step; NaN where the function raises: that branch has failed, the search goes on."""
        return [self._score(*one) for one in zip(nodes, parents, texts, strict=True)]

    def _score(self, node: int, parent: int, text: str) -> float:
        self._paths[node] = (*self._paths[parent], text)
        try:
            return float(self._scorer(self._problem, self._paths[node]))
        except Exception:
            return float("nan")

    def retain(self, leaves: Sequence[int]) -> None:
        """Forget every other path."""
        self._paths = {leaf: self._paths[leaf] for leaf in leaves}

    def close(self) -> None:
        """Nothing is held."""
