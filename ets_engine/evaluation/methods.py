"""What is measured: a search strategy at a width, perhaps with changed settings, and the votes that are reported."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from ets_engine.config import SearchConfig, Strategy, Vote
from ets_engine.errors import ConfigError
from ets_engine.search import build_selector

ALL_VOTES: tuple[Vote, ...] = ("majority", "weighted", "best")
VOTERS = {"majority": "majority", "weighted": "weighted", "best": "best_of_n"}  # a vote over samples alike, in tables
STRATEGIES: tuple[str, ...] = ("greedy", *(name for name in get_args(Strategy) if name != "greedy"))
FIXED = frozenset({"strategy", "width", "seed", "trace", "n_candidates", "vote"})  # decided by the bench itself

Changes = tuple[tuple[str, Any], ...]
"""Settings that differ from the bench's own, by name, in the order of `SearchConfig`."""

_SELECTING = frozenset(
    {
        *("keep", "softmax_temperature", "lambda_b", "lambda_d"),
        *("cluster_cut", "node_cost", "allocation", "kv_budget_tokens"),
    }
)  # settings that only the selector heeds


@dataclass(frozen=True, slots=True)
class Method:
    """One row of the comparison before its votes are told apart.

    Attributes:
        strategy: As in `SearchConfig`.
        width: Trajectories kept alive (count); greedy has 1.
        note: What sets it apart from the same strategy and width, empty = nothing.
        changes: Settings of its own.
    """

    strategy: Strategy
    width: int
    note: str = ""
    changes: Changes = ()

    @property
    def name(self) -> str:
        """As the tables call it, e.g. "ets@16" or "ets@16 lambda_b=0.5"."""
        return self._named("greedy" if self.strategy == "greedy" else f"{self.strategy}@{self.width}")

    @property
    def votes(self) -> tuple[Vote, ...]:
        """The votes that are reported: all of them where trajectories are sampled alike, else the weighted one."""
        return ALL_VOTES if self.strategy == "best_of_n" else ("weighted",)

    def label(self, vote: str) -> str:
        """A table row's name: "majority@16" for majority vote, "best_of_n@16" for the best trajectory."""
        if self.strategy != "best_of_n":
            return self.name
        return self._named(f"{VOTERS[vote]}@{self.width}")

    def config(self, base: SearchConfig, seed: int) -> SearchConfig:
        """Settings of one search: `base` with this method's own, and every answer in its result."""
        own = {"strategy": self.strategy, "width": self.width, "seed": seed, "n_candidates": self.width}
        return SearchConfig(**{**base.model_dump(), **dict(self.changes), **own})

    def check(self, base: SearchConfig) -> None:
        """Refuse what could not be searched, or would be the same search under another name.

        Raises:
            ConfigError: A setting contradicts the strategy, or has no effect with it.
        """
        plain, found = Method(self.strategy, self.width).config(base, 0), self.config(base, 0)
        selector = build_selector(found)
        for name, value in self.changes:
            if name not in _SELECTING or value == getattr(plain, name):
                continue
            others = {key: other for key, other in self.changes if key != name}
            without = build_selector(SearchConfig(**{**plain.model_dump(), **others}))
            if without == selector:
                raise ConfigError(f"{name}={value!r} has no effect with {self.strategy}: drop it")

    def _named(self, name: str) -> str:
        changes = [f"{key}={_written(value)}" for key, value in self.changes]
        return " ".join(part for part in (name, *changes, self.note) if part)


def split_name(name: str) -> tuple[str, int | None, str]:
    """Family, width and what else sets it apart, of a method's or a row's name.

    Example:
        >>> split_name("ets@16 lambda_b=0.5"), split_name("greedy")
        (('ets', 16, 'lambda_b=0.5'), ('greedy', None, ''))
    """
    head, _, note = name.partition(" ")
    family, _, width = head.partition("@")
    return family, int(width) if width else None, note


def label(method: str, vote: str) -> str:
    """A row's name, from the name of its method and its vote.

    Example:
        >>> label("best_of_n@16 top_p=0.9", "majority"), label("ets@16", "weighted")
        ('majority@16 top_p=0.9', 'ets@16')
    """
    head, space, note = method.partition(" ")
    family, _, width = head.partition("@")
    return f"{VOTERS[vote]}@{width}{space}{note}" if family == "best_of_n" else method


def parse_strategy(text: str) -> tuple[Strategy, Changes]:
    """A strategy and the settings that are its own, written `STRATEGY:NAME=VALUE:NAME=VALUE`.

    Raises:
        ConfigError: An unknown strategy or setting, a value out of range, or one that the bench decides itself.

    Example:
        >>> parse_strategy("ets:node_cost=nodes:lambda_b=.5")
        ('ets', (('lambda_b', 0.5), ('node_cost', 'nodes')))
    """
    name, *pairs = [part.strip() for part in text.split(":")]
    if name not in STRATEGIES:
        raise ConfigError(f"strategy={name!r} is unknown: choose among {', '.join(STRATEGIES)}")
    given = read_settings(pairs)
    if many := sorted(key for key, value in given.items() if not isinstance(value, int | float | str)):
        raise ConfigError(f"{text!r}: {', '.join(many)} must be one number or word here; use --setting for others")
    valid = SearchConfig(**given)
    return name, tuple((key, getattr(valid, key)) for key in SearchConfig.model_fields if key in given)  # type: ignore[return-value]


def read_settings(pairs: Iterable[str]) -> dict[str, Any]:
    """Settings from texts `NAME=VALUE`, values read as JSON where they are JSON.

    Raises:
        ConfigError: There is no `=`, the bench decides that setting itself, or it is given twice.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        name = name.strip()
        if not equals or name in FIXED:
            raise ConfigError(f"setting {pair!r}: give NAME=VALUE, NAME not one of {', '.join(sorted(FIXED))}")
        if name in found:
            raise ConfigError(f"setting {pair!r}: {name} is given twice, give it once")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value.strip()
    return found


def methods_of(strategies: Iterable[str], widths: Sequence[int]) -> list[Method]:
    """Every strategy at every width, cheapest first; greedy once.

    Args:
        strategies: Names, with settings of their own as in `parse_strategy`.
        widths: Trajectories kept alive (counts).

    Raises:
        ConfigError: An unknown strategy or setting, a width below 1, or none of either.

    Example:
        >>> [method.name for method in methods_of(["greedy", "ets", "ets:lambda_b=0.5"], [16])]
        ['greedy', 'ets@16', 'ets@16 lambda_b=0.5']
    """
    names = list(dict.fromkeys(strategies))
    if not names or not list(widths):
        raise ConfigError(f"strategies={names} at widths={list(widths)}: name at least one of each")
    parsed = [parse_strategy(name) for name in names]
    found: dict[str, Method] = {}
    for width in sorted(set(widths)):
        if width < 1:
            raise ConfigError(f"width={width}: keep at least one trajectory alive")
        for strategy, changes in parsed:
            method = Method(strategy, 1 if strategy == "greedy" else width, changes=changes)
            found.setdefault(method.name, method)
    return list(found.values())


def check_base(methods: Sequence[Method], base: SearchConfig) -> None:
    """Refuse a setting of all searches that no method heeds.

    Raises:
        ConfigError: It has no effect with any of them.
    """
    for name in sorted(_SELECTING):
        value, usual = getattr(base, name), SearchConfig.model_fields[name].default
        without = base.model_copy(update={name: usual})
        if value != usual and all(
            build_selector(method.config(base, 0)) == build_selector(method.config(without, 0)) for method in methods
        ):
            strategies = ", ".join(dict.fromkeys(method.strategy for method in methods))
            raise ConfigError(f"{name}={value!r} has no effect with {strategies}: drop it, or add a strategy it is for")


def _written(value: object) -> str:
    """A setting's value as short as it can be read back."""
    if isinstance(value, float):
        return short if float(short := f"{value:g}") == value else repr(value)
    return str(value)
