"""What adapters make of a user's settings: efforts, fresh seeds, and names that tell verifiers apart."""

from __future__ import annotations

from typing import Any

import pytest

from ets_engine.config import SearchConfig
from ets_engine.errors import ConfigError
from ets_integrations.settings import fresh_seed, resolve_config, verifier_name


def one(problem: str, steps: Any, trace: Any = None) -> float:
    return 0.5


def two(problem: str, steps: Any, trace: Any = None) -> float:
    return 0.25


def with_list(problem: str, steps: Any, seen: list[int] = []) -> float:  # noqa: B006
    return 0.5


def make(limit: float) -> Any:
    return lambda problem, steps: limit


def with_default(value: float) -> Any:
    def judge(problem: str, steps: Any, limit: float = value) -> float:
        return limit

    return judge


LIMIT = 3


def reading_a_value(problem: str, steps: Any) -> float:
    return float(any(len(step) > LIMIT for step in steps))


class Named:
    id = "my-judge"


def test_what_is_said_goes_before_the_effort_and_that_before_the_default() -> None:
    assert resolve_config().width == SearchConfig().width
    assert resolve_config(effort="low").width == 4
    assert resolve_config({"width": 8}, effort="low").width == 8
    assert resolve_config(SearchConfig(strategy="rebase"), effort="high").width == 64
    assert resolve_config(SearchConfig(width=8), width=2, max_steps=None).width == 2


@pytest.mark.parametrize("bad", [{"effort": "huge"}, {"widht": 3}, {"width": 0}])
def test_a_bad_setting_is_refused_by_name(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        resolve_config(**bad)


def test_fresh_seeds_differ_and_are_valid() -> None:
    seeds = {fresh_seed() for _ in range(50)}
    assert len(seeds) == 50
    assert all(SearchConfig(seed=seed).seed == seed for seed in seeds)


def test_verifiers_that_can_be_named_are_told_apart() -> None:
    names = [verifier_name(each) for each in ("path/to/prm", Named(), one, two)]
    assert None not in names and len(set(names)) == 4
    assert verifier_name(one) == verifier_name(one)


def test_defaults_are_part_of_a_name() -> None:
    first, second, again = with_default(0.1), with_default(0.2), with_default(0.1)
    assert verifier_name(first) == verifier_name(again) != verifier_name(second)


def test_a_value_of_the_module_is_part_of_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    first = verifier_name(reading_a_value)
    assert first == verifier_name(reading_a_value) is not None
    monkeypatch.setitem(globals(), "LIMIT", 4)
    assert verifier_name(reading_a_value) not in (None, first)
    monkeypatch.setitem(globals(), "LIMIT", [4])
    assert verifier_name(reading_a_value) is None


FIRST, SECOND = lambda problem, steps: 0.1, lambda problem, steps: 0.9  # one line, two verifiers


@pytest.mark.parametrize("verifier", [make(0.5), with_list, object(), one.__call__, FIRST, SECOND], ids=range(6))
def test_what_could_be_mistaken_for_another_has_no_name(verifier: Any) -> None:
    assert verifier_name(verifier) is None
