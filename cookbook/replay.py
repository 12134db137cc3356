"""Search trees as replays: which nodes get how many children of how many tokens, round by round; it knows no model.

A replay comes from a recorded search (`ets bench --trace`, `ets solve --json --tree`), from a JSON file of trees, or is
grown by the package's own search loop and selectors over a random tree. `bench_search.py` runs them through models.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ets_engine.config import SearchConfig, Strategy
from ets_engine.errors import ConfigError
from ets_engine.evaluation.tree_page import read_trace
from ets_engine.search import search
from ets_engine.search.drivers import run
from ets_engine.types import Step, StopReason


@dataclass(frozen=True, slots=True)
class Round:
    """One expansion: every child is decoded in the same batch.

    Attributes:
        parents: Node above each child. Shape [W], W >= 1.
        num_tokens: Of each child's step, >= 1. Shape [W].
    """

    parents: tuple[int, ...]
    num_tokens: tuple[int, ...]

    @property
    def retained(self) -> tuple[int, ...]:
        """Leaves that go on; the KV that only others hold is free before the first child is decoded."""
        return tuple(dict.fromkeys(self.parents))


class DecodeStep(NamedTuple):
    """One token for every live branch.

    Attributes:
        rows: Branches (count).
        read_tokens: Distinct tokens whose K/V it reads, the new ones included.
        resident_tokens: Tokens whose K/V is held when it is done.
    """

    rows: int
    read_tokens: int
    resident_tokens: int


@dataclass(frozen=True, slots=True)
class Replay:
    """One search as its model sees it. Node 0 is the prompt; children are numbered 1, 2, ... round by round.

    Attributes:
        name: Where it comes from.
        prompt_tokens: Of the root, >= 1.
        rounds: In order, at least one.

    Example:
        >>> tree = Replay("two", 10, (Round((0, 0), (3, 1)), Round((1, 1), (2, 2))))
        >>> tree.generated_tokens, tree.longest_path_tokens, [one.retained for one in tree.rounds]
        (8, 15, [(0,), (1,)])
        >>> [tuple(step) for step in decode_steps(tree)]
        [(1, 11, 11), (1, 12, 12), (1, 13, 13), (2, 15, 15)]
    """

    name: str
    prompt_tokens: int
    rounds: tuple[Round, ...]

    @property
    def generated_tokens(self) -> int:
        """Tokens of every node but the prompt."""
        return sum(sum(one.num_tokens) for one in self.rounds)

    @property
    def longest_path_tokens(self) -> int:
        """Tokens of the longest path, prompt included."""
        paths = [self.prompt_tokens]
        for one in self.rounds:
            paths += [paths[parent] + count for parent, count in zip(one.parents, one.num_tokens, strict=True)]
        return max(paths)

    def numbered(self) -> Iterator[tuple[Round, range]]:
        """Each round with the numbers of its children."""
        first = 1
        for one in self.rounds:
            yield one, range(first, first + len(one.parents))
            first += len(one.parents)

    def cut(self, rounds: int | None) -> Replay:
        """Only the first rounds, None = all."""
        return replace(self, rounds=self.rounds[:rounds])


def decode_steps(tree: Replay) -> list[DecodeStep]:
    """Every forward pass after the prompt's, from the topology alone.

    As in `StepDecoder`, a step's last token is read when the step gets children, once per distinct parent.

    Returns:
        In order; of a round with steps of up to n tokens n passes, one fewer where the prompt is its parent.
    """
    parents, tokens = [-1], [tree.prompt_tokens]
    steps = []
    for one in tree.rounds:
        held = _path_tokens(one.retained, parents, tokens)
        if one.retained != (0,):
            steps.append(DecodeStep(len(one.retained), held, held))
        longest, known = max(one.num_tokens), {}
        for done in range(1, longest):
            above = tuple(parent for parent, count in zip(one.parents, one.num_tokens, strict=True) if count > done)
            if above not in known:
                known[above] = _path_tokens(above, parents, tokens)
            resident = held + sum(min(done, count - 1) for count in one.num_tokens)
            steps.append(DecodeStep(len(above), known[above] + len(above) * done, resident))
        parents += one.parents
        tokens += one.num_tokens
    return steps


def _path_tokens(nodes: Sequence[int], parents: Sequence[int], tokens: Sequence[int]) -> int:
    """Tokens on the union of the paths from the root to these nodes."""
    seen: set[int] = set()
    for node in nodes:
        while node >= 0 and node not in seen:
            seen.add(node)
            node = parents[node]
    return sum(tokens[node] for node in seen)


# ------------------------------------------------------------------ recorded trees


def from_nodes(name: str, parents: Sequence[int], num_tokens: Sequence[int]) -> Replay:
    """A replay of a tree, depth by depth; leaves without tokens (failed steps) are left out.

    Args:
        name: Of the replay.
        parents: Position of the node above each, -1 for the root, which comes first. Shape [N].
        num_tokens: Of each node. Shape [N].

    Raises:
        ConfigError: It is no such tree, holds no step, or a node without tokens has children.

    Example:
        >>> from_nodes("nested", [-1, 0, 1, 0], [10, 3, 2, 1]).rounds[0]
        Round(parents=(0, 0), num_tokens=(3, 1))
    """
    if len(parents) != len(num_tokens) or list(parents[:1]) != [-1] or num_tokens[0] < 1:
        raise ConfigError(f"{name}: {len(parents)} parents and {num_tokens[:1]!r} tokens are no tree below a prompt")
    depths = [0]
    for node, parent in enumerate(parents[1:], start=1):
        if not 0 <= parent < node or num_tokens[parent] < 1:
            raise ConfigError(f"{name}: node {node} hangs below {parent}, which must come first and have tokens")
        depths.append(depths[parent] + 1)
    numbers = {0: 0}
    rounds = []
    for depth in range(1, max(depths) + 1):
        nodes = [node for node in range(len(parents)) if depths[node] == depth and num_tokens[node] >= 1]
        if nodes:
            rounds.append(Round(tuple(numbers[parents[n]] for n in nodes), tuple(num_tokens[n] for n in nodes)))
        for node in nodes:
            numbers[node] = len(numbers)
    if not rounds:
        raise ConfigError(f"{name}: the tree holds no step")
    return Replay(name, num_tokens[0], tuple(rounds))


def read_traces(path: Path) -> list[Replay]:
    """The trees that `ets bench --trace` wrote below a folder, or what `ets solve --json --tree` printed into a file.

    Raises:
        ConfigError: There is none, or a file holds something else.
    """
    folder = path / "traces" if (path / "traces").is_dir() else path
    files = [path] if path.is_file() else sorted(folder.rglob("*.jsonl"))
    if not files:
        raise ConfigError(f"{path} holds no traces: give the --out folder of `ets bench --trace`")
    found = []
    for file in files:
        _, nodes = read_trace(file)
        place = {node.id: number for number, node in enumerate(nodes)} | {-1: -1}
        name = file.name if path.is_file() else file.relative_to(folder).with_suffix("").as_posix()
        found.append(from_nodes(name, [place[node.parent] for node in nodes], [node.num_tokens for node in nodes]))
    return found


def read_trees(path: Path) -> list[Replay]:
    """A JSON file `{"trees": [{"task", "index", "nodes": [[parent or -1, tokens], ...]}, ...]}`; node 0 is the prompt.

    Raises:
        ConfigError: It is none.
    """
    try:
        trees = json.loads(path.read_text(encoding="utf-8"))["trees"]
        named = [
            (f"{tree['task']}/{tree['index']}", [(parent, tokens) for parent, tokens in tree["nodes"]])
            for tree in trees
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{path} is no file of trees ({reason:.200}); see `read_trees` for the format") from None
    return [from_nodes(name, [parent for parent, _ in nodes], [tokens for _, tokens in nodes]) for name, nodes in named]


# ------------------------------------------------------------------ grown trees


@dataclass(frozen=True, slots=True)
class Workload:
    """What a synthetic search looks like; by default like MATH-500 solved by a small instruct model.

    Attributes:
        prompt_tokens: Of the problem and its instructions (count).
        min_step_tokens, max_step_tokens: A step has from here to there, all alike (count).
        depth: Steps of a usual trajectory: none finishes before `depth - 2`, all have ended at `depth + 2`.
    """

    prompt_tokens: int = 200
    min_step_tokens: int = 30
    max_step_tokens: int = 120
    depth: int = 10


MATH500 = Workload()
IDEAS = 4  # among the steps of one depth


class RandomTree:
    """Policy, verifier and embedder over one endless random tree; a node depends on the seed and its place alone.

    So two selectors that expand the same node see the same children, and their trees differ only as they choose. The
    logit of a score is autoregressive down the path. Every step follows one of the few ideas of its depth, which its
    embedding shows. The numbers are plausible, not measured: with twice the ideas, ETS keeps more leaves.

    Args:
        work: Sizes.
        seed: Of the tree.
    """

    def __init__(self, work: Workload, seed: int) -> None:
        """See the class."""
        self._work, self._seed = work, seed
        self._places = {0: f"tree/{seed}"}
        self._born = {0: 0}  # children of each node so far
        self._depths = {0: 0}
        self._logits = {0: 1.0}
        self._vectors: dict[int, NDArray[np.float64]] = {}

    def start(self) -> int:
        """Tokens of the prompt."""
        return self._work.prompt_tokens

    def expand(self, parents: Sequence[int], children: Sequence[int]) -> list[Step]:
        """Look up one child each."""
        return [self._step(parent, child) for parent, child in zip(parents, children, strict=True)]

    def _step(self, parent: int, child: int) -> Step:
        place = f"{self._places[parent]}.{self._born[parent]}"
        self._born[parent] += 1
        rng = Random(place)
        depth = self._depths[parent] + 1
        idea = Random(f"idea/{self._seed}/{depth}/{rng.randrange(IDEAS)}")
        self._places[child], self._born[child], self._depths[child] = place, 0, depth
        self._vectors[child] = np.array([idea.gauss() + 0.2 * rng.gauss() for _ in range(16)])
        self._logits[child] = 1.0 + 0.7 * (self._logits[parent] - 1.0) + rng.gauss()
        finished = depth >= self._work.depth - 2 and rng.random() < 0.3
        num_tokens = rng.randint(self._work.min_step_tokens, self._work.max_step_tokens)
        return Step("", num_tokens, StopReason.FINISHED if finished else StopReason.BOUNDARY)

    def score(self, nodes: Sequence[int], parents: Sequence[int], texts: Sequence[str]) -> list[float]:
        """Correlated along a path."""
        return [1.0 / (1.0 + math.exp(-self._logits[node])) for node in nodes]

    def embed(self, nodes: Sequence[int], texts: Sequence[str]) -> NDArray[np.float64]:
        """Shape [L, 16]."""
        return np.stack([self._vectors[node] for node in nodes])

    def retain(self, leaves: Sequence[int]) -> None:
        """Nothing is held."""


def grow(strategy: Strategy, width: int, work: Workload = MATH500, seed: int = 0) -> Replay:
    """A search of the package's own loop and selector over a random tree.

    Example:
        >>> grow("rebase", 2, Workload(prompt_tokens=9, min_step_tokens=2, max_step_tokens=4, depth=2)).name
        'rebase@2'
    """
    config = SearchConfig(
        strategy=strategy,
        width=width,
        max_steps=work.depth + 2,
        max_step_tokens=work.max_step_tokens,
        max_tokens=(work.depth + 2) * work.max_step_tokens,
        seed=seed,
    )
    random = RandomTree(work, seed)
    nodes = run(search(config), random, random, random).nodes
    return from_nodes(f"{strategy}@{width}", [node.parent for node in nodes], [node.step.num_tokens for node in nodes])
