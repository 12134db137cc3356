"""Test doubles for the seams of a search, shipped so that users test without a model; no torch is imported."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence

from ets_engine.errors import ProtocolError
from ets_engine.lexical import HashEmbedder
from ets_engine.types import Step, StopReason

__all__ = ["FakePolicy", "HashEmbedder", "TableVerifier", "hash_score"]

_WORDS = ("add", "both", "sides", "so", "x", "is", "then", "half", "twice", "sum")


def hash_score(text: str) -> float:
    """A score in [0, 1) that depends on the text alone, the same in every process.

    Example:
        >>> hash_score("so x is 5") == hash_score("so x is 5") != hash_score("so x is 6")
        True
    """
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64


class FakePolicy:
    """A policy of made-up text that keeps account of its KV cache like a real one.

    Without a script, the step of a node depends on `(seed, node)` alone. A script lists the steps of each `expand`
    call. Extending a node whose KV was freed is refused, as an engine would.

    Args:
        seed: Same seed, same steps.
        prompt_tokens: Tokens that `start` reports.
        max_step_tokens: Most tokens of a made-up step, one per word.
        finish_chance: Chance that a made-up step ends its solution.
        script: Steps of the first, second, ... call of `expand`.

    Attributes:
        retained: Leaves of every `retain` call, in order.
        expanded: Parents of every `expand` call, in order.
        resident: Tokens of each node whose KV is held now, by node.
        peak_tokens: Most tokens that were resident at once.

    Example:
        >>> policy = FakePolicy(prompt_tokens=8, script=[[Step("a", 2), Step("b", 3)], [Step("c", 1)]])
        >>> policy.start()
        8
        >>> [step.text for step in policy.expand([0, 0], [1, 2])]
        ['a', 'b']
        >>> policy.retain([2])
        >>> policy.resident_tokens, policy.peak_tokens
        (11, 13)
        >>> policy.expand([1], [3])
        Traceback (most recent call last):
        ets_engine.errors.ProtocolError: node 1 is not resident: it was not retained
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        prompt_tokens: int = 8,
        max_step_tokens: int = 12,
        finish_chance: float = 0.2,
        script: Sequence[Sequence[Step]] | None = None,
    ) -> None:
        """See the class."""
        self._seed = seed
        self._prompt_tokens = prompt_tokens
        self._max_step_tokens = max_step_tokens
        self._finish_chance = finish_chance
        self._script = None if script is None else list(script)
        self._parents: dict[int, int] = {0: -1}
        self.retained: list[tuple[int, ...]] = []
        self.expanded: list[tuple[int, ...]] = []
        self.resident: dict[int, int] = {}
        self.peak_tokens = 0

    @property
    def resident_tokens(self) -> int:
        """Tokens whose KV is held now."""
        return sum(self.resident.values())

    def start(self) -> int:
        """Read the prompt as node 0."""
        self.resident[0] = self._prompt_tokens
        self.peak_tokens = max(self.peak_tokens, self.resident_tokens)
        return self._prompt_tokens

    def expand(self, parents: Sequence[int], children: Sequence[int]) -> list[Step]:
        """The script's next steps, or made-up ones.

        Raises:
            ProtocolError: A parent is not resident, a child id is taken, or the script does not fit.
        """
        for parent, child in zip(parents, children, strict=True):
            if parent not in self.resident:
                raise ProtocolError(f"node {parent} is not resident: it was not retained")
            if child in self._parents:
                raise ProtocolError(f"node {child} exists already")
            self._parents[child] = parent
        self.expanded.append(tuple(parents))
        if self._script is None:
            steps = [self._invent(child) for child in children]
        elif not self._script:
            raise ProtocolError(f"the script ends before expand call {len(self.expanded)}")
        else:
            steps = list(self._script.pop(0))
        for child, step in zip(children, steps, strict=False):  # a wrong number of steps is the loop's to refuse
            self.resident[child] = step.num_tokens
        self.peak_tokens = max(self.peak_tokens, self.resident_tokens)
        return steps

    def retain(self, leaves: Sequence[int]) -> None:
        """Keep the paths to these nodes.

        Raises:
            ProtocolError: One of them is not resident.
        """
        self.retained.append(tuple(leaves))
        kept: set[int] = set()
        for leaf in leaves:
            node = leaf
            while node >= 0:
                if node not in self.resident:
                    raise ProtocolError(f"node {node} is not resident: it was not retained")
                kept.add(node)
                node = self._parents[node]
        self.resident = {node: tokens for node, tokens in self.resident.items() if node in kept}

    def _invent(self, child: int) -> Step:
        draw = random.Random(f"{self._seed}:{child}")
        words = [draw.choice(_WORDS) for _ in range(draw.randint(1, self._max_step_tokens))]
        if draw.random() < self._finish_chance:
            words[-1] = str(draw.randint(1, 3))
            return Step("The answer is " + words[-1], len(words), StopReason.FINISHED)
        return Step(" ".join(words) + "\n\n", len(words))


class TableVerifier:
    """Scores each step by its text, from a table; a node may be scored once.

    Args:
        table: Score of each known step text.
        default: Score of any other text: a number, or a function of the text.

    Attributes:
        scored: Nodes of every `score` call, in order.
        retained: Leaves of every `retain` call, in order.

    Example:
        >>> verifier = TableVerifier({"so x is 5": 0.9}, default=0.1)
        >>> verifier.score([1, 2], [0, 0], ["so x is 5", "so x is 6"])
        [0.9, 0.1]
        >>> verifier.score([1], [0], ["so x is 5"])
        Traceback (most recent call last):
        ets_engine.errors.ProtocolError: node 1 was scored before
    """

    def __init__(
        self, table: Mapping[str, float] | None = None, *, default: float | Callable[[str], float] = hash_score
    ) -> None:
        """See the class."""
        self._table = dict(table or {})
        self._default = default
        self._seen: set[int] = set()
        self.scored: list[tuple[int, ...]] = []
        self.retained: list[tuple[int, ...]] = []

    def score(self, nodes: Sequence[int], parents: Sequence[int], texts: Sequence[str]) -> list[float]:
        """One score per node.

        Raises:
            ProtocolError: A node was scored before.
        """
        for node in nodes:
            if node in self._seen:
                raise ProtocolError(f"node {node} was scored before")
            self._seen.add(node)
        self.scored.append(tuple(nodes))
        return [self._look_up(text) for _, text in zip(parents, texts, strict=True)]

    def retain(self, leaves: Sequence[int]) -> None:
        """Note what to keep."""
        self.retained.append(tuple(leaves))

    def _look_up(self, text: str) -> float:
        if text in self._table:
            return self._table[text]
        return self._default(text) if callable(self._default) else self._default
