"""What is measured: a search strategy at a width, and the votes over its trajectories that are reported."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import get_args

from ets_engine.config import SearchConfig, Strategy, Vote
from ets_engine.errors import ConfigError

ALL_VOTES: tuple[Vote, ...] = ("majority", "weighted", "best")
STRATEGIES: tuple[str, ...] = ("greedy", *(name for name in get_args(Strategy) if name != "greedy"))


@dataclass(frozen=True, slots=True)
class Method:
    """One row of the comparison before its votes are told apart.

    Attributes:
        strategy: As in `SearchConfig`.
        width: Trajectories kept alive (count); greedy has 1.
        note: What sets it apart from the same strategy and width, empty = nothing.
    """

    strategy: Strategy
    width: int
    note: str = ""

    @property
    def name(self) -> str:
        """As the tables call it, e.g. "ets@16"."""
        name = "greedy" if self.strategy == "greedy" else f"{self.strategy}@{self.width}"
        return f"{name} {self.note}".strip()

    @property
    def votes(self) -> tuple[Vote, ...]:
        """The votes that are reported: all of them where trajectories are sampled alike, else the weighted one."""
        return ALL_VOTES if self.strategy == "best_of_n" else ("weighted",)

    def label(self, vote: str) -> str:
        """A table row's name: "majority@16" for majority vote, "best_of_n@16" for the best trajectory."""
        if self.strategy != "best_of_n":
            return self.name
        names = {"majority": "majority", "weighted": "weighted", "best": "best_of_n"}
        return f"{names[vote]}@{self.width} {self.note}".strip()

    def config(self, base: SearchConfig, seed: int) -> SearchConfig:
        """Settings of one search: `base`, with this strategy and width, and every answer in its result."""
        changes = {"strategy": self.strategy, "width": self.width, "seed": seed, "n_candidates": self.width}
        return SearchConfig(**{**base.model_dump(), **changes})


def methods_of(strategies: Iterable[str], widths: Sequence[int]) -> list[Method]:
    """Every strategy at every width, cheapest first; greedy once.

    Raises:
        ConfigError: An unknown strategy, a width below 1, or none of either.

    Example:
        >>> [method.name for method in methods_of(["greedy", "ets"], [16, 64])]
        ['greedy', 'ets@16', 'ets@64']
    """
    names = list(dict.fromkeys(strategies))
    if not names or not list(widths):
        raise ConfigError(f"strategies={names} at widths={list(widths)}: name at least one of each")
    for name in names:
        if name not in STRATEGIES:
            raise ConfigError(f"strategy={name!r} is unknown: choose among {', '.join(STRATEGIES)}")
    found: dict[str, Method] = {}
    for width in sorted(set(widths)):
        if width < 1:
            raise ConfigError(f"width={width}: keep at least one trajectory alive")
        for name in names:
            method = Method(name, 1 if name == "greedy" else width)  # type: ignore[arg-type]
            found.setdefault(method.name, method)
    return list(found.values())
