"""A method's settings of its own: read, named by what differs, applied, and refused where they change nothing."""

from __future__ import annotations

import pytest

from ets_engine.config import SearchConfig
from ets_engine.errors import ConfigError
from ets_engine.evaluation.methods import (
    Method,
    check_base,
    label,
    methods_of,
    parse_strategy,
    read_settings,
    split_name,
)

BASE = SearchConfig(lambda_b=0.5, max_tokens=99)


def test_a_variant_is_searched_with_its_own_settings_and_the_benchs() -> None:
    plain, changed = methods_of(["ets", "ets:kv_budget_tokens=400:lambda_b=2"], [8])
    assert (plain.name, changed.name) == ("ets@8", "ets@8 lambda_b=2 kv_budget_tokens=400")
    config = changed.config(BASE, seed=7)
    assert (config.lambda_b, config.kv_budget_tokens, config.max_tokens, config.seed) == (2.0, 400, 99, 7)
    assert (config.strategy, config.width, config.n_candidates) == ("ets", 8, 8)
    assert plain.config(BASE, seed=7).lambda_b == 0.5


def test_the_same_settings_have_one_name_however_they_are_written() -> None:
    texts = [
        "ets:lambda_b=0.5:node_cost=nodes",
        "ets: node_cost=nodes :lambda_b=.50",
        "ets:node_cost=nodes:lambda_b=5e-1",
    ]
    assert {parse_strategy(text) for text in texts[::2]} == {parse_strategy(texts[0])}
    assert [one.name for one in methods_of(texts, [4])] == ["ets@4 lambda_b=0.5 node_cost=nodes"]
    assert methods_of(["ets:lambda_b=0.123456789"], [4])[0].name == "ets@4 lambda_b=0.123456789", "no digit is lost"


def test_votes_over_samples_keep_the_settings_in_their_names() -> None:
    (one,) = methods_of(["best_of_n:top_p=0.9"], [4])
    assert [one.label(vote) for vote in one.votes] == [label(one.name, vote) for vote in one.votes]
    assert one.label("majority") == "majority@4 top_p=0.9"
    assert Method("best_of_n", 4, "(same KV as ets@2)").label("best") == "best_of_n@4 (same KV as ets@2)"
    assert split_name(one.label("majority")) == ("majority", 4, "top_p=0.9")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mcts:lambda_b=1", "strategy='mcts' is unknown"),
        ("ets:lambda_b", "'lambda_b': give NAME=VALUE"),
        ("ets:width=4", "'width=4': give NAME=VALUE, NAME not one of n_candidates, seed"),
        ("ets:price=4", "price=4"),
        ("ets:lambda_b=-1", "lambda_b=-1"),
        ("ets:lambda_b=1:lambda_b=2", "lambda_b is given twice"),
        ('ets:stop=["x"]', "stop must be one number or word"),
        ("ets:", "give NAME=VALUE"),
    ],
)
def test_what_is_no_variant_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        methods_of([text], [4])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rebase:lambda_b=2", "lambda_b=2.0 has no effect with rebase"),
        ("ets_published:allocation=ceil", "allocation='ceil' has no effect with ets_published"),
        ("beam:lambda_d=2:keep=2", "lambda_d=2.0 has no effect with beam"),
        ("rebase:kv_budget_tokens=9", "cannot honour a KV budget"),
        ("ets:lambda_b=0.5", None),  # what the bench has anyway: a sweep may name it
        ("beam:keep=2", None),
        ("rebase:temperature=0.7", None),
    ],
)
def test_a_setting_without_effect_is_refused_before_anything_is_measured(text: str, message: str | None) -> None:
    (method,) = methods_of([text], [16])
    if message is None:
        method.check(BASE)
    else:
        with pytest.raises(ConfigError, match=message):
            method.check(BASE)


@pytest.mark.parametrize(
    ("strategies", "settings", "message"),
    [
        (["rebase"], {"cluster_cut": 0.5}, "cluster_cut=0.5 has no effect with rebase"),
        (["ets", "rebase"], {"keep": 2}, "keep=2 has no effect with ets, rebase"),
        (["ets:lambda_b=3"], {"lambda_b": 0.5}, "lambda_b=0.5 has no effect with ets"),
        (["greedy", "ets"], {"lambda_b": 0.5, "top_p": 0.9}, None),
        (["greedy", "rebase"], {"lambda_b": 1.0}, None),  # what it is anyway
        (["ets", "beam"], {"keep": 2, "cluster_cut": 0.5, "node_cost": "nodes"}, None),
    ],
)
def test_a_setting_of_all_that_none_heeds_is_refused(
    strategies: list[str], settings: dict[str, object], message: str | None
) -> None:
    methods, base = methods_of(strategies, [4, 16]), SearchConfig(**settings)  # type: ignore[arg-type]
    if message is None:
        check_base(methods, base)
    else:
        with pytest.raises(ConfigError, match=message):
            check_base(methods, base)


def test_settings_are_read_as_json_where_they_are_json() -> None:
    with pytest.raises(ConfigError, match="keep is given twice"):
        read_settings(["keep=3", " keep =4"])
    given = read_settings(["lambda_b=0.5", "node_cost=nodes", "deadline_s=null", "keep = 3"])
    assert given == {"lambda_b": 0.5, "node_cost": "nodes", "deadline_s": None, "keep": 3}
