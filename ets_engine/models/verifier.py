"""One search's PRM: it reads each new step once, equal ones together, in a KV tree of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ets_engine.errors import ContextLengthError, PoolExhaustedError
from ets_engine.models.paths import ancestors
from ets_engine.models.prm_formats import PrmFormat
from ets_engine.models.readouts import probabilities
from ets_engine.runtime import Runner

SCORE_DIGITS = 5  # the same step read in another batch differs in the seventh; equal steps must stay equal


@dataclass(slots=True)
class VerifierUsage:
    """What one search cost its verifier so far.

    Attributes:
        tokens: Tokens read (count).
        peak_tokens: Most KV tokens resident after a round.
        resident_token_rounds: Resident KV tokens summed over rounds.
        rounds: Batches scored (count).
        path_tokens: Whole paths of all nodes that nothing follows, summed.
        busy_s: Seconds of scoring, nearly all of them in forward passes.
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


class Reading(NamedTuple):
    """What a round of steps has to read.

    Attributes:
        rows: A new KV node and the ids to read for each step that fits the context and equals none before it.
        first: For each step, the first one that equals it on the whole path: itself, or one whose row serves both.
    """

    rows: dict[int, tuple[int, list[int]]]
    first: dict[int, int]


class PrmVerifier:
    """Scores steps with a PRM of any format; every token is read once, ever.

    A driver that serves several searches scores their steps in one batch with `score_together`.

    Args:
        runner: The PRM's, shared with other searches; its head gives what `probabilities` reads.
        format: What the PRM reads.
        problem: What is being solved.
        search: Name of this search among those of the runner.
        read_step: What is read of a step's text, None = all of it.
        merges: Whether equal steps are read once.

    Raises:
        ContextLengthError: The problem leaves no room for a step.
    """

    def __init__(
        self,
        runner: Runner,
        format: PrmFormat,
        problem: str,
        search: Hashable,
        read_step: Callable[[str], str] | None = None,
        *,
        merges: bool = True,
    ) -> None:
        """See the class."""
        self._runner = runner
        self._format = format
        self._search = search
        self._read_step = read_step
        self._merges = merges
        self._root_ids = format.root_ids(problem)
        if len(self._root_ids) >= runner.context_tokens:
            raise ContextLengthError(
                f"the verifier reads the problem as {len(self._root_ids)} tokens, its context has "
                f"{runner.context_tokens}; shorten the problem or take a verifier with a longer context"
            )
        self._paths: dict[int, tuple[int, list[int]]] = {0: (-1, self._root_ids)}  # kept paths: node -> parent, ids
        self._first = {0: 0}  # the node that stands for each in what follows: the first with an equal path
        self._ends: set[int] = {0}  # nodes that steps may follow
        self._handles: dict[int, int] = {}  # nodes whose KV is held: the ends, unless it was dropped
        self._followed: set[int] = set()  # nodes that steps follow
        self._shared_tokens = 0  # of the problem, whose KV is shared with other searches
        self.usage = VerifierUsage()

    def score(self, nodes: Sequence[int], parents: Sequence[int], texts: Sequence[str]) -> list[float]:
        """Probability that all is right up to each step; NaN where the context or the KV pool is too small for it."""
        return self.score_read(nodes, parents, self.read(texts))

    def read(self, texts: Sequence[str]) -> list[str]:
        """What the PRM is given of some steps: text that can be encoded, whatever was written.

        Raises:
            TypeError: `read_step` gave something else than text.
        """
        given = [text if self._read_step is None else self._read_step(text) for text in texts]
        if wrong := [one for one in given if not isinstance(one, str)]:
            raise TypeError(f"read_step gave {wrong[0]!r}; it has to return the text that the PRM reads")
        return [one.encode(errors="replace").decode() for one in given]

    def score_read(self, nodes: Sequence[int], parents: Sequence[int], texts: Sequence[str]) -> list[float]:
        """`score` of what `read` gave; where the KV pool is too small for all of it at once, in parts."""
        if not nodes:
            return []
        try:
            return score_together([(self, nodes, parents, texts)])[0]
        except PoolExhaustedError:
            if len(nodes) == 1:
                return [float("nan")]
            half = len(nodes) // 2
            parts = (slice(half), slice(half, None))
            return [score for part in parts for score in self.score_read(nodes[part], parents[part], texts[part])]

    def open(self) -> None:
        """Read whatever the kept paths hold and the KV tree does not: the problem at first, all of it after `drop`.

        Raises:
            PoolExhaustedError: The pool is full; nothing has changed.
        """
        missing = self._ends - self._handles.keys()
        if not missing:
            return
        tree = self._runner.tree
        opened: dict[int, int] = {}
        try:
            for node in ancestors(missing, self._paths):
                parent, ids = self._paths[node]
                if parent >= 0:
                    opened[node] = tree.fork(opened[parent], fill_page=True)
                    self._runner.extend_last([(opened[node], ids)])
                else:
                    opened[node], unread = self.begin()
                    self._runner.extend_last([(opened[node], unread)])
                    self._shared_tokens = self._runner.prefixes.remember(ids, opened[node])
        except BaseException:
            for handle in opened.values():
                tree.release(handle)
            raise
        for node in opened.keys() - missing:
            tree.release(opened.pop(node))
        self._keep(opened)

    @property
    def is_new(self) -> bool:
        """Whether the problem is all there is, and it is not read."""
        return not self._handles and self._ends == {0}

    def begin(self) -> tuple[int, list[int]]:
        """A KV node for the problem, and what of it is to be read there."""
        handle, known = self._runner.prefixes.begin(self._root_ids, owner=self._search)
        return handle, list(self._root_ids[known:])

    def accept_problem(self, handle: int) -> None:
        """The problem was read there."""
        self._shared_tokens = self._runner.prefixes.remember(self._root_ids, handle)
        self._keep({0: handle})

    def _keep(self, opened: Mapping[int, int]) -> None:
        if not self.usage.tokens:
            self.usage.tokens = self.usage.path_tokens = len(self._root_ids)
        self._handles |= opened

    def plan(self, nodes: Sequence[int], parents: Sequence[int], texts: Sequence[str]) -> Reading:
        """Where some steps are to be read, of which `read` gave the texts."""
        reading = Reading({}, {})
        try:
            self._place(reading, nodes, parents, texts)
        except BaseException:
            for handle, _ in reading.rows.values():
                self._runner.tree.release(handle)
            raise
        return reading

    def _place(self, reading: Reading, nodes: Sequence[int], parents: Sequence[int], texts: Sequence[str]) -> None:
        alike: dict[Hashable, int] = {}
        for node, parent, text in zip(nodes, parents, texts, strict=True):
            above, ids = self._first[parent], self._format.step_ids(text, is_first=parent == 0)
            equal = (above, tuple(ids)) if self._merges else node
            first = reading.first[node] = alike.setdefault(equal, node)
            handle = self._handles[above]
            if first == node and self._runner.tree.path_tokens(handle) + len(ids) <= self._runner.context_tokens:
                reading.rows[node] = self._runner.tree.fork(handle, fill_page=True), ids
                self._paths[node] = above, ids

    def accept(self, reading: Reading, parents: Sequence[int]) -> None:
        """Keep steps that were read, and count them; `parents` are those of the plan."""
        usage, tree, rows = self.usage, self._runner.tree, reading.rows
        pairs = [pair for pair in zip(reading.first.items(), parents, strict=True) if pair[0][1] in rows]
        followed = {parent for _, parent in pairs}
        usage.path_tokens += sum(tree.path_tokens(rows[first][0]) for (_, first), _ in pairs)
        usage.path_tokens -= sum(
            tree.path_tokens(self._handles[self._first[node]]) for node in followed - self._followed
        )
        self._followed |= followed
        self._first |= reading.first
        self._handles |= {node: handle for node, (handle, _) in rows.items()}
        self._ends |= rows.keys()
        usage.tokens += sum(len(ids) for _, ids in rows.values())
        resident = tree.resident_tokens_of(self._search) + self._shared_tokens
        usage.peak_tokens = max(usage.peak_tokens, resident)
        usage.resident_token_rounds += resident
        usage.rounds += 1

    def retain(self, leaves: Sequence[int]) -> None:
        """Free the KV of every path that leads to none of these nodes, at once."""
        kept = {self._first[leaf] for leaf in leaves if leaf in self._first} & self._ends
        for node in self._handles.keys() - kept:
            self._runner.tree.release(self._handles.pop(node))
        self._ends = kept
        self._paths = {node: self._paths[node] for node in ancestors(kept, self._paths)}
        self._first = {node: first for node, first in self._first.items() if first in kept}

    def drop(self) -> None:
        """Free all KV for now; it is computed again when it is needed."""
        for handle in self._handles.values():
            self._runner.tree.release(handle)
        self._handles = {}

    def close(self) -> None:
        """Free everything this search holds."""
        self.retain(())

    @property
    def root_tokens(self) -> int:
        """Tokens of the problem as the PRM reads it (count)."""
        return len(self._root_ids)

    @property
    def runner(self) -> Runner:
        """The PRM's, shared with other searches."""
        return self._runner


ScoreRequest = tuple[PrmVerifier, Sequence[int], Sequence[int], Sequence[str]]
"""A search's verifier; the new nodes, the node above each, what `PrmVerifier.read` gave of the step of each."""


def open_together(verifiers: Sequence[PrmVerifier]) -> None:
    """`PrmVerifier.open` for several verifiers of one PRM; problems that are new to it are read together.

    Where some begin alike beyond what the PRM knows, one of them goes first, so that the others find it.

    Raises:
        PoolExhaustedError: The pool is full; some may be open.
    """
    new = [one for one in verifiers if one.is_new]
    while len(new) > 1:
        runner, begun = new[0].runner, list[tuple[int, list[int]]]()
        try:
            for verifier in new:
                begun.append(verifier.begin())
            beginnings = [tuple(ids[: runner.tree.pool.page_tokens]) for _, ids in begun]
            first = {ids: place for place, ids in reversed([*enumerate(beginnings)])}
            runner.extend_last([begun[place] for place in first.values()])
        except BaseException:
            for handle, _ in begun:
                runner.tree.release(handle)
            raise
        for place in range(len(new)):
            if first[beginnings[place]] == place:
                new[place].accept_problem(begun[place][0])
            else:
                runner.tree.release(begun[place][0])
        new = [one for one in new if one.is_new]
    for verifier in verifiers:
        verifier.open()


def score_together(requests: Sequence[ScoreRequest]) -> list[list[float]]:
    """Score steps of several searches with their one PRM, in one batch.

    Returns:
        Per request, the probability that all is right up to each step; NaN where the context is too small for it.

    Raises:
        PoolExhaustedError: The pool is full; nothing is scored, and nothing has changed.
    """
    runner = requests[0][0].runner
    tree, stats = runner.tree, runner.stats
    began_s, moved_bytes = time.perf_counter(), stats.bytes_moved
    plans: list[Reading] = []
    try:
        open_together([verifier for verifier, *_ in requests])
        for verifier, nodes, parents, texts in requests:
            plans.append(verifier.plan(nodes, parents, texts))
        rows = [row for plan in plans for row in plan.rows.values()]
        right = probabilities(runner.logits(runner.extend_last(rows))).tolist() if rows else []  # [B]
    except BaseException:
        for plan in plans:
            for handle, _ in plan.rows.values():
                tree.release(handle)
        raise
    shares = [sum(len(ids) for _, ids in plan.rows.values()) for plan in plans]
    busy_s, moved_bytes = time.perf_counter() - began_s, stats.bytes_moved - moved_bytes
    stats.busy_s += busy_s
    found: list[list[float]] = []
    first = 0
    for (verifier, nodes, parents, _), plan, share in zip(requests, plans, shares, strict=True):
        verifier.accept(plan, parents)
        verifier.usage.busy_s += busy_s * share / max(1, sum(shares))
        verifier.usage.bytes_moved += round(moved_bytes * share / max(1, sum(shares)))
        chances = [round(chance, SCORE_DIGITS) for chance in right[first : first + len(plan.rows)]]
        first += len(plan.rows)
        scores = dict(zip(plan.rows, chances, strict=True))
        found.append([scores.get(plan.first[node], float("nan")) for node in nodes])
    return found
