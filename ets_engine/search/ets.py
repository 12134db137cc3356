"""ETS (arXiv 2502.13575): keep the leaves worth their KV, then split the width over them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from ets_engine.config import MAX_LAMBDA
from ets_engine.errors import ConfigError, ContextLengthError
from ets_engine.protocols import Frontier, Selection
from ets_engine.search.allocate import ceil_shares, floor_one_shares, scatter
from ets_engine.search.cluster import cluster_steps
from ets_engine.search.problem import KeepProblem
from ets_engine.search.selectors import check_positive
from ets_engine.search.solver import solve
from ets_engine.types import LeafVerdict

_PUBLISHED_BONUS = 1e-4  # the published stand-in for lambda_b = 0: a bonus per node, so that everything is kept


@dataclass(frozen=True, slots=True)
class Ets:
    """Efficient tree search: reward minus the price of the KV held, plus semantic coverage, maximised exactly.

    The reward of a leaf is the part of the width that REBASE would give it. The price of the whole tree is `lambda_b`,
    the worth of covering every cluster of steps `lambda_d`.

    Ours (the default): a node is priced by its tokens (the prompt, which no selection can free, has no price; tokens
    that siblings happen to share are priced for each, which found as many answers as pricing them once); every
    kept leaf gets a child before the rest is split by softmax; `kv_budget_tokens` is never exceeded. `node_cost` and
    `ceil_split` take one of the published choices each, and leave all else ours.

    Published: every node, the root included, costs the same; the width is split by the sequential ceiling rule, which
    may leave kept leaves without a child; `lambda_b = 0` becomes a bonus of 1e-4 per node, so that everything is kept.
    Deviations from the published code: masses are float64 suffix sums, so that the shares sum to the width exactly;
    the prompt counts by its tokens; one cluster is formed when all steps are equal, a constant in the objective; a
    step without a score is a failed branch that keeps its place in the width, not a dropped one. Settings are not part
    of the rule: the paper's runs used `cluster_cut` 0.05 and `lambda_d` 1.5, 1.4, 1.45 at widths 16, 64, 256.

    Attributes:
        lambda_b: Price of keeping the whole tree. Dimensionless, >= 0.
        lambda_d: Worth of full semantic coverage. Dimensionless, >= 0; 0 needs no embeddings (ETS-KV).
        cluster_cut: Cosine distance at which steps stop being the same idea, in [0, 2].
        softmax_temperature: Temperature over step scores, > 0.
        node_cost: "tokens" or "nodes"; None = "nodes" when published, else "tokens".
        ceil_split: Split the width by the sequential ceiling rule although not all is published.
        published: Follow the published rule.
        kv_budget_tokens: Kept paths plus `max_step_tokens` for every child stay within this, None = no cap.

    Raises:
        ConfigError: A setting is out of range or contradicts `published`.

    Example:
        >>> leaves = Frontier((-1, 0, 0, 0), (9, 5, 5, 5), (1, 2, 3), (0.2, 0.9, 0.8), (0, 1, 2), depth=1)
        >>> Ets(lambda_b=0.5, lambda_d=0.0).select(leaves, open_width=4).shares
        (0, 2, 2)
        >>> Ets(lambda_b=1.0, lambda_d=0.0).select(leaves, open_width=4).shares
        (0, 4, 0)
    """

    lambda_b: float = 1.0
    lambda_d: float = 1.0
    cluster_cut: float = 0.2
    softmax_temperature: float = 0.2
    node_cost: Literal["tokens", "nodes"] | None = None
    ceil_split: bool = False
    published: bool = False
    kv_budget_tokens: int | None = None

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        for name in ("lambda_b", "lambda_d"):
            value = getattr(self, name)
            if not 0 <= value <= MAX_LAMBDA:
                raise ConfigError(f"{name}={value}: must be a number from 0 to {MAX_LAMBDA:g}")
        if not 0 <= self.cluster_cut <= 2:
            raise ConfigError(f"cluster_cut={self.cluster_cut}: a cosine distance lies in [0, 2]")
        check_positive("softmax_temperature", self.softmax_temperature)
        if self.node_cost not in (None, "tokens", "nodes"):
            raise ConfigError(f"node_cost={self.node_cost!r}: must be 'tokens', 'nodes' or None")
        if self.kv_budget_tokens is not None and self.kv_budget_tokens < 1:
            raise ConfigError(f"kv_budget_tokens={self.kv_budget_tokens}: must be >= 1, or None for no cap")
        if self.published and self.node_cost == "tokens":
            raise ConfigError("node_cost='tokens': the published rule prices nodes; drop node_cost or published=True")
        if self.published and self.kv_budget_tokens is not None:
            raise ConfigError(f"kv_budget_tokens={self.kv_budget_tokens}: the published rule has no KV budget")

    @property
    def needs_embeddings(self) -> bool:
        """Whether coverage counts."""
        return self.lambda_d > 0

    def select(self, frontier: Frontier, open_width: int) -> Selection:
        """Keep the best set of leaves and split the width over it.

        Raises:
            ContextLengthError: Not even the shortest path and one child fit `kv_budget_tokens`.
        """
        num_leaves = len(frontier.leaves)
        if open_width < 1:
            return Selection((0,) * num_leaves)
        problem = self.problem(frontier, open_width)
        children = open_width
        if self.kv_budget_tokens is not None:
            problem = _reserve_children(problem, self.kv_budget_tokens, frontier, open_width)
        kept = solve(problem)
        if self.kv_budget_tokens is not None and frontier.max_step_tokens > 0:
            left_tokens = self.kv_budget_tokens - _path_tokens(problem, frontier, kept)
            children = min(open_width, left_tokens // frontier.max_step_tokens)
        split = ceil_shares if self.published or self.ceil_split else floor_one_shares
        shares = split([frontier.scores[leaf] for leaf in kept], children, temperature=self.softmax_temperature)
        spread = scatter(shares, kept, num_leaves)
        return Selection(spread, _verdicts(problem, kept, spread))

    def problem(self, frontier: Frontier, open_width: int) -> KeepProblem:
        """The pruning problem of this frontier, without the KV budget; `open_width` >= 1.

        Raises:
            ValueError: Coverage counts, and a frontier of several leaves has no embeddings.
        """
        shares = ceil_shares(frontier.scores, open_width, temperature=self.softmax_temperature)
        clusters = self._clusters(frontier)
        return KeepProblem(
            parents=frontier.parents,
            leaves=frontier.leaves,
            rewards=tuple(share / open_width for share in shares),
            prices=self._prices(frontier),
            clusters=clusters,
            cluster_worth=self.lambda_d / (1 + max(clusters)) if clusters else 0.0,
            max_kept=None if self.published or len(frontier.leaves) <= open_width else open_width,
        )

    def _prices(self, frontier: Frontier) -> tuple[float, ...]:
        """Price of each node, lambda_b included. Shape [N]."""
        count = len(frontier.parents)
        if self.published and self.lambda_b == 0:
            return (-_PUBLISHED_BONUS,) * count
        if self.published or self.node_cost == "nodes":
            return (self.lambda_b / count,) * count
        total_tokens = sum(frontier.num_tokens[1:])
        price = self.lambda_b / total_tokens if total_tokens else 0.0
        return (0.0, *(price * tokens for tokens in frontier.num_tokens[1:]))

    def _clusters(self, frontier: Frontier) -> tuple[int, ...]:
        """Cluster of each leaf, or () when coverage does not count. Shape [L] or [0]."""
        if not self.needs_embeddings:
            return ()
        if len(frontier.leaves) == 1:
            return (0,)
        if frontier.embeddings is None:
            raise ValueError(f"{len(frontier.leaves)} leaves need embeddings, got None; pass an embedder or lambda_d=0")
        return cluster_steps(frontier.embeddings, self.cluster_cut)


EtsKv = partial(Ets, lambda_d=0.0)
"""ETS without coverage, `Ets(lambda_d=0.0, ...)`: no embeddings, solved by a linear-time tree program."""


def _reserve_children(problem: KeepProblem, budget_tokens: int, frontier: Frontier, open_width: int) -> KeepProblem:
    """The problem under a hard budget: the whole width is set aside if the best path fits too, else one child a leaf.

    The best is that of the leaf with the largest reward, then score: a width that only lesser ones fit beside is not
    worth having.

    Raises:
        ContextLengthError: Not even the shortest path and one child fit.
    """
    step_tokens = frontier.max_step_tokens
    paths = [_path_tokens(problem, frontier, [leaf]) for leaf in range(len(frontier.leaves))]
    shortest = min(paths)
    best = max(range(len(paths)), key=lambda leaf: (problem.rewards[leaf], frontier.scores[leaf], -paths[leaf]))
    if shortest + step_tokens > budget_tokens:
        raise ContextLengthError(
            f"the shortest path ({shortest} tokens) and a step ({step_tokens}) need {shortest + step_tokens}"
            f" KV tokens, kv_budget_tokens={budget_tokens}; raise kv_budget_tokens or lower max_step_tokens"
        )
    reserved = open_width * step_tokens
    sizes = list(frontier.num_tokens)
    if paths[best] + reserved > budget_tokens:
        reserved = 0
        for node in frontier.leaves:
            sizes[node] += step_tokens
    return replace(problem, sizes=tuple(sizes), capacity=budget_tokens - reserved)


def _verdicts(problem: KeepProblem, kept: tuple[int, ...], spread: tuple[int, ...]) -> tuple[LeafVerdict, ...]:
    """Each term of the objective for each leaf, given the other kept ones. Shape [L]."""
    chosen = set(kept)
    own, path = problem.own_prices(), problem.path_prices(chosen)
    coverage = problem.cluster_gains(chosen) or [None] * len(own)
    clusters = problem.clusters or (-1,) * len(own)
    return tuple(
        LeafVerdict(
            node=node,
            share=spread[leaf],
            reward=problem.rewards[leaf],
            node_cost=own[leaf],
            cluster=clusters[leaf],
            path_cost=path[leaf],
            coverage=coverage[leaf],
            starved=leaf in chosen and not spread[leaf],
        )
        for leaf, node in enumerate(problem.leaves)
    )


def _path_tokens(problem: KeepProblem, frontier: Frontier, kept: tuple[int, ...] | list[int]) -> int:
    return sum(frontier.num_tokens[node] for node in problem.held(kept))
