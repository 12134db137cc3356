"""What a search asks its driver for; plain values, and the signal that ends a search early."""

from __future__ import annotations

from dataclasses import dataclass

from ets_engine.types import SearchEvent


@dataclass(frozen=True, slots=True)
class Start:
    """Read the prompt as node 0; send back its tokens (count)."""


@dataclass(frozen=True, slots=True)
class Expand:
    """Propose a step for each child in one batch; send back the `Step`s, in order.

    Attributes:
        parents: Node above each child, children of one parent side by side. Shape [W].
        children: Ids reserved for the children, ascending. Shape [W].
    """

    parents: tuple[int, ...]
    children: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Score:
    """Score each new node by its step; send back numbers in [0, 1], NaN for a branch that cannot be scored.

    Nodes that can neither go on nor vote (out of tokens, failed) are not asked for.

    Attributes:
        nodes: Shape [S], S >= 1.
        parents: Node above each. Shape [S].
        texts: Step text of each. Shape [S].
    """

    nodes: tuple[int, ...]
    parents: tuple[int, ...]
    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Embed:
    """Embed the newest step of each open leaf; send back an array. Shape [L, D], L >= 2."""

    nodes: tuple[int, ...]
    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Retain:
    """Keep the paths to these nodes; every other node's KV is free, finished trajectories included. Send None."""

    leaves: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Progress:
    """Something to show; send None."""

    event: SearchEvent


Request = Start | Expand | Score | Embed | Retain | Progress


class StopSearch(Exception):
    """Thrown into a search (`gen.throw(StopSearch())`) at any request: it ends there with the tree so far."""
